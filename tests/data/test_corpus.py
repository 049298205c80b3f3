"""Corpus reads its shards as one stream of tokens. An error names the damaged shard and byte."""

import errno
import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import MANIFEST_FILE, CorpusManifest, Shard, ShardWriter, select_token_dtype
from dist_llm.errors import DataError

SEQ_LEN = 8  # sequence length in tokens
DOCUMENT_SIZES = (  # in tokens; each document is one shard
    [3 * SEQ_LEN],
    [2 * SEQ_LEN, SEQ_LEN],
    [2 * SEQ_LEN - 1, 2 * SEQ_LEN + 1],
    [SEQ_LEN, 1, 1, 2 * SEQ_LEN],
    [4 * SEQ_LEN + 1, 1],
    [1] * (2 * SEQ_LEN + 1),
)


@pytest.mark.parametrize("sizes", DOCUMENT_SIZES, ids=str)
@pytest.mark.parametrize("vocab_size", [300, 1 << 16, (1 << 16) + 1])
def test_read_returns_any_window_across_shards(sizes, vocab_size, make_corpus):
    directory, stream = make_corpus(sizes, vocab_size=vocab_size)
    corpus = Corpus(directory)
    assert corpus.num_tokens == len(stream)
    for window_tokens in (1, SEQ_LEN, SEQ_LEN + 1, len(stream)):
        starts = np.arange(len(stream) - window_tokens + 1)
        expected = np.lib.stride_tricks.sliding_window_view(stream, window_tokens)
        assert np.array_equal(corpus.read(starts, window_tokens), expected)
        assert np.array_equal(Corpus(directory).read(starts[::-1], window_tokens), expected[::-1])


@pytest.mark.parametrize(
    ("num_tokens", "num_windows"),
    [(0, 0), (1, 0), (SEQ_LEN, 0), (SEQ_LEN + 1, 1), (2 * SEQ_LEN, 1), (2 * SEQ_LEN + 1, 2), (3 * SEQ_LEN, 2)],
)
def test_count_windows_leaves_room_for_the_next_token(num_tokens, num_windows, make_counting_corpus):
    corpus = make_counting_corpus(num_tokens)
    assert corpus.count_windows(SEQ_LEN + 1, SEQ_LEN) == num_windows
    if num_windows > 0:
        windows = corpus.read(np.arange(num_windows) * SEQ_LEN, SEQ_LEN + 1)
        assert np.array_equal(windows[:, 1:].ravel(), np.arange(1, num_windows * SEQ_LEN + 1)), (
            "a token is not a target once"
        )


def test_select_token_dtype_fits_all_ids():
    assert [select_token_dtype(vocab_size) for vocab_size in (1, 2**16, 2**16 + 1)] == ["uint16", "uint16", "uint32"]


def test_writer_does_not_split_a_document_across_shards(tmp_path):
    writer = ShardWriter(tmp_path, "train", "uint16", max_tokens=10)
    documents = [np.full(size, size) for size in (4, 6, 1, 12, 3)]
    for document in documents:
        writer.add(document, text_bytes=len(document))
    shards = writer.close()
    assert [(shard.tokens, shard.documents, shard.text_bytes) for shard in shards] == [
        (10, 2, 10),  # the documents of 4 and 6 tokens
        (1, 1, 1),
        (12, 1, 12),
        (3, 1, 3),
    ]
    offsets = [np.fromfile((tmp_path / s.file).with_suffix(".offsets"), "<u8").tolist() for s in shards]
    assert offsets == [[0, 4], [0], [0], [0]]
    stream = np.concatenate([np.fromfile(tmp_path / shard.file, "<u2") for shard in shards])
    assert np.array_equal(stream, np.concatenate(documents))


def write_and_close(directory, files, error=None):
    """Write a document, raise `error` if it is set, and close the writer. Append its open files to `files`."""
    with ShardWriter(directory, "train", "uint16", max_tokens=10) as writer:
        writer.add(np.arange(4), text_bytes=4)
        files += writer._open_files
        if error:
            raise error
        writer.close()


