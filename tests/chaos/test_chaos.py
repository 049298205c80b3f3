"""Random faults, one of each kind or for minutes: no checkpoint is lost, nothing hangs, and all results are bitwise
equal.

The seed is printed; CHAOS_SEED=... repeats the faults.
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
from typing import Any

import pytest

from tests.chaos.job import CHECKPOINT_EVERY, CHECKPOINTS_KEPT, NODES, Job
from tests.chaos.monkey import FULL, KINDS, Monkey, summarize_by_kind
from tests.chaos.watch import CheckpointMonitor
from tests.e2e import commands
from tests.e2e.test_kill import assert_same_weights
from tests.netns.network import Network, missing, running_network

UNLIMITED = 10**9
MORE_STEPS = 5  # after the last start
CALM = 60  # steps of the undisturbed run that are paced as those of the other

# Log messages of a fault; the other kinds have an effect that is checked elsewhere.
MESSAGES = {
    "stop": "has made no progress for",
    "full": FULL,
    "flip": "skipping it; an older checkpoint",
    "nan": "rewound to step",
}

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(missing()), reason=missing() or "there are")]


@pytest.mark.parametrize(
    ("minutes", "kinds"),
    [
        # A stopped rank takes as long as all other faults together; tests/e2e/test_stop.py has one.
        pytest.param(0, [kind for kind in KINDS if kind != "stop"], marks=pytest.mark.timeout(600), id="one of each"),
        pytest.param(3, KINDS, marks=[pytest.mark.slow, pytest.mark.timeout(600)], id="3 minutes"),
        pytest.param(30, KINDS, marks=[pytest.mark.slow, pytest.mark.timeout(3600)], id="30 minutes"),
    ],
)
def test_random_faults_change_no_result(
    minutes: int, kinds: Sequence[str], corpus: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    with running_network(len(NODES)) as net, small_disk(tmp_path / "disk") as disk:
        run, report = run_with_faults(net, disk, corpus, tmp_path / "storm", 60 * minutes, seed, kinds)
        actual = commands.read_metrics(run)
        calm = Job(net, corpus, tmp_path / "calm", CALM, f"run.steps={len(actual)}")
        try:
            calm.start(*NODES)
            assert calm.wait(60 + len(actual)) == [0, 0], calm.tails()
        finally:
            calm.close()
        expected = commands.read_metrics(calm.run)
        assert commands.get_column(actual, "step") == list(range(1, len(actual) + 1)), "each step once"
        for name in ("step", "loss", "grad_norm", "lr", "tokens"):
            assert commands.get_column(actual, name) == commands.get_column(expected, name), name
        assert_same_weights(run, calm.run)
    step_seconds = median(commands.get_column(expected[:CALM], "step_seconds"))
    report |= {"step_seconds": step_seconds, "goodput": round(report["steps"] * step_seconds / report["seconds"], 3)}
    (tmp_path / "chaos.json").write_text(json.dumps(report, indent=1) + "\n")
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{json.dumps(report)}")


def run_with_faults(
    net: Network, disk: Path, corpus: Path, directory: Path, seconds: float, seed: int, kinds: Sequence[str]
) -> tuple[Path, dict[str, Any]]:
    """Run with faults of these kinds for this time, stop it by a signal, start it again and let it end.

    Return run and report.
    """
    checkpoints = disk / "checkpoints"
    job = Job(net, corpus, directory, UNLIMITED, f"checkpoint.dir={checkpoints}", f"run.steps={UNLIMITED}")
    monitor = CheckpointMonitor(job, checkpoints)
    monkey = Monkey(seed, job, monitor, net, disk, kinds)
    try:
        job.start(*NODES)
        with monitor.running():
            monkey.wait(lambda: monitor.step > 2 * CHECKPOINT_EVERY, "the first steps")
            monkey.run_faults(seconds)
            with monitor.lock:
                job.restarting, seconds, step = False, monkey.elapsed, monitor.step
            job.send_signal(signal.SIGTERM)
            assert job.wait(30) == [1, 1], job.tails()  # torchrun's exit code does not depend on the ranks'
            monitor.check()
            marker = json.loads((job.run / "stopped.json").read_text())
            assert marker == {"signal": "SIGTERM", "step": monitor.step}, "all ranks stop after the agreed step"
            assert monitor.saved == monitor.step
            job.overrides = (*job.overrides, f"run.steps={monitor.step + MORE_STEPS}")
            job.start(*NODES)
            assert job.wait(120) == [0, 0], job.tails()
            monitor.check()
        monkey.check()
        assert job.remaining_processes(*NODES) == [], "no process remains"
    finally:
        job.close()
    for kind, message in MESSAGES.items():
        assert kind not in kinds or job.count_in_logs(message), f"{kind}: no rank logged it"
    assert len(monitor.verified_steps()) == len(list(checkpoints.iterdir())) == CHECKPOINTS_KEPT, (
        "only the newest, and no other files"
    )
    return job.run, {
        "seed": seed,
        "seconds": round(seconds, 1),
        "steps": step,
        "steps_retaken": monitor.num_repeated_steps,
        "starts_of_torchrun": job.num_starts,
        "faults": summarize_by_kind(monkey.faults),
    }


@contextmanager
def small_disk(directory: Path) -> Iterator[Path]:
    """Mount a small file system with room for some checkpoints."""
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
