"""`adopt` makes a corpus of token files of other programs, without a copy of the files.

The corpus has the same tokens and document offsets as a corpus that `prepare` makes of the same text.
"""

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest

from dist_llm import cli
from dist_llm.data.corpus import Corpus
from dist_llm.data.shard import CorpusManifest
from dist_llm.errors import DataError
from dist_llm.text.adopt import adopt
from dist_llm.text.adopt_options import DTYPES, FORMATS, AdoptOptions
from dist_llm.text.prepare import PrepareOptions, prepare
from dist_llm.text.token_files import SUPPORTED_DTYPES

from .megatron_index import build_megatron_index

EOT = 256  # end-of-document id of the tokenizer `byte`


@pytest.fixture
def prepared_corpus(tmp_path):
    """Prepare a corpus of four documents with the tokenizer `byte`."""
    text = tmp_path / "text"
    text.mkdir()
    for index, num_chars in enumerate((40, 1, 300, 77)):
        (text / f"{index}.txt").write_text("añ"[index % 2] * num_chars)  # characters of 1 and 2 bytes
    out = tmp_path / "prepared"
    prepare(
        PrepareOptions(source=(str(text),), tokenizer="byte", out=out, heldout_fraction=0.0, workers=1), io.StringIO()
    )
    return Corpus(out)


def write_token_file(kind, corpus, directory, dtype="uint16"):
    """Write the corpus in the format of another program. Return the path and the ids."""
    ids = np.fromfile(corpus.directory / "train-00000.bin", "<u2").astype(dtype)
    starts = np.fromfile(corpus.directory / "train-00000.offsets", "<u8").astype(int)
    path = directory / ("x.npy" if kind == "npy" else "x.bin")
    if kind == "npy":
        np.save(path, ids)
    elif kind == "llmc":
        magic = {"uint16": (20240520, 1), "uint32": (20240801, 7)}[dtype]
        ids = np.concatenate([[EOT], ids[:-1]]).astype(dtype)  # in llm.c's files the token precedes a document
        path.write_bytes(np.array([*magic, len(ids), *[0] * 253], "<i4").tobytes() + ids.tobytes())
    else:
        ids.tofile(path)
    if kind == "megatron":
        dtype_code, id_bytes = {"uint16": (8, 2), "int32": (4, 4)}[dtype]
        lengths = np.diff([*starts, len(ids)])
        index = build_megatron_index(lengths, range(len(lengths) + 1), dtype_code=dtype_code, id_bytes=id_bytes)
        path.with_suffix(".idx").write_bytes(index)
    return path, ids


def make_options(kind, *data, out, **changes):
    """Return the options of `adopt` with the byte tokenizer."""
    return AdoptOptions(format=kind, data=tuple(map(str, data)), tokenizer="byte", out=out, **changes)


KINDS_AND_DTYPES = [(kind, dtype) for kind in ("npy", "bin") for dtype in DTYPES]
KINDS_AND_DTYPES += [("megatron", "uint16"), ("megatron", "int32"), ("llmc", "uint16"), ("llmc", "uint32")]


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_adopted_corpus_equals_the_prepared_corpus(kind, dtype, prepared_corpus, tmp_path):
    path, ids = write_token_file(kind, prepared_corpus, tmp_path, dtype)
    out = tmp_path / "out"
    output = io.StringIO()
    manifest = adopt(make_options(kind, path, out=out, dtype=dtype if kind == "bin" else None), output)
    corpus = Corpus(out)
    corpus.check_shard_sizes()
    assert (corpus.manifest, corpus.dtype.itemsize) == (manifest, np.dtype(dtype).itemsize)
    assert np.array_equal(corpus.read(np.array([0]), len(ids))[0], ids)
    assert np.array_equal(corpus.read(np.array([7, 350]), 40), [ids[7:47], ids[350:390]])
    expected = prepared_corpus.manifest
    for count in (CorpusManifest.count_tokens, CorpusManifest.count_documents, CorpusManifest.count_text_bytes):
        assert count(manifest, "train") == count(expected, "train"), count.__name__
    assert np.array_equal(corpus.get_document_offsets(0), prepared_corpus.get_document_offsets(0))
    assert (manifest.tokenizer_sha256, manifest.vocab_size) == (expected.tokenizer_sha256, expected.vocab_size)
    (shard,) = manifest.shards["train"]
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(os.listdir(out)) == ["manifest.json", "tokenizer.json", "train-00000.offsets"]
    assert not list(tmp_path.glob("*.partial"))
    assert "4 documents, 500 tokens of 257 ids" in output.getvalue()