def test_writer_closes_its_files_after_an_error(tmp_path):
    files = []
    with pytest.raises(ZeroDivisionError):
        write_and_close(tmp_path, files, ZeroDivisionError())
    assert [file.closed for file in files] == [True, True]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_writer_closes_its_files_if_the_disk_is_full(tmp_path):
    (tmp_path / "train-00000.offsets").symlink_to("/dev/full")
    files = []
    with pytest.raises(OSError, match="No space left"):
        write_and_close(tmp_path, files)
    assert [file.closed for file in files] == [True, True]


def test_manifest_round_trip(tmp_path):
    shard = Shard("train-00000.bin", tokens=10, documents=2, text_bytes=33, sha256="ab")
    manifest = CorpusManifest(
        "uint32",
        vocab_size=70_000,
        tokenizer_sha256="cd",
        source=("x", "y"),
        shards={"train": (shard, shard), "heldout": ()},
        bad_rows=3,
    )
    manifest.save(tmp_path)
    assert CorpusManifest.load(tmp_path) == manifest
    assert (manifest.count_tokens("train"), manifest.count_documents("train"), manifest.count_text_bytes("train")) == (
        20,
        4,
        66,
    )
    assert not list(tmp_path.glob("*.tmp"))


@pytest.fixture
def corpus_to_damage(make_corpus):
    """Write a corpus of three shards. Return its directory, its second shard and a function that reads all tokens."""
    directory, stream = make_corpus([20, 30, 20])
    return directory, directory / "train-00001.bin", lambda: Corpus(directory).read(np.array([0]), len(stream))


def test_read_rejects_an_id_outside_the_vocabulary_with_its_byte(corpus_to_damage):
    directory, shard, read = corpus_to_damage
    ids = np.fromfile(shard, "<u2")
    ids[7] = 300
    ids.tofile(shard)
    with pytest.raises(DataError, match=rf"{shard}: token 7 \(byte 14\) is 300, but the tokenizer has 300 ids"):
        read()
    with pytest.raises(DataError, match=r"token 7 \(byte 14\)"):
        Corpus(directory).read(np.array([0, 25]), 5)
    Corpus(directory).read(np.array([28]), 42)  # begins after the bad token, so it succeeds


def test_check_shard_sizes_rejects_a_wrong_size(corpus_to_damage):
    directory, shard, read = corpus_to_damage
    Corpus(directory).check_shard_sizes()
    with shard.open("ab") as file:
        file.write(b"\0\0")
    for check in (read, Corpus(directory).check_shard_sizes):
        with pytest.raises(DataError, match=rf"{shard}: too long at byte 60: 62 bytes, but the manifest says 60"):
            check()
    os.truncate(shard, 59)
    for check in (read, Corpus(directory).check_shard_sizes):
        with pytest.raises(DataError, match=rf"{shard}: truncated at byte 59: 59 bytes, .*\(30 tokens of uint16\)"):
            check()
    shard.unlink()
    for check in (read, Corpus(directory).check_shard_sizes):
        with pytest.raises(DataError, match=rf"{shard}: cannot be read: No such file"):
            check()


def test_check_shard_sizes_rejects_an_unreadable_shard(corpus_to_damage, monkeypatch):
    directory, shard, read = corpus_to_damage
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: path != shard)
        for check in (read, Corpus(directory).check_shard_sizes):
            with pytest.raises(DataError, match=rf"{shard}: cannot be read: Permission denied. Give this user read"):
                check()
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", make_raiser(OSError(errno.EMFILE, "Too many open files")))
        with pytest.raises(DataError, match=r"bin: cannot be read: Too many open files. Raise the limit"):
            read()
    shard.unlink()
    shard.mkdir()
    for check in (read, Corpus(directory).check_shard_sizes, lambda: Corpus(directory, verify="hash")):
        with pytest.raises(DataError, match=rf"{shard}: cannot be read: Is a directory. Prepare the corpus again"):
            check()


def make_raiser(error):
    """Return a function that raises `error` for any arguments."""

    def raise_error(*args, **kwargs):
        raise error

    return raise_error


