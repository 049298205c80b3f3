"""A node dies and comes back: torchrun goes on with those there are, and the run with the same batches."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from . import commands

STEPS = 80
TOLERANCE = 1e-4  # of losses that were computed by other numbers of ranks than in the run that nobody disturbed


@dataclass(frozen=True)
class Job:
    """What all its nodes have in common; `place` says where a node's command runs."""

    nodes: int
    steps: int
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    place: Callable[[list[str]], list[str]] = list


JOB = Job(2, STEPS, ("run.hang_seconds=20",))


@contextmanager
def node(name: str, meeting: str, corpus: Path, cwd: Path, job: Job = JOB) -> Iterator[subprocess.Popen[bytes]]:
    """One torchrun with one rank, of a job of one to so many nodes that meet there."""
    conf = "last_call_timeout=2,join_timeout=60,read_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=3"
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes=1:{job.nodes}", "--nproc-per-node=1"]
    launcher += ["--max-restarts=10", "--rdzv-backend=c10d", f"--rdzv-endpoint={meeting}", "--rdzv-id=test"]
    launcher += [f"--rdzv-conf={conf}", "--monitor-interval=0.2"]
    arguments = commands.train_arguments(corpus, f"run.steps={job.steps}", "checkpoint.every=1", *job.overrides)
    with (cwd / f"{name}.txt").open("w") as output:
        process = subprocess.Popen(
            job.place([*launcher, "-m", "tests.e2e.paced", "0.15", *map(str, arguments)]),
            cwd=cwd,
            env={
                **commands.environment(),
                "PYTHONPATH": str(commands.REPOSITORY),
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                **job.environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """All of a node at once."""
    commands._kill(commands._family(process.pid))
    process.wait()


def rows(cwd: Path) -> int:
    path = cwd / "run" / "metrics.jsonl"
    return len(commands.metrics(cwd / "run")) if path.exists() else 0


def wait(ready: Callable[[], bool], cwd: Path, seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not ready():
        logs = "\n".join(path.read_text() for path in cwd.glob("*.txt"))
        assert time.monotonic() < until, f"never ready:\n{logs}"
        time.sleep(0.1)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def said(cwd: Path, words: str) -> int:
    return sum(path.read_text().count(words) for path in cwd.glob("*.txt"))


@pytest.mark.slow  # with a network in between, tests/netns has it in all runs
@pytest.mark.timeout(400)
def test_a_node_dies_and_comes_back(corpus: Path, tmp_path: Path) -> None:
    port = commands.free_port()
    with node("first", f"localhost:{port}", corpus, tmp_path) as first:
        wait(lambda: listens(port), tmp_path)  # where nodes meet must outlive the second
        with node("second", f"localhost:{port}", corpus, tmp_path):
            wait(lambda: rows(tmp_path) >= 4, tmp_path)
            assert said(tmp_path, "ranks: 2 (dp_shard 2)") == 1
        # The second node is gone, all its processes killed.
        alone = rows(tmp_path)
        wait(lambda: rows(tmp_path) >= alone + 2 and said(tmp_path, "ranks: 1 (dp_shard 1)") >= 1, tmp_path)
        with node("again", f"localhost:{port}", corpus, tmp_path) as again:
            wait(lambda: said(tmp_path, "ranks: 2 (dp_shard 2)") >= 2, tmp_path)
            assert first.wait(120) == 0
            assert again.wait(30) == 0
    straight = tmp_path / "straight"
    straight.mkdir()
    got, want = (
        commands.metrics(tmp_path / "run"),
        commands.metrics(commands.train(straight, corpus, f"run.steps={STEPS}")),
    )
    assert commands.column(got, "step") == list(range(1, STEPS + 1))
    assert commands.column(got, "loss") == pytest.approx(commands.column(want, "loss"), rel=TOLERANCE)
    assert commands.newest(tmp_path / "run").name == f"step_{STEPS:08d}"
