"""A run that was cut off goes on to the bytes of an undisturbed one, and uses what was done only while it holds."""

import os
import signal
from pathlib import Path

import pytest

from dist_llm.data.shard import MANIFEST
from dist_llm.errors import DataError
from dist_llm.text import chunks, input_files
from dist_llm.text.journal import JOURNAL_FILE, Journal
from dist_llm.text.vocabulary import build_tokenizer
from tests.text.test_filters import prose
from tests.text.test_prepare import all_files, random_texts, run, start, wait_for, write_rows
from tests.text.test_scale import write_files


@pytest.fixture
def small_marks(monkeypatch):
    """A mark at the end of each input file of more than a hundred characters."""
    monkeypatch.setattr(chunks, "RESUME_POINT_CHARS", 100)


class CutOffError(Exception):
    """The run ends here."""


def cut_off(monkeypatch, after):
    """Let a run fail when it opens its input file number `after`; returns the files opened, later ones included."""
    opened, real = [], input_files.read_file

    def read_file(path, text_key, tally):
        if len(opened) == after:
            raise CutOffError
        opened.append(path.name)
        return real(path, text_key, tally)

    monkeypatch.setattr(input_files, "read_file", read_file)
    return opened


OPTIONS = (
    {},
    {"shard_tokens": 700},
    {"dedup": "exact", "filter": ("gopher", "c4")},
    {"dedup": "near", "shard_tokens": 2000},
    {"part": "1/2", "dedup": "exact"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_run_that_was_cut_off_goes_on_to_the_same_bytes(after, options, small_marks, tmp_path, monkeypatch):
    texts = [prose(seed=n % 40) for n in range(60)]
    source = write_files(tmp_path / "in", [*texts, "broken"], 6)
    options = {**options, "heldout_fraction": 0.2}
    run(source, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        cut_off(patch, after)
        with pytest.raises(CutOffError):
            run(source, tmp_path / "out", **options)
    opened = cut_off(monkeypatch, None)
    run(source, tmp_path / "out", **options)
    assert opened == [f"{number:02d}.jsonl" for number in range(after, 6)]
    place = Path("part-1-of-2" if "part" in options else "")
    assert all_files(tmp_path / "out" / place) == all_files(tmp_path / "whole" / place)


def cut_and_resume(tmp_path, monkeypatch, between, tokenizer="bpe:300", **changes):
    """Names of the input files read by a run that goes on after one that had done three of six, and its corpus."""
    source = write_files(tmp_path / "in", random_texts(120), 6)
    with monkeypatch.context() as patch:
        cut_off(patch, 15 if tokenizer == "bpe:300" else 3)  # training has read all six twice before
        with pytest.raises(CutOffError):
            run(source, tmp_path / "out", tokenizer=tokenizer)
    between(tmp_path)
    with monkeypatch.context() as patch:
        opened = cut_off(patch, None)
        run(source, tmp_path / "out", **{"tokenizer": tokenizer, **changes})
    run(source, tmp_path / "fresh", **{"tokenizer": tokenizer, **changes})
    assert all_files(tmp_path / "out") == all_files(tmp_path / "fresh")
    assert not (tmp_path / "out.partial").exists()
    return [int(name[:2]) for name in opened]


def append_row(name):
    def change(tmp_path):
        with (tmp_path / "in" / name).open("a") as file:
            file.write('{"text": "one more"}\n')

    return change


def damage(pattern):
    def change(tmp_path):
        path = next((tmp_path / "out.partial").glob(pattern))
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(content)

    return change


def tear(tmp_path):
    path = tmp_path / "out.partial" / JOURNAL_FILE
    path.write_bytes(path.read_bytes()[:-7])


def stray(tmp_path):
    """A shard begun after the last record, which the run that goes on may never reach."""
    (tmp_path / "out.partial" / "train-00009.bin").write_bytes(b"stray")
    (tmp_path / "out.partial" / MANIFEST).write_bytes(b"from a run killed at its very end")


ALL = [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("between", "changes", "read"),
    [
        (lambda tmp_path: None, {}, [3, 4, 5]),
        (lambda tmp_path: None, {"workers": 2, "max_bad_rate": 0.5}, [3, 4, 5]),
        (append_row("04.jsonl"), {}, [3, 4, 5]),
        (append_row("01.jsonl"), {}, [1, 2, 3, 4, 5]),
        (append_row("00.jsonl"), {}, ALL),
        (lambda tmp_path: None, {"heldout_fraction": 0.3}, ALL),
        (lambda tmp_path: None, {"shard_tokens": 500}, ALL),
        (lambda tmp_path: None, {"dedup": "exact"}, ALL),
        (damage("train*.bin"), {}, ALL),
        (damage("train*.offsets"), {}, ALL),
        (damage(JOURNAL_FILE), {}, ALL),
        (tear, {}, [2, 3, 4, 5]),
        (stray, {}, [3, 4, 5]),
    ],
)
def test_what_is_done_is_used_only_while_it_holds(between, changes, read, small_marks, tmp_path, monkeypatch):
    assert cut_and_resume(tmp_path, monkeypatch, between, tokenizer="byte", **changes) == read


def test_another_tokenizer_under_the_same_name_starts_over(small_marks, tmp_path, monkeypatch):
    def retrain(tmp_path):
        build_tokenizer("bpe:300", None, lambda: random_texts(100)).save(tmp_path)

    build_tokenizer("byte", None, list).save(tmp_path)
    assert cut_and_resume(tmp_path, monkeypatch, retrain, tokenizer=str(tmp_path)) == ALL


def test_bpe_is_trained_once(small_marks, tmp_path, monkeypatch):
    assert cut_and_resume(tmp_path, monkeypatch, lambda path: None) == [3, 4, 5]


def test_bpe_is_trained_again_when_a_file_changed(small_marks, tmp_path, monkeypatch):
    read = cut_and_resume(tmp_path, monkeypatch, append_row("05.jsonl"))
    assert read == 3 * ALL  # twice for training


def test_an_error_keeps_what_is_done_and_says_so(small_marks, tmp_path):
    source = write_files(tmp_path / "in", random_texts(60), 3)
    with (tmp_path / "in" / "02.jsonl").open("a") as file:
        file.write("broken\n" * 3)
    with pytest.raises(DataError, match=r"3 of 63 rows are bad(.|\n)*are kept in .*out\.partial: mend this and run"):
        run(source, tmp_path / "out")
    assert Journal(tmp_path / "out.partial").has_records
    assert not (tmp_path / "out.partial" / MANIFEST).exists()
    assert run(source, tmp_path / "out", max_bad_rate=0.1).bad_rows == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_run_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path):
    """kill -9, on real processes with two workers, when it has come a bit further; then a run to the end."""
    (tmp_path / "in").mkdir()
    for number in range(8):
        write_rows(tmp_path / "in" / f"{number}.jsonl", 3 * random_texts(2000, words=200, seed=number))
    source, out, partial = str(tmp_path / "in"), tmp_path / "out", tmp_path / "out.partial"
    done = 0
    for _ in range(3):
        with start(source, out, resume_point_chars=100_000) as process:
            wait_for(lambda done=done: len(Journal(partial).read()) > done + 1)
            os.kill(process.pid, signal.SIGKILL)
        done = len(Journal(partial).read()) - 1
        assert not out.exists()
        assert not (partial / MANIFEST).exists()
    assert 3 <= done < 8
    _, stderr = start(source, out, resume_point_chars=100_000).communicate()
    assert f"going on after {done} of 8 input files" in stderr
    run(source, tmp_path / "whole")
    assert all_files(out) == all_files(tmp_path / "whole")
