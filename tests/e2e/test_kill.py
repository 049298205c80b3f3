"""20 steps straight, and 7 + 6 + 7 with `kill -9` between: the same bits."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dist_llm.generate import load_model

from . import commands
from .conftest import ONE, REPLICATED, SHARDED, Layout


@pytest.mark.timeout(600)  # three processes, each with its own limit
@pytest.mark.parametrize("layout", [ONE, REPLICATED, SHARDED], ids=str)
def test_a_run_killed_twice_ends_with_the_same_bits(
    layout: Layout, straight: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (7, 13):
        arguments = commands.train_arguments(corpus, *layout.overrides, f"checkpoint.every={step}")
        saved = run / "checkpoints" / f"step_{step:08d}"

        def two_steps_later(saved: Path = saved, step: int = step) -> bool:
            return (saved / "COMMITTED").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= step + 2

        commands.kill_when(two_steps_later, arguments, layout.ranks, tmp_path)
        assert commands.newest(run) == saved, "the kill came too late to prove anything"
        assert len(commands.metrics(run)) > step, "some steps have to be taken again"
    resumed = commands.run(*commands.train_arguments(corpus, *layout.overrides), ranks=layout.ranks, cwd=tmp_path)
    assert "resumed from run/checkpoints/step_00000013" in resumed.stderr

    want = straight(layout)
    for name in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert commands.column(commands.metrics(run), name) == commands.column(commands.metrics(want), name), name
    assert_same_weights(run, want)
    assert commands.progress(commands.newest(run)) == commands.progress(commands.newest(want))
    assert tensorboard_steps(run) == list(range(1, 21)), "a curve shows each step once"


def test_what_a_kill_in_the_middle_of_a_save_leaves_is_passed_over(corpus: Path, tmp_path: Path) -> None:
    """A directory without its marker is not taken for a checkpoint, and goes when the next one is there."""
    run = commands.train(tmp_path, corpus, "run.steps=2")
    for leftover in ("step_00000003", "step_00000004"):
        shutil.copytree(commands.newest(run), run / "checkpoints" / leftover)
        (run / "checkpoints" / leftover / "COMMITTED").unlink()

    resumed = commands.run(*commands.train_arguments(corpus, "run.steps=5"), cwd=tmp_path)

    assert "resumed from run/checkpoints/step_00000002" in resumed.stderr
    assert commands.column(commands.metrics(run), "step") == [1, 2, 3, 4, 5]
    assert not (run / "checkpoints" / "step_00000003").exists()


def assert_same_weights(run: Path, want: Path) -> None:
    cpu = torch.device("cpu")
    got_model, want_model = load_model(run, cpu)[0], load_model(want, cpu)[0]
    want_weights = dict(want_model.named_parameters())
    assert len(want_weights) > 10
    for name, weight in got_model.named_parameters():
        assert torch.equal(weight, want_weights[name]), name


def tensorboard_steps(run: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]
