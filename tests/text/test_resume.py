"""An interrupted `prepare` resumes and writes the same bytes as an uninterrupted run. It reuses only valid work."""

import os
import signal
from pathlib import Path

import pytest

from dist_llm.data.shard import MANIFEST_FILE
from dist_llm.errors import DataError
from dist_llm.text import chunks, inputs
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.text.journal import JOURNAL_FILE, Journal
from tests.text.prepare_runs import (
    make_prose,
    make_random_texts,
    read_all_files,
    run_prepare,
    start_prepare,
    wait_for,
    write_files,
    write_rows,
)


@pytest.fixture
def frequent_resume_points(monkeypatch):
    """Set a resume point after each input file. The input files of these tests have more than 100 characters."""
    monkeypatch.setattr(chunks, "RESUME_POINT_CHARS", 100)


class InterruptedRunError(Exception):
    """Interrupts a run."""


def record_opened_files(monkeypatch):
    """Record the input files of the next runs. Return the list of their names, which grows as runs open files."""
    opened, original_read_file = [], inputs.read_file

    def read_file(path, row_format, row_tracker):
        opened.append(path.name)
        return original_read_file(path, row_format, row_tracker)

    monkeypatch.setattr(inputs, "read_file", read_file)
    return opened


def interrupt_after(monkeypatch, num_files):
    """Let the next run fail when it opens an input file after the first `num_files`."""
    opened = record_opened_files(monkeypatch)
    read_file = inputs.read_file

    def read_file_or_fail(path, row_format, row_tracker):
        if len(opened) == num_files:
            raise InterruptedRunError
        return read_file(path, row_format, row_tracker)

    monkeypatch.setattr(inputs, "read_file", read_file_or_fail)


PREPARE_OPTIONS = (
    {},
    {"shard_tokens": 700},
    {"dedup": "exact", "filter": ("gopher", "c4")},
    {"dedup": "near", "shard_tokens": 2000},
    {"part": "1/2", "dedup": "exact"},
)


@pytest.mark.parametrize("options", PREPARE_OPTIONS, ids=str)
@pytest.mark.parametrize("num_files", [1, 3, 5])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    num_files, options, frequent_resume_points, tmp_path, monkeypatch
):
    texts = [make_prose(seed=number % 40) for number in range(60)]  # the last 20 texts are duplicates
    source = write_files(tmp_path / "in", [*texts, "broken"], num_files=6)
    options = {**options, "heldout_fraction": 0.2}
    run_prepare(source, tmp_path / "uninterrupted", **options)
    with monkeypatch.context() as patch:
        interrupt_after(patch, num_files=num_files)
        with pytest.raises(InterruptedRunError):
            run_prepare(source, tmp_path / "out", **options)
    opened = record_opened_files(monkeypatch)
    run_prepare(source, tmp_path / "out", **options)
    assert opened == [f"{index:02d}.jsonl" for index in range(num_files, 6)]
    subdirectory = Path("part-1-of-2" if "part" in options else "")
    assert read_all_files(tmp_path / "out" / subdirectory) == read_all_files(tmp_path / "uninterrupted" / subdirectory)


def interrupt_and_resume(tmp_path, monkeypatch, edit, tokenizer="bpe:300", **changes):
    """Interrupt a run after files 0, 1 and 2 of six, call `edit` with the directory, and resume the run.

    `changes` are options of the resumed run. Return the indices of the input files that the resumed run reads: files 3
    to 5 if all earlier work is reused.
    """
    source = write_files(tmp_path / "in", make_random_texts(120), num_files=6)
    with monkeypatch.context() as patch:
        # Before it encodes the files, a run trains BPE, which reads all six files twice.
        interrupt_after(patch, num_files=2 * 6 + 3 if tokenizer == "bpe:300" else 3)
        with pytest.raises(InterruptedRunError):
            run_prepare(source, tmp_path / "out", tokenizer=tokenizer)
    edit(tmp_path)
    with monkeypatch.context() as patch:
        opened = record_opened_files(patch)
        run_prepare(source, tmp_path / "out", **{"tokenizer": tokenizer, **changes})
    run_prepare(source, tmp_path / "fresh", **{"tokenizer": tokenizer, **changes})
    assert read_all_files(tmp_path / "out") == read_all_files(tmp_path / "fresh")
    assert not (tmp_path / "out.partial").exists()
    return [int(name[:2]) for name in opened]


def build_row_edit(name):
    """Return an edit that appends a row to an input file."""

    def append_row(tmp_path):
        with (tmp_path / "in" / name).open("a") as file:
            file.write('{"text": "one more"}\n')

    return append_row


def build_damage_edit(pattern):
    """Return an edit that flips a bit of a file of the partial corpus."""

    def damage_file(tmp_path):
        path = next((tmp_path / "out.partial").glob(pattern))
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(content)

    return damage_file