def test_a_changed_or_damaged_file_is_detected(prepared_corpus, tmp_path):
    path, _ = write_token_file("llmc", prepared_corpus, tmp_path)
    adopt(make_options("llmc", path, out=tmp_path / "out"), io.StringIO())
    Corpus(tmp_path / "out", verify="hash")
    content = bytearray(path.read_bytes())
    content[1024 + 2 * 7 : 1024 + 2 * 8] = b"\xff\xff"  # id 7, of 2 bytes, after the header of 1024 bytes
    path.write_bytes(content)
    corpus = Corpus(tmp_path / "out")
    with pytest.raises(DataError, match=rf"{path}: token 7 \(byte 1038\) is 65535"):
        corpus.read(np.array([0]), 20)
    with pytest.raises(DataError, match=rf"{path}: bytes 0 to .* sha256"):
        Corpus(tmp_path / "out", verify="hash")
    os.truncate(path, 1030)
    with pytest.raises(DataError, match=rf"{path}: truncated at byte 1030: .* tokens of uint16 after a header of 1024"):
        Corpus(tmp_path / "out").check_shard_sizes()


def test_files_keep_their_order_within_a_split(prepared_corpus, tmp_path):
    paths = [tmp_path / f"{index}.npy" for index in range(9)]
    for index, path in enumerate(paths):  # file n has 5 + n times the id n
        np.save(path, np.full(5 + index, index, np.uint16))
    adopt(make_options("npy", *paths[:6], heldout=tuple(map(str, paths[6:])), out=tmp_path / "out"), io.StringIO())
    train, heldout = Corpus(tmp_path / "out"), Corpus(tmp_path / "out", "heldout")
    assert train.read(np.array([0]), train.num_tokens)[0].tolist() == [
        token for token in range(6) for _ in range(5 + token)
    ]
    assert heldout.read(np.array([0]), heldout.num_tokens)[0].tolist() == [
        token for token in range(6, 9) for _ in range(5 + token)
    ]
    assert [heldout.get_document_offsets(shard_index).tolist() for shard_index in range(3)] == [[0]] * 3


def test_relative_paths_and_file_urls_are_resolved(prepared_corpus, tmp_path, monkeypatch):
    path, _ = write_token_file("npy", prepared_corpus, tmp_path)
    monkeypatch.chdir(tmp_path)
    for index, location in enumerate(("x.npy", path.as_uri(), path)):
        manifest = adopt(make_options("npy", location, out=Path(f"out{index}")), io.StringIO())
        assert manifest.shards["train"][0].file == str(path)


def test_adopt_warns_about_unknown_document_boundaries(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(9, np.uint16))
    output = io.StringIO()
    adopt(make_options("npy", tmp_path / "x.npy", out=tmp_path / "out"), output)
    assert "1 of the files are a single document" in output.getvalue()
    assert "no file has document boundaries" in output.getvalue()


def test_adopt_warns_about_a_leading_end_of_document_token(tmp_path):
    np.save(tmp_path / "x.npy", np.array([EOT, 1, 2, EOT, 3], np.uint16))
    for eot_position, starts, has_hint in ((None, [0, 1, 4], True), ("start", [0, 3], False)):
        output, out = io.StringIO(), tmp_path / f"{eot_position}"
        adopt(make_options("npy", tmp_path / "x.npy", out=out, eot_position=eot_position), output)
        assert Corpus(out).get_document_offsets(0).tolist() == starts
        assert ("adopt again with --eot-position start" in output.getvalue()) == has_hint


