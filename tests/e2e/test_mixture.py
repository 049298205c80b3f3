"""A run on two corpora follows its weights and stages on any world size, and `dist-llm data` shows its samples."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from . import commands
from .commands import REPOSITORY

STEPS = 12


@pytest.fixture(scope="module")
def mixture_overrides(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, ...]]:
    """Return a function that makes the overrides of a run on two corpora.

    `code` is the shared corpus. `qa` has short documents with prompts, whose tokens are not scored.
    """
    directory = tmp_path_factory.mktemp("qa")
    rows = [
        {"q": f"What is {number} plus {number}? ", "a": f"It is {2 * number}, as everybody knows."}
        for number in range(100)
    ]
    (directory / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(corpus, directory / "code")
    options = ("--source", "qa.jsonl", "--prompt-key", "q", "--text-key", "a", "--heldout-fraction", 0.3)
    commands.run("prepare", *options, "--tokenizer", "code", "--workers", 1, "--out", "qa", cwd=directory)

    def make_overrides(code: float = 3.0, qa: float = 1.0, **data_keys: object) -> tuple[str, ...]:
        sources = [
            f"{{name: {name}, path: {directory / name}, weight: {weight}}}"
            for name, weight in (("code", code), ("qa", qa))
        ]
        values = {"path": '""', "sources": f"[{', '.join(sources)}]", "global_batch": 12, "audit_every": 2, **data_keys}
        return tuple(f"data.{key}={value}" for key, value in values.items())

    return make_overrides


# The last stage begins after 6 steps of 12 sequences of 128 tokens.
STAGES = f"[{{from_tokens: {6 * 12 * 128}, weights: {{code: 0.0, qa: 1.0}}}}]"


@pytest.fixture(scope="module")
def mixed_run(
    corpus: Path, mixture_overrides: Callable[..., tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted run, whose last stage has no `code`."""
    overrides = mixture_overrides(stages=STAGES, skip="[[12, 18]]")
    return commands.train(
        tmp_path_factory.mktemp("mixed"), corpus, *overrides, f"run.steps={STEPS}", "checkpoint.every=4"
    )


def inspect(*arguments: object, succeed: bool = True) -> str:
    """Run `dist-llm data ARGUMENTS`; return stdout and stderr."""
    completed = commands.run("data", *arguments, cwd=REPOSITORY, succeed=succeed)
    assert (completed.returncode == 0) == succeed, completed.stdout + completed.stderr
    return completed.stdout + completed.stderr


def test_metrics_have_loss_and_tokens_of_each_source(mixed_run: Path) -> None:
    rows = commands.read_step_rows(mixed_run)
    for row in rows[:5]:
        assert {"loss_code", "tokens_code", "tokens_qa"} <= row.keys()
    assert all("loss_code" not in row for row in rows[7:]), "the last stage, whose weight of code is 0, read code"
    assert rows[-1]["tokens_code"] == rows[7]["tokens_code"]
    for previous, row in zip([{"tokens_code": 0, "tokens_qa": 0}, *rows], rows, strict=False):
        tokens_by_source = {name: row[f"tokens_{name}"] - previous[f"tokens_{name}"] for name in ("code", "qa")}
        mean = sum(row.get(f"loss_{name}", 0.0) * tokens for name, tokens in tokens_by_source.items()) / sum(
            tokens_by_source.values()
        )
        assert row["loss"] == pytest.approx(mean, rel=1e-5)
        assert tokens_by_source["qa"] == 0 or tokens_by_source["qa"] % 128, "prompts are scored"
    (heldout_row,) = [row for row in commands.read_all_rows(mixed_run) if "heldout_loss" in row]
    assert {"heldout_loss_code", "heldout_loss_qa"} <= heldout_row.keys()
    assert "heldout_bits_per_byte" not in heldout_row, "bits per byte are reported, although prompts are not scored"
    assert commands.read_progress(commands.find_latest_checkpoint(mixed_run))["samples"] == STEPS * 12 + 6, (
        "the skipped samples are not counted"
    )


