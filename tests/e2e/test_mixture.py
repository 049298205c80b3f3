"""Two corpora in one run: weights, stages, what is skipped, other world sizes, and the tool that looks at it."""

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
def keys(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, ...]]:
    """Overrides of a run on `code`, the shared corpus, and `qa`, a hundred short documents with prompts."""
    directory = tmp_path_factory.mktemp("qa")
    rows = [{"q": f"What is {n} plus {n}? ", "a": f"It is {2 * n}, as everybody knows."} for n in range(100)]
    (directory / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(corpus, directory / "code")
    asked = ("--source", "qa.jsonl", "--prompt-key", "q", "--text-key", "a", "--heldout-fraction", 0.3)
    commands.run("prepare", *asked, "--tokenizer", "code", "--workers", 1, "--out", "qa", cwd=directory)

    def make(code: float = 3.0, qa: float = 1.0, **more: object) -> tuple[str, ...]:
        sources = [
            f"{{name: {name}, path: {directory / name}, weight: {weight}}}"
            for name, weight in (("code", code), ("qa", qa))
        ]
        given = {"path": '""', "sources": f"[{', '.join(sources)}]", "global_batch": 12, "audit_every": 2, **more}
        return tuple(f"data.{key}={value}" for key, value in given.items())

    return make


@pytest.fixture(scope="module")
def mixed(corpus: Path, keys: Callable[..., tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained without a stop."""
    stages = f"[{{from_tokens: {6 * 12 * 128}, weights: {{code: 0.0, qa: 1.0}}}}]"
    given = keys(stages=stages, skip="[[12, 18]]")
    return commands.train(tmp_path_factory.mktemp("mixed"), corpus, *given, f"run.steps={STEPS}", "checkpoint.every=4")


def inspect(*arguments: object, succeed: bool = True) -> str:
    done = commands.run("data", *arguments, cwd=REPOSITORY, succeed=succeed)
    assert (done.returncode == 0) == succeed, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_each_source_has_its_loss_and_tokens(mixed: Path) -> None:
    rows = commands.metrics(mixed)
    for row in rows[:5]:
        assert {"loss_code", "tokens_code", "tokens_qa"} <= row.keys()
    assert all("loss_code" not in row for row in rows[7:]), "the last stage has no code in it"
    assert rows[-1]["tokens_code"] == rows[7]["tokens_code"]
    for before, row in zip([{"tokens_code": 0, "tokens_qa": 0}, *rows], rows, strict=False):
        parts = {name: row[f"tokens_{name}"] - before[f"tokens_{name}"] for name in ("code", "qa")}
        mean = sum(row.get(f"loss_{name}", 0.0) * tokens for name, tokens in parts.items()) / sum(parts.values())
        assert row["loss"] == pytest.approx(mean, rel=1e-5)
        assert parts["qa"] == 0 or parts["qa"] % 128, "prompts are not scored"
    (held,) = [row for row in commands.all_rows(mixed) if "heldout_loss" in row]
    assert {"heldout_loss_code", "heldout_loss_qa"} <= held.keys()
    assert "heldout_bits_per_byte" not in held, "prompts are part of the text, but not scored"
    assert commands.progress(commands.newest(mixed))["samples"] == STEPS * 12 + 6, "six were passed over"


def test_other_world_sizes_go_on_in_the_same_order(
    mixed: Path, corpus: Path, keys: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    """4 steps on four ranks, 4 on three, 4 on two, against all on one."""
    stages = f"[{{from_tokens: {6 * 12 * 128}, weights: {{code: 0.0, qa: 1.0}}}}]"
    given = (*keys(stages=stages, skip="[[12, 18]]"), "data.micro_batch=1", "schedule.decay_steps=12")
    for ranks, steps in ((4, 4), (3, 8), (2, 12)):
        run = commands.train(tmp_path, corpus, *given, f"run.steps={steps}", ranks=ranks)
    for name in ("loss", "tokens_code", "tokens_qa", "tokens"):
        want, got = (commands.column(commands.metrics(each), name) for each in (mixed, run))
        assert got == pytest.approx(want, rel=1e-5)
    assert (run / "data.json").read_bytes() == (mixed / "data.json").read_bytes(), "nothing changed: one segment"


def test_other_weights_go_on_and_another_seed_is_refused(
    mixed: Path, corpus: Path, keys: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    shutil.copytree(mixed, tmp_path / "run")
    commands.train(tmp_path, corpus, *keys(code=1.0, qa=1.0), "run.steps=13")
    history = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [segment["step"] for segment in history] == [0, STEPS]
    assert history[0] == json.loads((mixed / "data.json").read_text())[0]
    changed = commands.train_arguments(corpus, *keys(code=1.0, qa=1.0), "run.steps=14", "run.seed=9")
    refused = commands.run(*changed, cwd=tmp_path, succeed=False)
    assert refused.returncode == 2
    assert "until step 13:\n  run.seed: 1 -> 9\nRestore it; or set data.on_change: new_segment" in refused.stderr
    commands.run(*changed, "data.on_change=new_segment", cwd=tmp_path)
    history = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [segment["step"] for segment in history] == [0, STEPS, 13]
    text = inspect("show", "--run", tmp_path / "run", "--step", 2)
    assert text == inspect("show", "--run", mixed, "--step", 2), "the past is as it was"


def test_show_prints_what_the_step_read(mixed: Path) -> None:
    text = inspect("show", "--run", mixed, "--step", 2, "--whole")
    samples = [int(n) for n in re.findall(r"^sample (\d+): (?:code|qa), causal$", text, re.MULTILINE)]
    assert samples == list(range(18, 30)), "those after the skipped ones"
    halves = [inspect("show", "--run", mixed, "--step", 2, "--whole", "--rank", n, "--ranks", 2) for n in (0, 1)]
    assert "".join(halves) == text
    assert "is outside" not in text
    assert re.search(r"train-00000.bin, document \d+, tokens \d+ to \d+ of \d+ \(corpus \d+ to \d+\): ['\"]", text)


def test_find_names_the_steps_that_show_the_text(mixed: Path) -> None:
    text = inspect("find", "What is 7 plus 7?", "--run", mixed)
    document = re.search(r"qa, train-00000.bin, (document \d+), corpus", text)
    assert document is not None
    steps = {int(step) for step in re.findall(r"step (\d+) \(was read\), sample \d+", text)}
    assert steps
    for step in (1, 5, 8, max(steps)):
        samples = inspect("show", "--run", mixed, "--step", step).split("\nsample ")
        shown = any(": qa," in sample and f"{document[1]}, tokens" in sample for sample in samples)
        assert shown == (step in steps), step
    assert "no document contains this text" in inspect("find", "no such words anywhere", "--run", mixed, succeed=False)


def test_verify_and_stats(mixed: Path, corpus: Path, tmp_path: Path) -> None:
    assert inspect("verify", "--run", mixed).count("all hashes, ids and document boundaries are correct") == 2
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
