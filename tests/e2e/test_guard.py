"""The guard handles a bad step by its policy: it rewinds and skips samples, or skips the update, or ends the run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from . import commands
from .compare_runs import assert_same_weights
from .conftest import ONE_PROCESS, SHARDED, Layout
from .faults import NO_FAULT, Fault, start_with_fault, train_with_fault, wait_for_end

REWIND = ("guard.not_finite=rewind", "checkpoint.every=4", "log.every=3")


def read_losses(run: Path) -> list[float]:
    """Return the losses of all steps, each of which must have one row."""
    rows = commands.read_step_rows(run)
    assert commands.get_column(rows, "step") == list(range(1, len(rows) + 1)), "a step is missing or repeated"
    values: list[float] = commands.get_column(rows, "loss")
    return values


def read_events(run: Path) -> list[tuple[int, str]]:
    """Return (step, message) of each event that the guard has logged."""
    return [(row["step"], row["event"]) for row in commands.read_all_rows(run) if "event" in row]


def train_skipping(corpus: Path, cwd: Path, ranges: list[list[int]], *overrides: object, ranks: int = 0) -> Path:
    """Train without these ranges of samples (data.skip) and return the run directory."""
    return commands.train(cwd, corpus, f"data.skip={json.dumps(ranges)}", *overrides, ranks=ranks)


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_rewound_run_equals_one_that_never_read_the_samples(ranks: int, corpus: Path, tmp_path: Path) -> None:
    layout = SHARDED.overrides if ranks else ()
    output = train_with_fault(Fault("nan", rank=0, step=11), corpus, tmp_path, *REWIND, *layout, ranks=ranks)
    run = tmp_path / "run"
    batch = yaml.safe_load((run / "config.yaml").read_text())["data"]["global_batch"]
    skipped_range = [10 * batch, 11 * batch]
    message = f"step 11: the loss is nan; rewound to step 8, samples {10 * batch} to {11 * batch - 1}"
    assert read_events(run) == [(8, f"{message} are skipped")]
    assert message in output
    (tmp_path / "reference").mkdir()
    reference = train_skipping(corpus, tmp_path / "reference", [skipped_range], *layout, ranks=ranks)
    assert read_losses(run) == read_losses(reference)
    assert_same_weights(run, reference)
    progress = json.loads((commands.find_latest_checkpoint(run) / "progress.json").read_text())
    assert (progress["guard"]["num_used"], progress["guard"]["left_out"]) == (1, [skipped_range])
    assert progress["samples"] == commands.read_progress(commands.find_latest_checkpoint(reference))["samples"]


def test_a_machine_fault_skips_no_samples(corpus: Path, tmp_path: Path, uninterrupted_run: Any) -> None:
    """With skip_steps 0 the run repeats the samples. Before the first periodic checkpoint it rewinds to step 0."""
    output = train_with_fault(Fault("nan", rank=0, step=3), corpus, tmp_path, *REWIND, "guard.skip_steps=0")
    assert "rewound to step 0, to repeat the same samples" in output
    assert read_losses(tmp_path / "run") == read_losses(uninterrupted_run(ONE_PROCESS))
    assert_same_weights(tmp_path / "run", uninterrupted_run(ONE_PROCESS))


@pytest.mark.slow
def test_samples_stay_skipped_after_a_stop(corpus: Path, tmp_path: Path) -> None:
    """The run rewinds, then stops before the samples to skip. A resume skips them."""
    options = (*REWIND, "log.every=20")
    code, output, _ = wait_for_end(
        start_with_fault(Fault("nan+usr1", rank=0, step="12+10"), corpus, tmp_path, *options, ranks=0),
        timeout_seconds=120,
    )
    assert code == 138, output
    run = tmp_path / "run"
    batch = yaml.safe_load((run / "config.yaml").read_text())["data"]["global_batch"]
    assert commands.find_latest_checkpoint(run).name in ("step_00000010", "step_00000011")
    commands.run(*commands.make_train_arguments(corpus, *options), cwd=tmp_path)
    (tmp_path / "reference").mkdir()
    reference = train_skipping(corpus, tmp_path / "reference", [[11 * batch, 12 * batch]])
    assert read_losses(run) == read_losses(reference)
    assert_same_weights(run, reference)


def test_a_skipped_step_still_consumes_its_samples(corpus: Path, tmp_path: Path) -> None:
    output = train_with_fault(
        Fault("nan_gradient", rank=1, step=7), corpus, tmp_path, "guard.not_finite=skip", *SHARDED.overrides, ranks=2
    )
    run = tmp_path / "run"
    assert read_events(run) == [(7, "step 7: the gradient's norm is nan; its update was skipped")]
    assert "its update was skipped" in output
    rows = commands.read_step_rows(run)
    assert [row["step"] for row in rows if not math.isfinite(row["grad_norm"])] == [7]
    assert all(math.isfinite(loss) for loss in read_losses(run))


def test_a_spike_is_rewound(corpus: Path, tmp_path: Path) -> None:
    options = ("guard.spike=rewind", "guard.window=4", "guard.spike_z=20", "checkpoint.every=4")
    train_with_fault(Fault("random_targets", rank=0, step=15), corpus, tmp_path, *options)
    ((step, event),) = read_events(tmp_path / "run")
    assert step == 12
    assert event.startswith("step 15: a loss of ")
    assert max(read_losses(tmp_path / "run")[8:]) < read_losses(tmp_path / "run")[0]


REPLICATED = ("parallel.dp_replicate=2", "parallel.dp_shard=1")


@pytest.mark.parametrize("policy", [pytest.param("stop", marks=pytest.mark.slow), "rewind"])
def test_a_flipped_bit_in_one_replica_is_never_saved(
    policy: str, corpus: Path, tmp_path: Path, uninterrupted_run: Any
) -> None:
    options = (*REPLICATED, f"guard.corrupt={policy}", "checkpoint.every=4", "guard.digest_every=7")
    code, output, remaining = wait_for_end(
        start_with_fault(Fault("flip", rank=1, step=10), corpus, tmp_path, *options), timeout_seconds=120
    )
    assert not remaining
    message = "step 12: ranks do not agree: embed.tokens.weight: differs on rank 0, 1 of ranks 0, 1"
    assert message in output
    if policy == "stop":
        assert code == 1
        assert commands.find_latest_checkpoint(tmp_path / "run").name == "step_00000008"
        assert "take out the faulty machine" in output
        return
    assert code == 0, output
    assert read_events(tmp_path / "run")[0][0] == 8
    expected = uninterrupted_run(Layout(ranks=2, overrides=("parallel.dp_replicate=2",)))
    assert read_losses(tmp_path / "run") == read_losses(expected)
    assert_same_weights(tmp_path / "run", expected)


@pytest.mark.slow
def test_a_step_whose_replay_differs_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    options = ("guard.replay_every=5", "guard.digest_every=0", *SHARDED.overrides)
    code, output, remaining = wait_for_end(
        start_with_fault(Fault("wrong_block", rank=1, step=10), corpus, tmp_path, *options), timeout_seconds=120
    )
    assert (code, remaining) == (1, []), output
    assert "step 10: ranks do not agree: a step computed twice has different gradients" in output
    assert "resumed" not in output
    (tmp_path / "healthy").mkdir()
    commands.train(tmp_path / "healthy", corpus, *options, ranks=2)
    assert read_losses(tmp_path / "healthy" / "run")[:9] == read_losses(tmp_path / "run")[:9], (
        "replays changed the losses"
    )


def test_the_budget_ends_a_run_with_endless_bad_steps(corpus: Path, tmp_path: Path) -> None:
    options = ("guard.not_finite=rewind", "guard.budget=3", "checkpoint.every=2")
    code, output, _ = wait_for_end(
        start_with_fault(Fault("nan_always", rank=0, step=5), corpus, tmp_path, *options, ranks=0), timeout_seconds=120
    )
    assert code == 2, output
    assert "step 5: the loss is nan, and guard.budget of 3 bad steps is used up" in output
    assert commands.find_latest_checkpoint(tmp_path / "run").name == "step_00000004"
    assert len(read_events(tmp_path / "run")) == 3


def test_a_slow_rank_is_named(corpus: Path, tmp_path: Path) -> None:
    output = train_with_fault(
        Fault("slow", rank=1, step=0), corpus, tmp_path, "log.stragglers_seconds=5", *SHARDED.overrides, ranks=2
    )
    assert ": rank 1 is slow: it is busy for 0." in output
    row = next(row for row in commands.read_all_rows(tmp_path / "run") if "busy_seconds" in row)
    fast, slow = row["busy_seconds"]
    assert fast < slow
    assert slow > 0.3


@pytest.mark.parametrize("device", [pytest.param("lo", marks=pytest.mark.slow), "nowhere0"])
def test_network_variables_are_set_before_the_rendezvous(device: str, corpus: Path, tmp_path: Path) -> None:
    options = (f"run.network.GLOO_SOCKET_IFNAME={device}", "run.steps=2")
    code, output, _ = wait_for_end(
        start_with_fault(NO_FAULT, corpus, tmp_path, *options, *SHARDED.overrides), timeout_seconds=60
    )
    assert (code == 0) == (device == "lo"), output
    assert ("nowhere0" in output) == (device != "lo")


@pytest.mark.slow
def test_a_signal_during_a_rewind_still_stops_the_run(corpus: Path, tmp_path: Path) -> None:
    """The signal arrives in the step at the end of which the guard detects the bad step."""
    options = ("guard.not_finite=rewind", "checkpoint.every=4", "log.every=4")
    code, output, remaining = wait_for_end(
        start_with_fault(Fault("nan+usr1", rank=0, step="6+8"), corpus, tmp_path, *options, *SHARDED.overrides),
        timeout_seconds=60,
    )
    assert (code, remaining) == (1, []), output
    run = tmp_path / "run"
    assert "rewound to step 4" in output
    assert json.loads((run / "stopped.json").read_text())["signal"] == "SIGUSR1"
    assert commands.find_latest_checkpoint(run).name in ("step_00000004", "step_00000005")