def test_a_resume_on_other_world_sizes_reads_the_same_samples(
    mixed_run: Path, corpus: Path, mixture_overrides: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    """Four steps on four ranks, four on three and four on two, compared with all steps on one."""
    overrides = (*mixture_overrides(stages=STAGES, skip="[[12, 18]]"), "data.micro_batch=1", "schedule.decay_steps=12")
    for ranks, steps in ((4, 4), (3, 8), (2, 12)):
        run = commands.train(tmp_path, corpus, *overrides, f"run.steps={steps}", ranks=ranks)
    for name in ("loss", "tokens_code", "tokens_qa", "tokens"):
        expected, actual = (commands.get_column(commands.read_step_rows(run_dir), name) for run_dir in (mixed_run, run))
        assert actual == pytest.approx(expected, rel=1e-5)
    assert (run / "data.json").read_bytes() == (mixed_run / "data.json").read_bytes(), (
        "another world size changed the data history"
    )


def test_a_resume_accepts_other_weights_and_refuses_another_seed(
    mixed_run: Path, corpus: Path, mixture_overrides: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    shutil.copytree(mixed_run, tmp_path / "run")
    commands.train(tmp_path, corpus, *mixture_overrides(code=1.0, qa=1.0), "run.steps=13")
    history = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [segment["step"] for segment in history] == [0, STEPS]
    assert history[0] == json.loads((mixed_run / "data.json").read_text())[0]
    changed = commands.make_train_arguments(corpus, *mixture_overrides(code=1.0, qa=1.0), "run.steps=14", "run.seed=9")
    refused = commands.run(*changed, cwd=tmp_path, succeed=False)
    assert refused.returncode == 2
    assert "until step 13:\n  run.seed: 1 -> 9\nRestore it; or set data.on_change: new_segment" in refused.stderr
    commands.run(*changed, "data.on_change=new_segment", cwd=tmp_path)
    history = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [segment["step"] for segment in history] == [0, STEPS, 13]
    text = inspect("show", "--run", tmp_path / "run", "--step", 2)
    assert text == inspect("show", "--run", mixed_run, "--step", 2), "the samples of an earlier step changed"


def test_show_prints_the_samples_of_a_step(mixed_run: Path) -> None:
    text = inspect("show", "--run", mixed_run, "--step", 2, "--whole")
    samples = [int(number) for number in re.findall(r"^sample (\d+): (?:code|qa), causal$", text, re.MULTILINE)]
    assert samples == list(range(18, 30)), "the samples are not those after the skipped ones"
    halves = [
        inspect("show", "--run", mixed_run, "--step", 2, "--full-text", "--rank", rank, "--ranks", 2) for rank in (0, 1)
    ]
    assert "".join(halves) == text
    outside = inspect("show", "--run", mixed_run, "--step", 2, "--rank", 2, "--ranks", 2, succeed=False)
    assert "--rank 2: the data-parallel ranks are 0 to 1" in outside
    uneven = inspect("show", "--run", mixed_run, "--step", 2, "--rank", 0, "--ranks", 5, succeed=False)
    assert "the 12 samples of the step do not divide over 5 data-parallel ranks; give another --ranks" in uneven
    assert "is outside" not in text
    assert re.search(r"train-00000.bin, document \d+, tokens \d+ to \d+ of \d+ \(corpus \d+ to \d+\): ['\"]", text)


def test_find_lists_the_steps_that_read_a_text(mixed_run: Path) -> None:
    text = inspect("find", "What is 7 plus 7?", "--run", mixed_run)
    document = re.search(r"qa, train-00000.bin, (document \d+), corpus", text)
    assert document is not None
    steps = {int(step) for step in re.findall(r"step (\d+) \(was read\), sample \d+", text)}
    assert steps
    for step in (1, 5, 8, max(steps)):
        samples = inspect("show", "--run", mixed_run, "--step", step).split("\nsample ")
        is_shown = any(": qa," in sample and f"{document[1]}, tokens" in sample for sample in samples)
        assert is_shown == (step in steps), step
    assert "no document contains this text" in inspect(
        "find", "no such words anywhere", "--run", mixed_run, succeed=False
    )


def test_verify_finds_a_changed_byte_and_stats_draws_a_picture(mixed_run: Path, corpus: Path, tmp_path: Path) -> None:
    assert inspect("verify", "--run", mixed_run).count("all hashes, ids and document boundaries are correct") == 2
    broken = tmp_path / "broken"
    shutil.copytree(corpus, broken)
    offsets = bytearray((broken / "train-00000.offsets").read_bytes())
    offsets[8] ^= 1
    (broken / "train-00000.offsets").write_bytes(offsets)
    assert "a document" in inspect("verify", broken, succeed=False)
    shutil.copy(corpus / "train-00000.offsets", broken)
    ids = bytearray((broken / "train-00000.bin").read_bytes())
    ids[10] ^= 1
    (broken / "train-00000.bin").write_bytes(ids)
    assert "sha256" in inspect("verify", broken, succeed=False)
    text = inspect("stats", corpus, "--picture", tmp_path / "stats.png")
    assert re.search(r"bytes per token +│ +\d\.\d+", text)
    assert (tmp_path / "stats.png").read_bytes().startswith(b"\x89PNG")
