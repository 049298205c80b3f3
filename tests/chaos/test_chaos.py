"""Under random faults no checkpoint is lost, nothing hangs, and the results equal those of a calm run bit for bit.

The test prints its seed; CHAOS_SEED=... repeats the faults.
"""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest

from tests.chaos.checkpoint_monitor import CheckpointMonitor
from tests.chaos.fault_injector import DISK_FULL_MESSAGE, FAULT_KINDS, FaultInjector, summarize_by_kind
from tests.chaos.job import CHECKPOINT_EVERY, CHECKPOINTS_KEPT, NODES, Job
from tests.e2e import commands
from tests.e2e.compare_runs import assert_same_weights
from tests.netns.network import Network, find_obstacle, running_network

UNLIMITED_STEPS = 10**9  # the run with faults is stopped by a signal
STEPS_AFTER_STOP = 5
NUM_PACED_CALM_STEPS = 60  # steps of the calm run that are paced, as all steps of the run with faults are

# {kind of fault: the log message that it must cause}. Other kinds need no message: the monitor and the injector check
# their effects.
LOG_MESSAGE_BY_KIND = {
    "stopped_rank": "has made no progress for",
    "full_disk": DISK_FULL_MESSAGE,
    "bit_flip": "skipping it; an older checkpoint",
    "nan_weights": "rewound to step",
}

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(find_obstacle()), reason=find_obstacle() or "no obstacle")]


@pytest.mark.parametrize(
    ("minutes", "kinds"),
    [
        # The recovery from a stopped rank takes as long as all others together; tests/e2e/test_stop.py tests it.
        pytest.param(
            0,
            [kind for kind in FAULT_KINDS if kind != "stopped_rank"],
            marks=pytest.mark.timeout(600),
            id="one of each",
        ),
        pytest.param(3, FAULT_KINDS, marks=[pytest.mark.slow, pytest.mark.timeout(600)], id="3 minutes"),
        pytest.param(30, FAULT_KINDS, marks=[pytest.mark.slow, pytest.mark.timeout(3600)], id="30 minutes"),
    ],
)
def test_random_faults_change_no_result(
    minutes: int, kinds: Sequence[str], corpus: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    with running_network(num_nodes=len(NODES)) as net, small_disk(tmp_path / "disk") as disk:
        run, report = run_with_faults(net, disk, corpus, tmp_path / "faults", 60 * minutes, seed, kinds)
        actual = commands.read_step_rows(run)
        calm_job = Job(net, corpus, tmp_path / "calm", f"run.steps={len(actual)}", num_paced_steps=NUM_PACED_CALM_STEPS)
        try:
            calm_job.start(*NODES)
            assert calm_job.wait(timeout_seconds=60 + len(actual)) == [0, 0], calm_job.read_log_tails()
        finally:
            calm_job.close()
        expected = commands.read_step_rows(calm_job.run)
        assert commands.get_column(actual, "step") == list(range(1, len(actual) + 1)), "a step is missing or repeated"
        for name in ("step", "loss", "grad_norm", "lr", "tokens"):
            assert commands.get_column(actual, name) == commands.get_column(expected, name), name
        assert_same_weights(run, calm_job.run)
    step_seconds = median(commands.get_column(expected[:NUM_PACED_CALM_STEPS], "step_seconds"))
    report |= {"step_seconds": step_seconds, "goodput": round(report["steps"] * step_seconds / report["seconds"], 3)}
    (tmp_path / "chaos.json").write_text(json.dumps(report, indent=1) + "\n")
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{json.dumps(report)}")


class FaultyRun(NamedTuple):
    """A run that ended although faults were injected."""

    directory: Path  # run.dir
    report: dict[str, Any]


def run_with_faults(
    net: Network, disk: Path, corpus: Path, directory: Path, seconds: float, seed: int, kinds: Sequence[str]
) -> FaultyRun:
    """Run a job with faults of these kinds for `seconds`, stop it by a signal, start it again and let it end."""
    checkpoints = disk / "checkpoints"
    overrides = (f"checkpoint.dir={checkpoints}", f"run.steps={UNLIMITED_STEPS}")
    job = Job(net, corpus, directory, *overrides, num_paced_steps=UNLIMITED_STEPS)
    monitor = CheckpointMonitor(job, checkpoints)
    injector = FaultInjector(seed, job, monitor, net, disk, kinds=kinds)
    try:
        job.start(*NODES)
        with monitor.running():
            injector.wait(lambda: monitor.step > 2 * CHECKPOINT_EVERY, "the first steps")
            injector.inject_faults(seconds=seconds)
            with monitor.lock:
                job.should_restart, elapsed_seconds, step_at_stop = False, injector.elapsed_seconds, monitor.step
            job.send_signal(signal.SIGTERM)
            # torchrun exits with 1 after a signal, whatever the exit codes of its ranks are.
            assert job.wait(timeout_seconds=30) == [1, 1], job.read_log_tails()
            monitor.check()
            marker = json.loads((job.run / "stopped.json").read_text())
            assert marker == {"signal": "SIGTERM", "step": monitor.step}, (
                "the marker does not have the signal, or the last step of all ranks"
            )
            assert monitor.saved_step == monitor.step
            job.overrides = (*job.overrides, f"run.steps={monitor.step + STEPS_AFTER_STOP}")
            job.start(*NODES)
            assert job.wait(timeout_seconds=120) == [0, 0], job.read_log_tails()
            monitor.check()
        injector.check()
        assert job.wait_for_exit(*NODES) == [], "processes remain"
    finally:
        job.close()
    for kind, message in LOG_MESSAGE_BY_KIND.items():
        assert kind not in kinds or job.count_in_logs(message), f"{kind}: no rank logged it"
    assert len(monitor.list_verified_steps()) == len(list(checkpoints.iterdir())) == CHECKPOINTS_KEPT, (
        "newest checkpoints are missing, or other files remain"
    )
    report = {
        "seed": seed,
        "seconds": round(elapsed_seconds, 1),
        "steps": step_at_stop,
        "num_repeated_steps": monitor.num_repeated_steps,
        "starts_of_torchrun": job.num_starts,
        "faults": summarize_by_kind(injector.faults),
    }
    return FaultyRun(job.run, report)


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """Mount a file system of 24 MB at `directory`, with room for some checkpoints; unmount it after the block."""
    directory.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(directory)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield directory
    finally:
        deadline = time.monotonic() + 10
        while (
            subprocess.run(["umount", str(directory)], capture_output=True).returncode and time.monotonic() < deadline
        ):
            time.sleep(0.2)
