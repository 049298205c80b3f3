"""A fault of each kind, or minutes of random ones: no checkpoint is lost, nothing hangs, and no bit is another.

The seed is printed; CHAOS_SEED=... gives the same faults again.
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

from tests.chaos.job import EVERY, KEEP, NODES, Job
from tests.chaos.monkey import FULL, KINDS, Monkey, by_kind
from tests.chaos.watch import Watch
from tests.e2e import commands
from tests.e2e.test_kill import assert_same_weights
from tests.netns.network import Network, missing, network

ALWAYS = 10**9
MORE = 5  # steps after the last start
CALM = 60  # steps of the undisturbed run that take as long as those of the other

# What a rank says where a fault met it; the others show by themselves.
WORDS = {
    "stop": "has made no progress for",
    "full": FULL,
    "flip": "skipping it; an older checkpoint",
    "nan": "went back from",
}

pytestmark = [pytest.mark.netns, pytest.mark.skipif(bool(missing()), reason=missing() or "there are")]


@pytest.mark.parametrize(
    ("minutes", "kinds"),
    [
        # A rank that stands still takes as long as all others together; tests/e2e/test_stop.py has one.
        pytest.param(0, [kind for kind in KINDS if kind != "stop"], marks=pytest.mark.timeout(600), id="one of each"),
        pytest.param(3, KINDS, marks=[pytest.mark.slow, pytest.mark.timeout(600)], id="3 minutes"),
        pytest.param(30, KINDS, marks=[pytest.mark.slow, pytest.mark.timeout(3600)], id="30 minutes"),
    ],
)
def test_random_faults_cost_time_and_nothing_else(
    minutes: int, kinds: Sequence[str], corpus: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    with network(len(NODES)) as net, small_disk(tmp_path / "disk") as disk:
        run, report = storm(net, disk, corpus, tmp_path / "storm", 60 * minutes, seed, kinds)
        got = commands.metrics(run)
        calm = Job(net, corpus, tmp_path / "calm", CALM, f"run.steps={len(got)}")
        try:
            calm.start(*NODES)
            assert calm.wait(60 + len(got)) == [0, 0], calm.tails()
        finally:
            calm.close()
        want = commands.metrics(calm.run)
        assert commands.column(got, "step") == list(range(1, len(got) + 1)), "each step once"
        for name in ("step", "loss", "grad_norm", "lr", "tokens"):
            assert commands.column(got, name) == commands.column(want, name), name
        assert_same_weights(run, calm.run)
    step_seconds = median(commands.column(want[:CALM], "step_seconds"))
    report |= {"step_seconds": step_seconds, "goodput": round(report["steps"] * step_seconds / report["seconds"], 3)}
    (tmp_path / "chaos.json").write_text(json.dumps(report, indent=1) + "\n")
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{json.dumps(report)}")


def storm(
    net: Network, disk: Path, corpus: Path, place: Path, seconds: float, seed: int, kinds: Sequence[str]
) -> tuple[Path, dict[str, Any]]:
    """A run that meets faults of these kinds for so long, is told to stop, started again, and ends; and what it met."""
    checkpoints = disk / "checkpoints"
    job = Job(net, corpus, place, ALWAYS, f"checkpoint.dir={checkpoints}", f"run.steps={ALWAYS}")
    watch = Watch(job, checkpoints)
    monkey = Monkey(seed, job, watch, net, disk, kinds)
    try:
        job.start(*NODES)
        with watch.running():
            monkey.wait(lambda: watch.step > 2 * EVERY, "the first steps")
            monkey.rage(seconds)
            with watch.lock:
                job.kept, seconds, step = False, monkey.age, watch.step
            job.tell(signal.SIGTERM)
            assert job.wait(30) == [1, 1], job.tails()  # torchrun's own, whatever the ranks'
            watch.look()
            word = json.loads((job.run / "stopped.json").read_text())
            assert word == {"signal": "SIGTERM", "step": watch.step}, "all after the step that they agreed on"
            assert watch.saved == watch.step
            job.overrides = (*job.overrides, f"run.steps={watch.step + MORE}")
            job.start(*NODES)
            assert job.wait(120) == [0, 0], job.tails()
            watch.look()
        monkey.check()
        assert job.left(*NODES) == [], "processes that nobody ended"
    finally:
        job.close()
    for kind, words in WORDS.items():
        assert kind not in kinds or job.said(words), f"{kind}: no rank noticed"
    assert len(watch.whole()) == len(list(checkpoints.iterdir())) == KEEP, "the newest, and no litter"
    return job.run, {
        "seed": seed,
        "seconds": round(seconds, 1),
        "steps": step,
        "steps_retaken": watch.retaken,
        "starts_of_torchrun": job.starts,
        "faults": by_kind(monkey.faults),
    }


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of its own, with room for some checkpoints."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        until = time.monotonic() + 10
        while subprocess.run(["umount", str(place)], capture_output=True).returncode and time.monotonic() < until:
            time.sleep(0.2)