def test_verify_hash_rejects_a_changed_shard(corpus_to_damage):
    directory, shard, read = corpus_to_damage
    Corpus(directory, verify="hash")
    ids = np.fromfile(shard, "<u2")
    ids[3] ^= 1
    ids.tofile(shard)
    read()
    Corpus(directory, verify="size").check_shard_sizes()
    with pytest.raises(DataError, match=rf"{shard}: .*sha256 .*the manifest says"):
        Corpus(directory, verify="hash")


def test_a_directory_without_manifest_is_rejected_with_the_prepare_command(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: not a prepared corpus .*dist-llm prepare .*--out {tmp_path}"):
        Corpus(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        Corpus(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"format": "dist_llm token shards 0"}))
    with pytest.raises(DataError, match="not of format 'dist_llm token shards 1'"):
        Corpus(tmp_path)


MALFORMED_MANIFESTS = {  # function from the fields of a valid manifest to those of a malformed one
    "a list": lambda fields: [],
    "a number": lambda fields: 3,
    "no shards": lambda fields: {k: v for k, v in fields.items() if k != "shards"},
    "no heldout": lambda fields: {**fields, "shards": {"train": []}},
    "another split": lambda fields: {**fields, "shards": {**fields["shards"], "test": []}},
    "no vocab_size": lambda fields: {k: v for k, v in fields.items() if k != "vocab_size"},
    "an unknown field": lambda fields: {**fields, "colour": "red"},
    "shards of another type": lambda fields: {**fields, "shards": [1]},
    "a shard of another type": lambda fields: {**fields, "shards": {"train": [1], "heldout": []}},
    "a shard without fields": lambda fields: {**fields, "shards": {"train": [{}], "heldout": []}},
    "text for a number": lambda fields: {**fields, "vocab_size": "300"},
    "a negative number": lambda fields: {**fields, "vocab_size": -1},
    "an unsupported dtype": lambda fields: {**fields, "dtype": "float32"},
    "a source that is not a list": lambda fields: {**fields, "source": "here"},
}


@pytest.mark.parametrize("fault", MALFORMED_MANIFESTS)
def test_a_malformed_manifest_is_rejected(fault, make_corpus):
    directory, _ = make_corpus([20])
    path = directory / MANIFEST_FILE
    path.write_text(json.dumps(MALFORMED_MANIFESTS[fault](json.loads(path.read_text()))))
    with pytest.raises(DataError, match=rf"^{path}: .* Prepare the corpus again"):
        CorpusManifest.load(directory)


def test_time_and_memory_do_not_depend_on_the_corpus_size(tmp_path):
    """Open a sparse shard of 10 GiB and load a batch in under 2 seconds and 50 MB."""
    shard_bytes = 10 * 2**30
    with (tmp_path / "train-00000.bin").open("wb") as file:
        file.truncate(shard_bytes)
    shard = Shard("train-00000.bin", tokens=shard_bytes // 2, documents=1, text_bytes=shard_bytes, sha256="")
    CorpusManifest(
        "uint16", vocab_size=300, tokenizer_sha256="", source=(), shards={"train": (shard,), "heldout": ()}
    ).save(tmp_path)
    code = """if True:
        import resource, sys, time
        from pathlib import Path
        from dist_llm.data.data_history import build_fresh_plan
        from dist_llm.data.loader import build_loader
        from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
        from tests.laws.law import make_config
        start_time, initial_kb = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for order_name in ("shuffle", "random"):
            keys = dict(path=sys.argv[1], seq_len=1024, global_batch=8, micro_batch=8, order=order_name)
            config = make_config(ranks=1, data=keys)
            vocabulary = ObjectiveVocabulary(300, 256)
            loader = build_loader(config, build_fresh_plan(config), vocabulary, dp_rank=0, dp_size=1, pin=False)
            assert loader.load_batches(10**12)[0].num_valid_tokens == 8 * 1024
            loader.close()
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - initial_kb
        print(time.perf_counter() - start_time, grown_kb)
    """
    completed = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert completed.returncode == 0, completed.stderr
    seconds, grown_kb = map(float, completed.stdout.split())
    assert seconds < 2
    assert grown_kb < 50_000
