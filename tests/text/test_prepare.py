"""A corpus holds exactly the source's documents, is the same for any number of workers, and is all or nothing."""

import argparse
import base64
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_llm.data.shard import MANIFEST, SPLITS, Manifest
from dist_llm.errors import DataError
from dist_llm.text import prepare_run, progress
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.chunks import Chunk
from dist_llm.text.encode import DocumentEncoder, EncoderSpec, encode_in_order, is_heldout
from dist_llm.text.options import PrepareOptions, add_arguments, build_options
from dist_llm.text.prepare import prepare
from dist_llm.text.publish import lock_output
from dist_llm.text.report import FileCount, Report
from dist_llm.text.tokenizer import Tokenizer
from dist_llm.text.vocabulary import build_tokenizer

WORDS = [f"{start}{end}" for start in ("sh", "tr", "qu", "é", "漢") for end in ("ip", "ade", " 12", "it's", "\n")]


def random_texts(count, words=60, seed=0):
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) for _ in range(count)]


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def write_megabytes(path, megabytes):
    """A JSONL file of about so many MB, made quickly."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in random_texts(2000, words=200))
    with path.open("w") as file:
        for _ in range(-(-megabytes * 1_000_000 // len(rows))):
            file.write(rows)
    return str(path)


def run(source, out, **changes):
    """Prepare quietly with small defaults."""
    options = {"tokenizer": "byte", "workers": 1, **changes}
    sources = (source,) if isinstance(source, str) else tuple(source)
    return prepare(PrepareOptions(source=sources, out=out, **options), io.StringIO())


def read_documents(out, split):
    """The texts of a split, by the offsets file; each must end with the only `<|endoftext|>` in it."""
    manifest, tokenizer, texts = Manifest.load(out), Tokenizer.load(out), []
    for shard in manifest.shards[split]:
        ids = np.fromfile(out / shard.file, dtype=np.dtype(manifest.dtype).newbyteorder("<"))
        starts = np.fromfile((out / shard.file).with_suffix(".offsets"), dtype="<u8").astype(int)
        assert (len(ids), len(starts)) == (shard.tokens, shard.documents)
        for document in np.split(ids, starts[1:]):
            assert np.flatnonzero(document == tokenizer.eot).tolist() == [len(document) - 1]
            texts.append(tokenizer.decode(document[:-1]))
    return texts


def all_files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_the_corpus_is_the_source(tokenizer, tmp_path):
    texts = random_texts(500)
    manifest = run(write_rows(tmp_path / "a.jsonl", ["", *texts, ""]), tmp_path / "out", tokenizer=tokenizer)
    heldout = [is_heldout(text.encode(), 0.01) for text in texts]
    assert sum(heldout), "the test needs some"
    for split, want in (("train", False), ("heldout", True)):
        kept = [text for text, out in zip(texts, heldout, strict=True) if out is want]
        assert read_documents(tmp_path / "out", split) == kept
        assert manifest.text_bytes(split) == sum(len(text.encode()) for text in kept)
    assert manifest == Manifest.load(tmp_path / "out")
    assert manifest.tokenizer_sha256 == Tokenizer.load(tmp_path / "out").sha256
    assert [path.name for path in tmp_path.iterdir() if path.name != "a.jsonl"] == ["out"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_narrowest_type_that_holds_the_ids(vocab_size, dtype, tmp_path):
    tokens = [bytes([byte]) for byte in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    ranks = "".join(
        f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens[: vocab_size - 1])
    )
    (tmp_path / "wide.tiktoken").write_text(ranks)
    source = write_rows(tmp_path / "a.jsonl", random_texts(5))
    manifest = run(source, tmp_path / "out", tokenizer=str(tmp_path / "wide.tiktoken"), heldout_fraction=0)
    assert (manifest.vocab_size, manifest.dtype) == (vocab_size, dtype)
    assert read_documents(tmp_path / "out", "train") == random_texts(5)


def test_one_worker_or_three_write_the_same_bytes(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", random_texts(20_000))
    options = {"tokenizer": "bpe:300", "shard_tokens": 300_000, "bpe_train_bytes": 200_000}
    manifest = run(source, tmp_path / "one", **options)
    run(source, tmp_path / "three", **options, workers=3)
    assert len(manifest.shards["train"]) > 3
    assert max(shard.tokens for shard in manifest.shards["train"]) <= 300_000
    assert all_files(tmp_path / "one") == all_files(tmp_path / "three")


def test_what_is_held_out_depends_on_the_text_alone(tmp_path):
    texts = random_texts(3000)
    forward = write_rows(tmp_path / "a.jsonl", texts)
    backward = write_rows(tmp_path / "b.jsonl", texts[::-1])
    run(forward, tmp_path / "one", heldout_fraction=0.1)
    run(backward, tmp_path / "two", heldout_fraction=0.1, workers=2, tokenizer="bpe:300")
    heldout = read_documents(tmp_path / "one", "heldout")
    assert heldout == read_documents(tmp_path / "two", "heldout")[::-1]
    assert 0.08 < len(heldout) / len(texts) < 0.12


def test_training_sees_only_the_first_bytes_and_nothing_held_out(tmp_path, monkeypatch):
    seen = []

    def spy(spec, pattern, training_texts):
        seen.extend(training_texts())
        return build_tokenizer(spec, pattern, training_texts)

    monkeypatch.setattr(prepare_run, "build_tokenizer", spy)
    texts = random_texts(1000)
    source = write_rows(tmp_path / "a.jsonl", texts)
    run(source, tmp_path / "out", heldout_fraction=0.2, bpe_train_bytes=20_000, tokenizer="bpe:260")
    kept = "".join(text for text in texts if not is_heldout(text.encode(), 0.2))
    assert "".join(seen).encode() == kept.encode()[: len("".join(seen).encode())]
    assert 19_996 < len("".join(seen).encode()) <= 20_000


def test_bad_rows_are_counted_and_past_the_rate_fail(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", random_texts(99))
    with open(source, "ab") as file:
        file.write(b'{"text": "\xff"}\n')
    assert run(source, tmp_path / "out", max_bad_rate=0.01).bad_rows == 1
    with pytest.raises(DataError, match=r"1 of 100 rows are bad(.|\n)*a\.jsonl:100: not UTF-8"):
        run(source, tmp_path / "out2", max_bad_rate=0.009)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "out"}


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        ([], {}, "no text to train on, in 0 rows"),
        ([""], {}, r"\(1 empty, 0 held out\)"),
        (["x"], {"heldout_fraction": 0.999999}, r"\(0 empty, 1 held out\)"),
        ([], {"tokenizer": "bpe:300"}, "too small"),
        (["x"], {"tokenizer": "bpe:300"}, "use bpe:257 or add text"),
        (["x"], {"heldout_fraction": 1.0}, "--heldout-fraction"),
        (["x"], {"max_bad_rate": -1}, "--max-bad-rate"),
        (["x"], {"workers": 0}, "--workers"),
        (["x"], {"shard_tokens": 0}, "--shard-tokens"),
        (["x"], {"bpe_train_bytes": 0}, "--bpe-train-bytes"),
        (["x"], {"tokenizer": "gpt5"}, "unknown"),
        (["x"], {"source": ()}, "--source"),
        (["x"], {"dedup_threshold": 1.0}, "--dedup-threshold"),
        (["x"], {"separator": ""}, "--separator: must not be empty"),
        (["x"], {"separator": "x"}, "--separator: cuts text files"),
        (["x"], {"part": "3/2"}, "--part 3/2"),
        (["x"], {"filter": ("gopher",)}, r"\(0 empty, 0 held out, 1 removed by rules\)"),
    ],
)
def test_what_cannot_work_says_why_and_leaves_nothing(texts, changes, message, tmp_path):
    source = changes.pop("source", (write_rows(tmp_path / "a.jsonl", texts),))
    with pytest.raises(DataError, match=message):
        run(source, tmp_path / "out", **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_an_existing_corpus_is_replaced_only_on_demand_and_only_when_the_new_is_complete(tmp_path):
    source, out = write_rows(tmp_path / "a.jsonl", ["old"]), tmp_path / "out"
    run(source, out, heldout_fraction=0)
    before = all_files(out)
    with pytest.raises(DataError, match="--overwrite"):
        run(source, out)
    empty = write_rows(tmp_path / "b.jsonl", [])
    with pytest.raises(DataError, match="no text"):
        run(empty, out, overwrite=True)
    assert all_files(out) == before
    run(write_rows(tmp_path / "c.jsonl", ["new"]), out, overwrite=True, heldout_fraction=0)
    assert read_documents(out, "train") == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl", "out"]


def test_overwrite_never_deletes_what_is_no_corpus(tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(DataError, match="not a prepared corpus"):
        run(write_rows(tmp_path / "a.jsonl", ["x"]), tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis").is_dir()


def test_a_run_killed_while_swapping_loses_nothing(tmp_path):
    source, out = write_rows(tmp_path / "a.jsonl", ["old"]), tmp_path / "out"
    run(source, out, heldout_fraction=0)
    out.rename(tmp_path / "out.old")
    with pytest.raises(DataError, match="--overwrite"):
        run(source, out)
    assert read_documents(out, "train") == ["old"]


def test_a_second_run_to_the_same_place_is_sent_away(tmp_path):
    source, out = write_rows(tmp_path / "a.jsonl", ["x"]), tmp_path / "out"
    with lock_output(out), pytest.raises(DataError, match="another prepare"):
        run(source, out)
    run(source, out, heldout_fraction=0)


PREPARE = """
import json, resource, sys
from pathlib import Path
from dist_llm.errors import DataError
from dist_llm.text import chunks
from dist_llm.text.prepare import PrepareOptions, prepare
fields = json.loads(sys.argv[1])
chunks.RESUME_POINT_CHARS = fields.pop("resume_point_chars", chunks.RESUME_POINT_CHARS)
if fields.pop("largest_file", 0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    prepare(PrepareOptions(**{**fields, "source": tuple(fields["source"]), "out": Path(fields["out"])}))
except DataError as error:
    sys.exit(f"DataError: {error}")
print(*(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
"""


def start(source, out, **fields):
    """Prepare in a process of its own, which prints its peak memory and its children's, in KiB."""
    fields = {"source": [source], "out": str(out), "tokenizer": "byte", "workers": 2, **fields}
    command = [sys.executable, "-c", PREPARE, json.dumps(fields)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
    return found


def test_a_killed_run_leaves_no_corpus_and_no_process_and_the_next_one_finishes(tmp_path):
    source, out, partial = write_megabytes(tmp_path / "a.jsonl", 20), tmp_path / "out", tmp_path / "out.partial"
    with start(source, out) as process:
        wait_for(lambda: any(path.stat().st_size for path in partial.glob("train-*.bin")))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid, signal.SIGKILL)
    assert len(children) >= 2
    try:
        wait_for(lambda: not any(map(alive, children)), seconds=20)
    finally:
        for pid in filter(alive, children):
            os.kill(int(pid), signal.SIGKILL)
    assert not out.exists()
    assert not (partial / MANIFEST).exists()

    run(source, out, workers=2)
    assert sum(Manifest.load(out).documents(split) for split in SPLITS) == source_rows(source)
    assert not partial.exists()


IDLE = """
import sys, time
from pathlib import Path
from dist_llm.text.chunks import Chunk
from dist_llm.text.encode import EncoderSpec, _Worker
worker = _Worker(EncoderSpec(Path(sys.argv[1])))
worker.submit(Chunk(["x"], ["f:1"]))
worker.collect()
print(worker._process.pid, flush=True)
time.sleep(60)
"""


def test_a_worker_with_nothing_to_do_dies_with_its_parent_too(tmp_path):
    build_tokenizer("byte", None, list).save(tmp_path)
    with subprocess.Popen([sys.executable, "-c", IDLE, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.kill()
    try:
        wait_for(lambda: not alive(child), seconds=20)
    finally:
        if alive(child):
            os.kill(child, signal.SIGKILL)


def source_rows(source):
    with open(source) as file:
        return sum(1 for _ in file)


def test_memory_does_not_grow_with_the_source(tmp_path):
    peaks = []
    for megabytes in (10, 60):
        source = write_megabytes(tmp_path / f"{megabytes}.jsonl", megabytes)
        fields = {"tokenizer": "bpe:300", "bpe_train_bytes": 1_000_000, "shard_tokens": 5_000_000}
        stdout, stderr = start(source, tmp_path / str(megabytes), **fields).communicate()
        peaks.append([int(kib) / 1024 for kib in stdout.split()])
        assert len(peaks[-1]) == 2, stderr
    growth = [large - small for small, large in zip(*peaks, strict=True)]
    assert max(growth) < 12, f"peaks in MiB, parent and worker: {peaks}"


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    source = write_megabytes(tmp_path / "a.jsonl", 1)
    process = start(source, tmp_path / "out", largest_file=1)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert stderr.startswith(f"DataError: {tmp_path}/out.partial: cannot be written: File too large"), stderr
    assert "Exception ignored" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def some_chunks(count=8):
    return (Chunk(["x" * 2_000_000], [f"f:{number}"]) for number in range(count))


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3])
def test_a_worker_that_dies_is_a_clear_error(seconds, tmp_path):
    """Also while it writes its result, when a shared pipe would leave the reader waiting for the rest."""
    others = set(multiprocessing.active_children())  # of other tests
    build_tokenizer("byte", None, list).save(tmp_path)
    chunks = encode_in_order(some_chunks(40), EncoderSpec(tmp_path), workers=2)
    next(chunks)
    time.sleep(seconds)
    next(child for child in multiprocessing.active_children() if child not in others).kill()
    with pytest.raises(DataError, match="--workers"):
        list(chunks)
    assert set(multiprocessing.active_children()) <= others


def test_few_chunks_are_in_flight(tmp_path):
    build_tokenizer("byte", None, list).save(tmp_path)
    taken = []
    chunks = encode_in_order((taken.append(1) or each for each in some_chunks(20)), EncoderSpec(tmp_path), workers=2)
    next(chunks)
    assert len(taken) <= 7
    chunks.close()


def test_a_failure_in_a_worker_surfaces(tmp_path, monkeypatch):
    tokenizer = build_tokenizer("byte", None, list)
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, text: 1 / 0)
    with pytest.raises(RuntimeError, match="f:0: cannot be tokenized"):
        DocumentEncoder(tokenizer, EncoderSpec(tmp_path))(next(some_chunks(1)))
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):  # a user's error keeps its class
        list(encode_in_order(some_chunks(1), EncoderSpec(tmp_path / "gone"), workers=2))


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_and_summary(terminal, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.0)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    source = write_rows(tmp_path / "a.jsonl", ["", "abc"])
    with open(source, "a") as file:
        file.write("broken\n")
    options = PrepareOptions(
        source=(source,), tokenizer="byte", out=tmp_path / "out", workers=1, heldout_fraction=0, max_bad_rate=1
    )
    prepare(options, stream)
    said = stream.getvalue()
    assert ("100%, 0 s left, 1 documents" in said) is not terminal
    assert "1 documents, 4 tokens of 257 ids, 0.75 bytes per token, 1 shards, 0.00% held out, 1 bad rows" in said
    assert f"skipped {source}:3: not JSON" in said


def test_the_summary_and_the_report_have_a_table_of_the_input(tmp_path):
    folder, out, stream = tmp_path / "in", tmp_path / "out", io.StringIO()
    folder.mkdir()
    for name, content in {"a.txt": b"abc", "a.txt.md5": b"12", "b.txt": b"\xff" * 7, "c.zip": b"PK"}.items():
        (folder / name).write_bytes(content)
    options = PrepareOptions((str(folder),), "byte", out, workers=1, heldout_fraction=0, skip_unreadable=True)
    prepare(options, stream)
    report = Report.load(out)
    assert report.inputs == {
        "read": {".txt": FileCount(1, 3)},
        "skipped: checksum": {".txt.md5": FileCount(1, 2)},
        "skipped: unreadable": {".zip": FileCount(1, 2), ".txt": FileCount(1, 7)},
    }
    assert list(report.unreadable) == [str(folder / "b.txt")]
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["skipped:", "unreadable", ".txt", "1", "7"] in lines
    assert ["read", ".txt", "1", "3"] in lines
    total = Report({})
    total.add(Report.load(out))
    total.add(Report.load(out))
    assert (total.inputs, total.unreadable) == (report.inputs, report.unreadable), "parts see the same files"


@pytest.mark.parametrize("separator", [None, "<|endoftext|>"])
def test_documents_that_were_not_kept_apart_are_a_warning(separator, tmp_path):
    path, stream = tmp_path / "a.txt", io.StringIO()
    path.write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    options = PrepareOptions((str(path),), "byte", tmp_path / "out", workers=1, heldout_fraction=0, separator=separator)
    prepare(options, stream)
    warnings = Report.load(tmp_path / "out").warnings
    assert all(f"warning: {each}" in stream.getvalue() for each in warnings)
    if separator:
        assert (read_documents(tmp_path / "out", "train"), warnings) == (["one", "two"], [])
        return
    assert (
        f"--source {path} is a single document. If it is a text file that holds many, give --separator" in warnings[0]
    )
    assert f"1 documents contain the text <|endoftext|>, as {path}: it is encoded like any text" in warnings[1]


def test_sources_that_the_shell_expands_are_read_in_their_order(tmp_path):
    for number in range(3):
        write_rows(tmp_path / f"{number}.jsonl", [f"text {number}"] * 9)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    files = sorted(map(str, tmp_path.glob("*.jsonl")))
    more = ["--source", files[0], "--tokenizer", "byte", "--out", str(tmp_path / "out")]
    options = build_options(parser.parse_args(["--source", *files, *more]))
    assert options.source == (*files, files[0])


def test_a_corpus_that_is_done_is_not_made_again(tmp_path):
    file, out = write_rows(tmp_path / "x.jsonl", random_texts(30)), tmp_path / "out"
    options = PrepareOptions((file,), "byte", out, workers=1)
    first = prepare(options, io.StringIO())
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    told = io.StringIO()
    assert prepare(replace(options, workers=2), told) == first
    assert f"nothing to do: {out} was prepared with the same options" in told.getvalue()
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == written
    for changed in ({"heldout_fraction": 0.5}, {"text_key": "other"}):
        with pytest.raises(DataError, match=r"out: exists\. Choose another --out, or give --overwrite"):
            prepare(replace(options, **changed), io.StringIO())
    write_rows(tmp_path / "x.jsonl", random_texts(31))
    with pytest.raises(DataError, match="out: exists"):
        prepare(options, io.StringIO())
    assert prepare(replace(options, overwrite=True), io.StringIO()) != first


def test_arguments_become_options():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    least = parser.parse_args(["--source", "a", "--source", "b", "--tokenizer", "byte", "--out", "o"])
    assert build_options(least) == PrepareOptions(source=("a", "b"), tokenizer="byte", out=Path("o"))
    given = ["--source=a", "--tokenizer=bpe:300", "--out=o", "--overwrite", "--workers=3", "--split-pattern=llama3"]
    given += ["--text-key=t", "--hf-split=s", "--heldout-fraction=0.5", "--shard-tokens=7", "--bpe-train-bytes=8"]
    given += ["--part=1/2", "--filter=c4", "--filter=gopher", "--dedup=near", "--dedup-threshold=0.7"]
    scale = ("1/2", ("c4", "gopher"), "near", 0.7)
    want = PrepareOptions(("a",), "bpe:300", Path("o"), "llama3", "t", "s", 0.5, 3, 7, 8, 0.25, True, *scale)
    assert build_options(parser.parse_args([*given, "--max-bad-rate=0.25"])) == want
    given += ["--include=*.txt", "--exclude=a*", "--exclude=b*", "--skip-unreadable", "--max-bad-rate=0.25"]
    want = replace(want, include=("*.txt",), exclude=("a*", "b*"), skip_unreadable=True)
    assert build_options(parser.parse_args(given)) == want
    assert build_options(parser.parse_args([*given, "--separator=x"])) == replace(want, separator="x")
    assert "python-stdlib" in parser.format_help()


def test_help_loads_no_library():
    check = "import sys, dist_llm.text.options as o; assert not {'numpy', 'tiktoken', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