def test_files_of_different_dtypes_are_refused(tmp_path):
    for name in ("uint16", "int32"):
        np.save(tmp_path / f"{name}.npy", np.zeros(9, name))
    with pytest.raises(DataError, match=r"int32.npy: ids of uint32, but those of .*uint16.npy are uint16"):
        adopt(make_options("npy", tmp_path / "uint16.npy", tmp_path / "int32.npy", out=tmp_path / "out"), io.StringIO())
    assert sorted(os.listdir(tmp_path)) == ["int32.npy", "uint16.npy"], "a failed adoption must leave no files"


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("bin", b"\1\0\2", r"x.bin: truncated at byte 3: 3 bytes are not whole ids"),
        ("bin", b"\1\0\2\2", r"x.bin: token 1 \(byte 2\) is 514, but the tokenizer has 257 ids"),
        ("bin", b"", r"x.bin: byte 0: no ids in it"),
        ("megatron", b"\1\0", r"x.idx: cannot be read: No such file.* needs its .idx beside it"),
        ("npy", b"\1\0", r"x.bin: byte 0: not an array"),
        ("llmc", b"\1\0", r"x.bin: byte 2: truncated"),
        ("bin", None, r"x.bin: cannot be read: No such file"),
        ("megatron", None, r"x.bin: cannot be read: No such file"),
    ],
)
def test_a_bad_file_is_refused_with_its_byte(kind, content, message, tmp_path):
    if content is not None:
        (tmp_path / "x.bin").write_bytes(content)
    dtype = "uint16" if kind == "bin" else None
    with pytest.raises(DataError, match=message):
        adopt(make_options(kind, tmp_path / "x.bin", out=tmp_path / "out", dtype=dtype), io.StringIO())
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "bpe:512"}, "--tokenizer bpe:512: give the one that made the ids"),
        ({"tokenizer": "nonsense"}, "--tokenizer nonsense: unknown"),
        ({"dtype": "uint16"}, "--dtype: npy files store their dtype"),
        ({"format": "bin"}, "--dtype: required"),
        ({"format": "megatron", "eot_position": "end"}, "--eot-position: the .idx"),
        ({"workers": 0}, "--workers"),
        ({"data": ()}, "--data: give at least one"),
        ({"out": Path("/tmp")}, "/tmp: exists"),
    ],
)
def test_invalid_options_are_refused(changes, message, tmp_path):
    fields = {"format": "npy", "data": ("x.npy",), "tokenizer": "byte", "out": tmp_path / "out", **changes}
    with pytest.raises(DataError, match=message):
        adopt(AdoptOptions(**fields), io.StringIO())


def test_an_unwritable_output_is_reported(prepared_corpus, tmp_path):
    path, _ = write_token_file("npy", prepared_corpus, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written: Not a directory"):
        adopt(make_options("npy", path, out=tmp_path / "file" / "out"), io.StringIO())


def test_adopt_command_writes_a_corpus_once(prepared_corpus, tmp_path, capsys):
    path, _ = write_token_file("llmc", prepared_corpus, tmp_path)
    arguments = ["adopt", "--format", "llmc", "--data", str(path), "--tokenizer", "byte", "--out", str(tmp_path / "o")]
    assert cli.main(arguments) == 0
    assert Corpus(tmp_path / "o").num_tokens == prepared_corpus.num_tokens
    assert cli.main(arguments) == 2
    assert "exists. Choose another --out" in capsys.readouterr().err


def test_options_list_the_supported_formats_and_dtypes():
    assert set(SUPPORTED_DTYPES) == set(DTYPES)
    assert set(FORMATS) == {"megatron", "npy", "bin", "llmc"}


def test_a_remote_file_is_adopted_without_a_copy(prepared_corpus, tmp_path):
    import fsspec

    _, ids = write_token_file("megatron", prepared_corpus, tmp_path)
    files = fsspec.filesystem("memory")
    for name in ("x.bin", "x.idx"):
        files.pipe_file(f"/adopt/{name}", (tmp_path / name).read_bytes())
    manifest = adopt(make_options("megatron", "memory://adopt/x", out=tmp_path / "out"), io.StringIO())
    assert manifest.shards["train"][0].file == "memory://adopt/x.bin"
    corpus = Corpus(tmp_path / "out", cache=str(tmp_path / "cache"))
    assert np.array_equal(corpus.read(np.array([0]), len(ids))[0], ids)
    with pytest.raises(DataError, match=r"memory://adopt/none.bin: cannot be fetched: FileNotFoundError"):
        adopt(make_options("megatron", "memory://adopt/none", out=tmp_path / "other"), io.StringIO())
