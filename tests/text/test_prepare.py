"""`prepare` writes a corpus with exactly the documents of the source.

The corpus is the same for any number of workers. It appears at its path only when it is complete.
"""

import argparse
import base64
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dist_llm.data.shard import MANIFEST_FILE, SPLITS, CorpusManifest
from dist_llm.errors import DataError
from dist_llm.text import prepare_run, progress
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.text.chunks import Chunk
from dist_llm.text.encode import DocumentEncoder, DocumentEncoderSpec, encode_in_order, is_heldout
from dist_llm.text.options import PrepareOptions, add_arguments, build_options
from dist_llm.text.prepare import prepare
from dist_llm.text.publish import lock_output
from dist_llm.text.report import FileCount, PrepareReport
from dist_llm.text.tokenizer import Tokenizer

from .prepare_runs import (
    count_rows,
    is_alive,
    make_random_texts,
    read_all_files,
    read_documents,
    run_prepare,
    start_prepare,
    wait_for,
    write_megabytes,
    write_rows,
)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_the_corpus_has_the_documents_of_the_source(tokenizer, tmp_path):
    texts = make_random_texts(500)
    manifest = run_prepare(write_rows(tmp_path / "a.jsonl", ["", *texts, ""]), tmp_path / "out", tokenizer=tokenizer)
    assert any(is_heldout(text.encode(), fraction=0.01) for text in texts), (
        "no text is held out, so the test cannot detect a failure"
    )
    for split in ("train", "heldout"):
        expected = [text for text in texts if is_heldout(text.encode(), fraction=0.01) == (split == "heldout")]
        assert read_documents(tmp_path / "out", split) == expected
        assert manifest.count_text_bytes(split) == sum(len(text.encode()) for text in expected)
    assert manifest == CorpusManifest.load(tmp_path / "out")
    assert manifest.tokenizer_sha256 == Tokenizer.load(tmp_path / "out").sha256
    assert [path.name for path in tmp_path.iterdir() if path.name != "a.jsonl"] == ["out"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_have_the_narrowest_dtype(vocab_size, dtype, tmp_path):
    tokens = [bytes([byte]) for byte in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    ranks = "".join(
        f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens[: vocab_size - 1])
    )
    (tmp_path / "wide.tiktoken").write_text(ranks)
    source = write_rows(tmp_path / "a.jsonl", make_random_texts(5))
    manifest = run_prepare(source, tmp_path / "out", tokenizer=str(tmp_path / "wide.tiktoken"), heldout_fraction=0)
    assert (manifest.vocab_size, manifest.dtype) == (vocab_size, dtype)
    assert read_documents(tmp_path / "out", "train") == make_random_texts(5)


def test_one_and_three_workers_write_the_same_bytes(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", make_random_texts(20_000))
    options = {"tokenizer": "bpe:300", "shard_tokens": 300_000, "bpe_train_bytes": 200_000}
    manifest = run_prepare(source, tmp_path / "one", **options)
    run_prepare(source, tmp_path / "three", **options, workers=3)
    assert len(manifest.shards["train"]) > 3
    assert max(shard.tokens for shard in manifest.shards["train"]) <= 300_000
    assert read_all_files(tmp_path / "one") == read_all_files(tmp_path / "three")


def test_the_heldout_split_depends_only_on_the_text(tmp_path):
    texts = make_random_texts(3000)
    forward = write_rows(tmp_path / "a.jsonl", texts)
    backward = write_rows(tmp_path / "b.jsonl", texts[::-1])
    run_prepare(forward, tmp_path / "one", heldout_fraction=0.1)
    run_prepare(backward, tmp_path / "two", heldout_fraction=0.1, workers=2, tokenizer="bpe:300")
    heldout = read_documents(tmp_path / "one", "heldout")
    assert heldout == read_documents(tmp_path / "two", "heldout")[::-1]
    assert 0.08 < len(heldout) / len(texts) < 0.12


def test_bpe_trains_on_the_first_bytes_of_the_training_split(tmp_path, monkeypatch):
    seen_texts = []

    def record_texts(spec, pattern, training_texts):
        seen_texts.extend(training_texts())
        return build_tokenizer(spec, pattern, training_texts)

    monkeypatch.setattr(prepare_run, "build_tokenizer", record_texts)
    texts = make_random_texts(1000)
    source = write_rows(tmp_path / "a.jsonl", texts)
    run_prepare(source, tmp_path / "out", heldout_fraction=0.2, bpe_train_bytes=20_000, tokenizer="bpe:260")
    train_text = "".join(text for text in texts if not is_heldout(text.encode(), fraction=0.2))
    assert "".join(seen_texts).encode() == train_text.encode()[: len("".join(seen_texts).encode())]
    assert 19_996 < len("".join(seen_texts).encode()) <= 20_000


def test_bad_rows_are_counted_and_too_many_are_an_error(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", make_random_texts(99))
    with open(source, "ab") as file:
        file.write(b'{"text": "\xff"}\n')
    assert run_prepare(source, tmp_path / "out", max_bad_rate=0.01).bad_rows == 1
    with pytest.raises(DataError, match=r"1 of 100 rows are bad(.|\n)*a\.jsonl:100: not UTF-8"):
        run_prepare(source, tmp_path / "out2", max_bad_rate=0.009)
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
        (["x"], {"separator": "x"}, "--separator: only for text files"),
        (["x"], {"part": "3/2"}, "--part 3/2"),
        (["x"], {"filter": ("gopher",)}, r"\(0 empty, 0 held out, 1 removed by rules\)"),
    ],
)
def test_a_failed_prepare_is_explained_and_leaves_no_files(texts, changes, message, tmp_path):
    source = changes.pop("source", (write_rows(tmp_path / "a.jsonl", texts),))
    with pytest.raises(DataError, match=message):
        run_prepare(source, tmp_path / "out", **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_overwrite_replaces_a_corpus_only_by_a_complete_corpus(tmp_path):
    source, out = write_rows(tmp_path / "a.jsonl", ["old"]), tmp_path / "out"
    run_prepare(source, out, heldout_fraction=0)
    before = read_all_files(out)
    with pytest.raises(DataError, match="--overwrite"):
        run_prepare(source, out)
    empty = write_rows(tmp_path / "b.jsonl", [])
    with pytest.raises(DataError, match="no text"):
        run_prepare(empty, out, overwrite=True)
    assert read_all_files(out) == before
    run_prepare(write_rows(tmp_path / "c.jsonl", ["new"]), out, overwrite=True, heldout_fraction=0)
    assert read_documents(out, "train") == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "c.jsonl", "out"]


def test_overwrite_never_deletes_other_directories(tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(DataError, match="not a prepared corpus"):
        run_prepare(write_rows(tmp_path / "a.jsonl", ["x"]), tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis").is_dir()


def test_a_run_killed_while_swapping_loses_nothing(tmp_path):
    source, out = write_rows(tmp_path / "a.jsonl", ["old"]), tmp_path / "out"
    run_prepare(source, out, heldout_fraction=0)
    out.rename(tmp_path / "out.old")
    with pytest.raises(DataError, match="--overwrite"):
        run_prepare(source, out)
    assert read_documents(out, "train") == ["old"]


def test_a_second_run_with_the_same_output_is_refused(tmp_path):
    source, out = write_rows(tmp_path / "a.jsonl", ["x"]), tmp_path / "out"
    with lock_output(out), pytest.raises(DataError, match="another prepare"):
        run_prepare(source, out)
    run_prepare(source, out, heldout_fraction=0)


def test_a_killed_run_leaves_no_corpus_and_no_process(tmp_path):
    source = write_megabytes(tmp_path / "a.jsonl", megabytes=20)
    out = tmp_path / "out"
    partial = tmp_path / "out.partial"
    with start_prepare(source, out) as process:
        wait_for(lambda: any(path.stat().st_size for path in partial.glob("train-*.bin")))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(process.pid, signal.SIGKILL)
    assert len(children) >= 2
    try:
        wait_for(lambda: not any(map(is_alive, children)), timeout_seconds=20)
    finally:
        for pid in filter(is_alive, children):
            os.kill(int(pid), signal.SIGKILL)
    assert not out.exists()
    assert not (partial / MANIFEST_FILE).exists()

    run_prepare(source, out, workers=2)
    assert sum(CorpusManifest.load(out).count_documents(split) for split in SPLITS) == count_rows(source)
    assert not partial.exists()


IDLE_WORKER_SCRIPT = """
import sys, time
from pathlib import Path
from dist_llm.text.chunks import Chunk
from dist_llm.text.encode import DocumentEncoderSpec, _Worker
worker = _Worker(DocumentEncoderSpec(Path(sys.argv[1])))
worker.submit(Chunk(["x"], ["f:1"]))
worker.collect()
print(worker._process.pid, flush=True)
time.sleep(60)
"""


def test_an_idle_worker_ends_with_its_parent(tmp_path):
    build_tokenizer("byte").save(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-c", IDLE_WORKER_SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        child = int(process.stdout.readline())
        process.kill()
    try:
        wait_for(lambda: not is_alive(child), timeout_seconds=20)
    finally:
        if is_alive(child):
            os.kill(child, signal.SIGKILL)


def test_memory_does_not_grow_with_the_source(tmp_path):
    peaks = []
    for megabytes in (10, 60):
        source = write_megabytes(tmp_path / f"{megabytes}.jsonl", megabytes)
        fields = {"tokenizer": "bpe:300", "bpe_train_bytes": 1_000_000, "shard_tokens": 5_000_000}
        stdout, stderr = start_prepare(source, tmp_path / str(megabytes), **fields).communicate()
        peaks.append([int(kib) / 1024 for kib in stdout.split()])
        assert len(peaks[-1]) == 2, stderr
    growth = [large - small for small, large in zip(*peaks, strict=True)]
    assert max(growth) < 12, f"peaks in MiB, parent and worker: {peaks}"


def test_a_full_disk_is_reported_and_leaves_no_files(tmp_path):
    source = write_megabytes(tmp_path / "a.jsonl", megabytes=1)
    process = start_prepare(source, tmp_path / "out", max_file_bytes=200_000)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert stderr.startswith(f"DataError: {tmp_path}/out.partial: cannot be written: File too large"), stderr
    assert "Exception ignored" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def make_chunks(count=8):
    """Yield `count` chunks, each of 2 MB of text."""
    return (Chunk(["x" * 2_000_000], [f"f:{index}"]) for index in range(count))


@pytest.mark.parametrize("delay_seconds", [0.0, 0.05, 0.3])
def test_a_killed_worker_is_an_error(delay_seconds, tmp_path):
    """The worker may be killed while it writes its result. A pipe that workers share would then block the reader."""
    other_children = set(multiprocessing.active_children())  # children of other tests
    build_tokenizer("byte").save(tmp_path)
    chunks = encode_in_order(make_chunks(40), DocumentEncoderSpec(tmp_path), workers=2)
    next(chunks)
    time.sleep(delay_seconds)
    next(child for child in multiprocessing.active_children() if child not in other_children).kill()
    with pytest.raises(DataError, match="--workers"):
        list(chunks)
    assert set(multiprocessing.active_children()) <= other_children


def test_the_number_of_chunks_in_flight_is_limited(tmp_path):
    build_tokenizer("byte").save(tmp_path)
    started_chunks = []

    def record_chunks():
        for chunk in make_chunks(20):
            started_chunks.append(chunk)
            yield chunk

    chunks = encode_in_order(record_chunks(), DocumentEncoderSpec(tmp_path), workers=2)
    next(chunks)
    assert len(started_chunks) <= 7
    chunks.close()


def test_an_error_in_a_worker_is_raised(tmp_path, monkeypatch):
    tokenizer = build_tokenizer("byte")
    monkeypatch.setattr(BPETokenizer, "encode", lambda self, text: 1 / 0)
    with pytest.raises(RuntimeError, match="f:0: cannot be tokenized"):
        DocumentEncoder(tokenizer, DocumentEncoderSpec(tmp_path))(next(make_chunks(1)))
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):  # a user error keeps its class
        list(encode_in_order(make_chunks(1), DocumentEncoderSpec(tmp_path / "gone"), workers=2))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_prepare_prints_progress_and_a_summary(is_terminal, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 0.0)
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    source = write_rows(tmp_path / "a.jsonl", ["", "abc"])
    with open(source, "a") as file:
        file.write("broken\n")
    options = PrepareOptions(
        source=(source,), tokenizer="byte", out=tmp_path / "out", workers=1, heldout_fraction=0, max_bad_rate=1
    )
    prepare(options, stream)
    output = stream.getvalue()
    assert ("100%, 0 s left, 1 documents" in output) is not is_terminal
    assert "1 documents, 4 tokens of 257 ids, 0.75 bytes per token, 1 shards, 0.00% held out, 1 bad rows" in output
    assert f"skipped {source}:3: not JSON" in output


def test_the_report_counts_the_input_files(tmp_path):
    folder, out, stream = tmp_path / "in", tmp_path / "out", io.StringIO()
    folder.mkdir()
    for name, content in {"a.txt": b"abc", "a.txt.md5": b"12", "b.txt": b"\xff" * 7, "c.zip": b"PK"}.items():
        (folder / name).write_bytes(content)
    options = PrepareOptions(
        source=(str(folder),), tokenizer="byte", out=out, workers=1, heldout_fraction=0, skip_unreadable=True
    )
    prepare(options, stream)
    report = PrepareReport.load(out)
    assert report.inputs == {
        "read": {".txt": FileCount(files=1, bytes=3)},
        "skipped: checksum": {".txt.md5": FileCount(files=1, bytes=2)},
        "skipped: unreadable": {".zip": FileCount(files=1, bytes=2), ".txt": FileCount(files=1, bytes=7)},
    }
    assert list(report.unreadable) == [str(folder / "b.txt")]
    lines = [line.split() for line in stream.getvalue().splitlines()]
    assert ["skipped:", "unreadable", ".txt", "1", "7"] in lines
    assert ["read", ".txt", "1", "3"] in lines
    total = PrepareReport({})
    total.add(PrepareReport.load(out))
    total.add(PrepareReport.load(out))
    assert (total.inputs, total.unreadable) == (report.inputs, report.unreadable), (
        "files that all parts read are counted twice"
    )


@pytest.mark.parametrize("separator", [None, "<|endoftext|>"])
def test_documents_that_may_need_a_separator_give_a_warning(separator, tmp_path):
    path, stream = tmp_path / "a.txt", io.StringIO()
    path.write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    options = PrepareOptions(
        source=(str(path),), tokenizer="byte", out=tmp_path / "out", workers=1, heldout_fraction=0, separator=separator
    )
    prepare(options, stream)
    warnings = PrepareReport.load(tmp_path / "out").warnings
    assert all(f"warning: {warning}" in stream.getvalue() for warning in warnings)
    if separator:
        assert (read_documents(tmp_path / "out", "train"), warnings) == (["one", "two"], [])
        return
    assert (
        f"--source {path} is a single document. If it is a text file that holds many, give --separator" in warnings[0]
    )
    assert f"1 documents contain <|endoftext|>, such as {path}: it is encoded as text" in warnings[1]


def test_sources_that_the_shell_expands_are_read_in_their_order(tmp_path):
    for index in range(3):
        write_rows(tmp_path / f"{index}.jsonl", [f"text {index}"] * 9)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    files = sorted(map(str, tmp_path.glob("*.jsonl")))
    arguments = ["--source", files[0], "--tokenizer", "byte", "--out", str(tmp_path / "out")]
    options = build_options(parser.parse_args(["--source", *files, *arguments]))
    assert options.source == (*files, files[0])


def test_a_finished_corpus_is_not_prepared_again(tmp_path):
    file, out = write_rows(tmp_path / "x.jsonl", make_random_texts(30)), tmp_path / "out"
    options = PrepareOptions(source=(file,), tokenizer="byte", out=out, workers=1)
    first_manifest = prepare(options, io.StringIO())
    mtime_by_file = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    output = io.StringIO()
    assert prepare(replace(options, workers=2), output) == first_manifest
    assert f"nothing to do: {out} was prepared with the same options" in output.getvalue()
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == mtime_by_file
    for changed_options in ({"heldout_fraction": 0.5}, {"text_key": "other"}):
        with pytest.raises(DataError, match=r"out: exists\. Choose another --out, or give --overwrite"):
            prepare(replace(options, **changed_options), io.StringIO())
    write_rows(tmp_path / "x.jsonl", make_random_texts(31))
    with pytest.raises(DataError, match="out: exists"):
        prepare(options, io.StringIO())
    assert prepare(replace(options, overwrite=True), io.StringIO()) != first_manifest


def test_the_reason_to_skip_a_file_does_not_make_a_corpus_another(tmp_path):
    """Versions of dist_llm name the reasons differently in report.json."""
    folder, out, output = tmp_path / "in", tmp_path / "out", io.StringIO()
    folder.mkdir()
    write_rows(folder / "x.jsonl", make_random_texts(30))
    (folder / "README").write_text("about the data")
    options = PrepareOptions(source=(str(folder),), tokenizer="byte", out=out, workers=1)
    manifest = prepare(options, io.StringIO())
    report = (out / "report.json").read_text()
    assert "skipped: README or LICENSE" in report
    (out / "report.json").write_text(report.replace("README or LICENSE", "about the data"))
    assert prepare(options, output) == manifest
    assert "nothing to do" in output.getvalue()


def test_build_options_parses_all_arguments():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    minimal = parser.parse_args(["--source", "a", "--source", "b", "--tokenizer", "byte", "--out", "o"])
    assert build_options(minimal) == PrepareOptions(source=("a", "b"), tokenizer="byte", out=Path("o"))
    arguments = ["--source=a", "--tokenizer=bpe:300", "--out=o", "--overwrite", "--workers=3", "--split-pattern=llama3"]
    arguments += ["--text-key=t", "--hf-split=s", "--heldout-fraction=0.5", "--shard-tokens=7", "--bpe-train-bytes=8"]
    arguments += ["--part=1/2", "--filter=c4", "--filter=gopher", "--dedup=near", "--dedup-threshold=0.7"]
    expected = PrepareOptions(
        source=("a",),
        tokenizer="bpe:300",
        out=Path("o"),
        split_pattern="llama3",
        text_key="t",
        hf_split="s",
        heldout_fraction=0.5,
        workers=3,
        shard_tokens=7,
        bpe_train_bytes=8,
        max_bad_rate=0.25,
        overwrite=True,
        part="1/2",
        filter=("c4", "gopher"),
        dedup="near",
        dedup_threshold=0.7,
    )
    assert build_options(parser.parse_args([*arguments, "--max-bad-rate=0.25"])) == expected
    arguments += ["--include=*.txt", "--exclude=a*", "--exclude=b*", "--skip-unreadable", "--max-bad-rate=0.25"]
    expected = replace(expected, include=("*.txt",), exclude=("a*", "b*"), skip_unreadable=True)
    assert build_options(parser.parse_args(arguments)) == expected
    assert build_options(parser.parse_args([*arguments, "--separator=x"])) == replace(expected, separator="x")
    assert "python-stdlib" in parser.format_help()


def test_the_help_text_imports_no_library():
    script = "import sys, dist_llm.text.options as o; assert not {'numpy', 'tiktoken', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
