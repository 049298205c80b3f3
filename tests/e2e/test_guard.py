"""Bad steps, by policy: the run goes back and leaves samples out, or leaves out the step, and nothing else changes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from . import commands
from .conftest import ONE, SHARDED, Layout
from .test_kill import assert_same_weights
from .test_stop import end, start

REWIND = ("guard.not_finite=rewind", "checkpoint.every=4", "log.every=3")


def faulty(fault: tuple[object, ...], corpus: Path, cwd: Path, *overrides: object, ranks: int = 0) -> str:
    """A run with a fault that ends by itself; what it said."""
    arguments = commands.train_arguments(corpus, "run.steps=20", *overrides)
    done = commands.run(*fault, *arguments, ranks=ranks, cwd=cwd, module="tests.e2e.faulty")
    return done.stdout + done.stderr


def losses(run: Path) -> list[float]:
    rows = commands.metrics(run)
    assert commands.column(rows, "step") == list(range(1, len(rows) + 1)), "each step once"
    found: list[float] = commands.column(rows, "loss")
    return found


def events(run: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["event"]) for row in commands.all_rows(run) if "event" in row]


def skipping(corpus: Path, cwd: Path, ranges: list[list[int]], *overrides: object, ranks: int = 0) -> Path:
    """The run that was told of the samples from the start."""
    return commands.train(cwd, corpus, f"data.skip={json.dumps(ranges)}", *overrides, ranks=ranks)


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_rewinding_is_a_run_that_never_read_those_samples(ranks: int, corpus: Path, tmp_path: Path) -> None:
    layout = SHARDED.overrides if ranks else ()
    output = faulty(("nan", 0, 11), corpus, tmp_path, *REWIND, *layout, ranks=ranks)
    run = tmp_path / "run"
    batch = yaml.safe_load((run / "config.yaml").read_text())["data"]["global_batch"]
    left_out = [10 * batch, 11 * batch]
    what = f"step 11: the loss is nan; went back from there to step 8, samples {10 * batch} to {11 * batch - 1}"
    assert events(run) == [(8, f"{what} are left out")]
    assert what in output
    (tmp_path / "told").mkdir()
    told = skipping(corpus, tmp_path / "told", [left_out], *layout, ranks=ranks)
    assert losses(run) == losses(told)
    assert_same_weights(run, told)
    kept = json.loads((commands.newest(run) / "progress.json").read_text())
    assert (kept["guard"]["num_used"], kept["guard"]["left_out"]) == (1, [left_out])
    assert kept["samples"] == commands.progress(commands.newest(told))["samples"]


def test_a_fault_of_the_machine_leaves_nothing_out(corpus: Path, tmp_path: Path, straight: Any) -> None:
    """Before the first checkpoint, too: one of step 0 is there."""
    output = faulty(("nan", 0, 3), corpus, tmp_path, *REWIND, "guard.skip_steps=0")
    assert "went back from there to step 0, to read the same samples again" in output
    assert losses(tmp_path / "run") == losses(straight(ONE))
    assert_same_weights(tmp_path / "run", straight(ONE))


@pytest.mark.slow
def test_samples_stay_left_out_after_a_stop(corpus: Path, tmp_path: Path) -> None:
    """Stopped between the checkpoint that it went back to and the samples: by the same command, it still knows."""
    options = (*REWIND, "log.every=20")
    code, output, _ = end(start(("nan+usr1", 0, "12+10"), corpus, tmp_path, *options, ranks=0), 120)
    assert code == 138, output
    run = tmp_path / "run"
    batch = yaml.safe_load((run / "config.yaml").read_text())["data"]["global_batch"]
    assert commands.newest(run).name in ("step_00000010", "step_00000011")
    commands.run(*commands.train_arguments(corpus, *options), cwd=tmp_path)
    (tmp_path / "told").mkdir()
    told = skipping(corpus, tmp_path / "told", [[11 * batch, 12 * batch]])
    assert losses(run) == losses(told)
    assert_same_weights(run, told)


def test_a_step_that_is_left_out_still_reads_its_samples(corpus: Path, tmp_path: Path) -> None:
    output = faulty(("nan_gradient", 1, 7), corpus, tmp_path, "guard.not_finite=skip", *SHARDED.overrides, ranks=2)
    run = tmp_path / "run"
    assert events(run) == [(7, "step 7: the gradient's norm is nan; its update was left out")]
    assert "its update was left out" in output
    rows = commands.metrics(run)
    assert [row["step"] for row in rows if not math.isfinite(row["grad_norm"])] == [7]
    assert all(math.isfinite(loss) for loss in losses(run))


def test_a_spike_is_rewound(corpus: Path, tmp_path: Path) -> None:
    options = ("guard.spike=rewind", "guard.window=4", "guard.spike_z=20", "checkpoint.every=4")
    faulty(("garbage", 0, 15), corpus, tmp_path, *options)
    ((step, event),) = events(tmp_path / "run")
    assert step == 12
    assert event.startswith("step 15: a loss of ")
    assert max(losses(tmp_path / "run")[8:]) < losses(tmp_path / "run")[0]


REPLICATED = ("parallel.dp_replicate=2", "parallel.dp_shard=1")


@pytest.mark.parametrize("policy", [pytest.param("stop", marks=pytest.mark.slow), "rewind"])
def test_a_flipped_bit_in_one_copy_is_never_saved(policy: str, corpus: Path, tmp_path: Path, straight: Any) -> None:
    options = (*REPLICATED, f"guard.corrupt={policy}", "checkpoint.every=4", "guard.digest_every=7")
    code, output, left = end(start(("flip", 1, 10), corpus, tmp_path, *options), 120)
    assert not left
    what = "step 12: ranks do not agree: embed.tokens.weight: differs on rank 0, 1 of ranks 0, 1"
    assert what in output
    if policy == "stop":
        assert code == 1
        assert commands.newest(tmp_path / "run").name == "step_00000008"
        assert "take out the faulty machine" in output
        return
    assert code == 0, output
    assert events(tmp_path / "run")[0][0] == 8
    want = straight(Layout(2, ("parallel.dp_replicate=2",)))
    assert losses(tmp_path / "run") == losses(want)
    assert_same_weights(tmp_path / "run", want)


@pytest.mark.slow
def test_a_step_that_another_rank_computes_otherwise_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    options = ("guard.replay_every=5", "guard.digest_every=0", *SHARDED.overrides)
    code, output, left = end(start(("garbled", 1, 10), corpus, tmp_path, *options), 120)
    assert (code, left) == (1, []), output
    assert "step 10: ranks do not agree: a step computed twice has other gradients" in output
    assert "resumed" not in output
    (tmp_path / "well").mkdir()
    commands.train(tmp_path / "well", corpus, *options, ranks=2)
    assert losses(tmp_path / "well" / "run")[:9] == losses(tmp_path / "run")[:9], "it takes no step"


def test_the_budget_ends_what_would_never_end(corpus: Path, tmp_path: Path) -> None:
    options = ("guard.not_finite=rewind", "guard.budget=3", "checkpoint.every=2")
    code, output, _ = end(start(("nan_always", 0, 5), corpus, tmp_path, *options, ranks=0), 120)
    assert code == 2, output
    assert "step 5: the loss is nan, and guard.budget of 3 bad steps is used up" in output
    assert commands.newest(tmp_path / "run").name == "step_00000004"
    assert len(events(tmp_path / "run")) == 3


def test_a_slow_rank_is_named(corpus: Path, tmp_path: Path) -> None:
    output = faulty(("slow", 1, 0), corpus, tmp_path, "log.stragglers_seconds=5", *SHARDED.overrides, ranks=2)
    assert ": rank 1 is slow: it is busy for 0." in output
    row = next(row for row in commands.all_rows(tmp_path / "run") if "busy_seconds" in row)
    fast, slow = row["busy_seconds"]
    assert fast < slow
    assert slow > 0.3


@pytest.mark.parametrize("device", [pytest.param("lo", marks=pytest.mark.slow), "nowhere0"])
def test_variables_of_the_network_are_set_before_ranks_meet(device: str, corpus: Path, tmp_path: Path) -> None:
    options = (f"run.network.GLOO_SOCKET_IFNAME={device}", "run.steps=2")
    code, output, _ = end(start(("none", 0, 0), corpus, tmp_path, *options, *SHARDED.overrides), 60)
    assert (code == 0) == (device == "lo"), output
    assert ("nowhere0" in output) == (device != "lo")


@pytest.mark.slow
def test_a_signal_that_comes_while_a_run_goes_back_still_stops_it(corpus: Path, tmp_path: Path) -> None:
    """The signal comes in the step at whose end the bad one is noticed."""
    options = ("guard.not_finite=rewind", "checkpoint.every=4", "log.every=4")
    code, output, left = end(start(("nan+usr1", 0, "6+8"), corpus, tmp_path, *options, *SHARDED.overrides), 60)
    assert (code, left) == (1, []), output
    run = tmp_path / "run"
    assert "went back from there to step 4" in output
    assert json.loads((run / "stopped.json").read_text())["signal"] == "SIGUSR1"
    assert commands.newest(run).name in ("step_00000004", "step_00000005")
