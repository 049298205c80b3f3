"""Run the user's commands as processes with a time limit, and read the files of a run."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests import warm

REPOSITORY = Path(__file__).parents[2]
DEBUG_CONFIG = REPOSITORY / "configs" / "debug.yaml"
LIMIT_SECONDS = 200
POLL_SECONDS = 0.002

# A step of this model takes at least 20 ms, long enough to kill a run between two checkpoints. Its batch divides into
# microbatches at each world size up to 4.
TINY = ("run.steps=20", "data.seq_len=128", "data.micro_batch=2", "log.every=1", "eval.windows=8")


def command_line(*arguments: object, ranks: int = 0) -> list[str]:
    """Return the arguments of `python -m dist_llm ...`, or with `ranks` of the same under torchrun."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "dist_llm", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return this process's environment without torchrun's variables, with the virtual environment first on PATH.

    OMP_NUM_THREADS is 1, as torchrun sets it: the model is tiny and the tests share the cores.
    """
    clean = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    return {**clean, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{clean.get('PATH', '')}"}


def run(
    *arguments: object, ranks: int = 0, cwd: Path, succeed: bool = True, module: str = "dist_llm"
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. With `succeed`, a non-zero exit code or a library's warning fails the test.

    The processes are forked by the fork server, ranks with the environment that `srun` would set. If ranks may fail,
    the command runs under torchrun in new interpreters instead, because torchrun reports the failure.
    """
    if ranks and not succeed:
        return cold(*arguments, ranks=ranks, cwd=cwd)
    with tempfile.TemporaryDirectory() as directory:
        output, errors = Path(directory, "output"), Path(directory, "errors")
        output.touch()
        errors.touch()
        processes = start_processes(module, *arguments, ranks=ranks, cwd=cwd, output=output, errors=errors)
        deadline = time.monotonic() + LIMIT_SECONDS
        try:
            while any(process.exitcode is None for process in processes) and not any(
                process.exitcode for process in processes
            ):
                connection.wait([process.sentinel for process in processes if process.exitcode is None], 1)
                assert time.monotonic() < deadline, f"{arguments} is still running:\n{errors.read_text()}"
        finally:
            for process in processes:
                kill_processes(process_tree(process.pid))
                process.join()
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        completed = subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())
    if succeed:
        assert completed.returncode == 0, (
            f"{completed.args} exited with {completed.returncode}\n{completed.stdout}\n{completed.stderr}"
        )
        assert "Warning: " not in completed.stderr, completed.stderr
    return completed


def cold(*arguments: object, ranks: int = 0, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end as a user starts it: with a new interpreter, and torchrun for `ranks`."""
    return subprocess.run(
        command_line(*arguments, ranks=ranks),
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def start_processes(*arguments: object, ranks: int, cwd: Path, output: Path, errors: Path) -> list[ForkServerProcess]:
    """Start `python -m ARGUMENTS`, or one process per rank, and return the processes."""
    command_arguments = list(map(str, arguments))
    if not ranks:
        return [warm.start_process(command_arguments, environment(), cwd, output, errors)]
    by_rank = rank_environments(ranks)
    return [warm.start_process(command_arguments, environment() | rank, cwd, output, errors) for rank in by_rank]


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each rank, with a rendezvous on this machine."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **rendezvous} for rank in range(ranks)]


def free_port() -> int:
    """Return a TCP port that no process uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def train(directory: Path, corpus: Path, *overrides: object, ranks: int = 0) -> Path:
    """Train the tiny model in `directory`/run and return that directory."""
    run(*train_arguments(corpus, *overrides), ranks=ranks, cwd=directory)
    return directory / "run"


def train_arguments(corpus: Path, *overrides: object) -> tuple[object, ...]:
    """Return the arguments of `train` for the tiny model."""
    return ("train", "--config", DEBUG_CONFIG, "run.dir=run", f"data.path={corpus}", *TINY, *overrides)


def kill_when(ready: Callable[[], bool], arguments: Sequence[object], ranks: int, cwd: Path) -> None:
    """Start the command; as soon as `ready()`, kill all of its processes with SIGKILL at once."""
    log = cwd / "killed.txt"
    log.write_text("")
    processes = start_processes("dist_llm", *arguments, ranks=ranks, cwd=cwd, output=log, errors=log)
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not ready():
            assert all(each.is_alive() for each in processes), f"ended too early:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"never ready:\n{log.read_text()}"
            time.sleep(POLL_SECONDS)
    finally:
        kill_processes([each for process in processes for each in process_tree(process.pid)])
        for process in processes:
            process.join()


def process_tree(process: int) -> list[int]:
    """Return the process and its descendants (torchrun starts each rank in its own session)."""
    processes = [process]
    for parent in processes:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            processes += [int(child) for child in children.read_text().split()]
    return processes


def kill_processes(processes: Sequence[int]) -> None:
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def read_metrics(run_directory: Path) -> list[dict[str, Any]]:
    """Return the rows of training steps; rows of evaluations are left out."""
    return [row for row in read_rows(run_directory) if "loss" in row]


def read_rows(run_directory: Path) -> list[dict[str, Any]]:
    """Return all rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Return the values of one metric."""
    return [row[name] for row in rows]


def latest_checkpoint(run_directory: Path) -> Path:
    """Return the newest complete checkpoint."""
    return max(marker.parent for marker in (run_directory / "checkpoints").glob("step_*/COMMITTED"))


def read_progress(checkpoint: Path) -> dict[str, int]:
    """Return the counters of a checkpoint."""
    counters: dict[str, int] = json.loads((checkpoint / "progress.json").read_text())
    return counters
