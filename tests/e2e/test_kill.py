"""A run that is killed twice (`kill -9`) ends with the weights and metrics of an uninterrupted run, bit for bit."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from . import commands
from .compare_runs import assert_same_metrics, assert_same_weights
from .conftest import EXPERTS, ONE_PROCESS, REPLICATED, SHARDED, Layout


@pytest.mark.timeout(600)  # three runs, each with its own limit
@pytest.mark.parametrize(
    "layout", [ONE_PROCESS, pytest.param(REPLICATED, marks=pytest.mark.slow), SHARDED, EXPERTS], ids=str
)
def test_a_run_killed_twice_ends_with_equal_results(
    layout: Layout, uninterrupted_run: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (7, 13):
        arguments = commands.make_train_arguments(corpus, *layout.overrides, f"checkpoint.every={step}")
        checkpoint = run / "checkpoints" / f"step_{step:08d}"

        def has_run_two_steps_after_checkpoint(checkpoint: Path = checkpoint, step: int = step) -> bool:
            if not (checkpoint / "COMMITTED").exists():
                return False
            return len((run / "metrics.jsonl").read_text().splitlines()) >= step + 2

        commands.kill_when(has_run_two_steps_after_checkpoint, arguments, ranks=layout.ranks, cwd=tmp_path)
        assert commands.find_latest_checkpoint(run) == checkpoint, (
            "the process was killed after the next checkpoint, so this kill tests nothing"
        )
        assert len(commands.read_step_rows(run)) > step, "no step will be computed again, so the kill tests nothing"
    resumed = commands.run(*commands.make_train_arguments(corpus, *layout.overrides), ranks=layout.ranks, cwd=tmp_path)
    assert "resumed from run/checkpoints/step_00000013" in resumed.stderr

    expected = uninterrupted_run(layout)
    assert_same_metrics(run, expected, names=("step", "loss", "grad_norm", "lr", "tokens"))
    assert_same_weights(run, expected)
    assert commands.read_progress(commands.find_latest_checkpoint(run)) == commands.read_progress(
        commands.find_latest_checkpoint(expected)
    )
    assert read_tensorboard_steps(run) == list(range(1, 21)), "a step is missing or repeated in the TensorBoard curve"


def test_an_incomplete_checkpoint_is_ignored_and_removed(corpus: Path, tmp_path: Path) -> None:
    """The marker is the file COMMITTED. The next save removes directories without it."""
    run = commands.train(tmp_path, corpus, "run.steps=2")
    for incomplete in ("step_00000003", "step_00000004"):
        shutil.copytree(commands.find_latest_checkpoint(run), run / "checkpoints" / incomplete)
        (run / "checkpoints" / incomplete / "COMMITTED").unlink()

    resumed = commands.run(*commands.make_train_arguments(corpus, "run.steps=5"), cwd=tmp_path)

    assert "resumed from run/checkpoints/step_00000002" in resumed.stderr
    assert commands.get_column(commands.read_step_rows(run), "step") == [1, 2, 3, 4, 5]
    assert not (run / "checkpoints" / "step_00000003").exists()


def read_tensorboard_steps(run: Path) -> list[int]:
    """Return the steps of the loss curve in TensorBoard, in the order in which they were written."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]