def truncate_journal(tmp_path):
    """Remove the end of the last line of the journal, as after a crash."""
    path = tmp_path / "out.partial" / JOURNAL_FILE
    path.write_bytes(path.read_bytes()[:-7])


def write_stray_files(tmp_path):
    """Write a shard and a manifest that the journal does not mention. They must not be in the resumed corpus."""
    (tmp_path / "out.partial" / "train-00009.bin").write_bytes(b"stray")
    (tmp_path / "out.partial" / MANIFEST_FILE).write_bytes(b"from a run killed at its very end")


ALL_FILES = [0, 1, 2, 3, 4, 5]
REMAINING_FILES = [3, 4, 5]  # those after the interruption


@pytest.mark.parametrize(
    ("edit", "changed_options", "files_read"),
    [
        (lambda tmp_path: None, {}, REMAINING_FILES),
        (lambda tmp_path: None, {"workers": 2, "max_bad_rate": 0.5}, REMAINING_FILES),
        (build_row_edit("04.jsonl"), {}, REMAINING_FILES),
        (build_row_edit("01.jsonl"), {}, [1, 2, 3, 4, 5]),
        (build_row_edit("00.jsonl"), {}, ALL_FILES),
        (lambda tmp_path: None, {"heldout_fraction": 0.3}, ALL_FILES),
        (lambda tmp_path: None, {"shard_tokens": 500}, ALL_FILES),
        (lambda tmp_path: None, {"dedup": "exact"}, ALL_FILES),
        (build_damage_edit("train*.bin"), {}, ALL_FILES),
        (build_damage_edit("train*.offsets"), {}, ALL_FILES),
        (build_damage_edit(JOURNAL_FILE), {}, ALL_FILES),
        (truncate_journal, {}, [2, 3, 4, 5]),
        (write_stray_files, {}, REMAINING_FILES),
    ],
)
def test_earlier_work_is_reused_only_while_it_is_valid(
    edit, changed_options, files_read, frequent_resume_points, tmp_path, monkeypatch
):
    assert interrupt_and_resume(tmp_path, monkeypatch, edit, tokenizer="byte", **changed_options) == files_read


def test_another_tokenizer_with_the_same_name_starts_over(frequent_resume_points, tmp_path, monkeypatch):
    def retrain(tmp_path):
        build_tokenizer("bpe:300", training_texts=lambda: make_random_texts(100)).save(tmp_path)

    build_tokenizer("byte").save(tmp_path)
    assert interrupt_and_resume(tmp_path, monkeypatch, retrain, tokenizer=str(tmp_path)) == ALL_FILES


def test_bpe_is_trained_once(frequent_resume_points, tmp_path, monkeypatch):
    assert interrupt_and_resume(tmp_path, monkeypatch, lambda path: None) == REMAINING_FILES


def test_bpe_is_trained_again_if_a_file_changed(frequent_resume_points, tmp_path, monkeypatch):
    files_read = interrupt_and_resume(tmp_path, monkeypatch, build_row_edit("05.jsonl"))
    assert files_read == 3 * ALL_FILES  # training reads the files twice, then they are encoded


def test_an_error_keeps_the_finished_work(frequent_resume_points, tmp_path):
    source = write_files(tmp_path / "in", make_random_texts(60), num_files=3)
    with (tmp_path / "in" / "02.jsonl").open("a") as file:
        file.write("broken\n" * 3)
    with pytest.raises(DataError, match=r"3 of 63 rows are bad(.|\n)*are kept in .*out\.partial: fix this and run"):
        run_prepare(source, tmp_path / "out")
    assert Journal(tmp_path / "out.partial").has_records
    assert not (tmp_path / "out.partial" / MANIFEST_FILE).exists()
    assert run_prepare(source, tmp_path / "out", max_bad_rate=0.1).bad_rows == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    """Kill a run with two workers three times, each time a little later. Then let it end."""
    (tmp_path / "in").mkdir()
    for number in range(8):
        write_rows(tmp_path / "in" / f"{number}.jsonl", 3 * make_random_texts(2000, max_words=200, seed=number))
    source, out, partial = str(tmp_path / "in"), tmp_path / "out", tmp_path / "out.partial"
    num_done = 0  # records of finished input files; the first line of the journal is its header
    for _ in range(3):
        with start_prepare(source, out, resume_point_chars=100_000) as process:
            wait_for(lambda num_done=num_done: len(Journal(partial).read()) > num_done + 1)
            os.kill(process.pid, signal.SIGKILL)
        num_done = len(Journal(partial).read()) - 1
        assert not out.exists()
        assert not (partial / MANIFEST_FILE).exists()
    assert 3 <= num_done < 8
    _, stderr = start_prepare(source, out, resume_point_chars=100_000).communicate()
    assert f"resuming after {num_done} of 8 input files" in stderr
    run_prepare(source, tmp_path / "uninterrupted")
    assert read_all_files(out) == read_all_files(tmp_path / "uninterrupted")
