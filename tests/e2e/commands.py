"""Helpers of the end-to-end tests: run `dist-llm` as processes with a timeout, and read the files of a run.

    run_directory = train(tmp_path, corpus, "parallel.tp=2", ranks=2)  # 20 steps of a tiny model on two ranks
    losses = get_column(read_step_rows(run_directory), "loss")
    completed = run("generate", "--checkpoint", run_directory, cwd=tmp_path)  # in one process
    assert "the" in completed.stdout

Processes are forked from the fork server of tests/fork_server.py, which has imported torch. Ranks get the environment
variables of torchrun; only `run_in_new_interpreter` starts torchrun.
"""

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

from tests import fork_server

REPOSITORY = Path(__file__).parents[2]
DEBUG_CONFIG = REPOSITORY / "configs" / "debug.yaml"
TIMEOUT_SECONDS = 200  # for a command
POLL_SECONDS = 0.002  # between two checks of the condition in `kill_when`

# A step of this model takes at least 20 ms, long enough to kill a run between two checkpoints. Its batch divides into
# microbatches at each world size up to 4.
TINY = ("run.steps=20", "data.seq_len=128", "data.micro_batch=2", "log.every=1", "eval.windows=8")


def make_command(*arguments: object, ranks: int = 0) -> list[str]:
    """Return the command `python -m dist_llm ARGUMENTS`, under torchrun if `ranks` is not 0."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "dist_llm", *map(str, arguments)]


def make_environment() -> dict[str, str]:
    """Return the environment of this process without the variables of torchrun, with this Python first on PATH.

    OMP_NUM_THREADS is 1, as torchrun sets it: the model is tiny and the tests share the cores.
    """
    torchrun_variables = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    environment = {name: value for name, value in os.environ.items() if name not in torchrun_variables}
    path = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    return {**environment, "OMP_NUM_THREADS": "1", "PATH": path}


def run(
    *arguments: object, ranks: int = 0, cwd: Path, succeed: bool = True, module: str = "dist_llm"
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` in `cwd` until it ends; return exit code, stdout and stderr.

    With `ranks`, one process runs for each rank; 0 is one process without the variables of torchrun. With `succeed`, a
    non-zero exit code or a warning of a library fails the test. Without `succeed`, several ranks run under torchrun in
    new interpreters, because torchrun reports the failure.
    """
    if ranks and not succeed:
        return run_in_new_interpreter(*arguments, ranks=ranks, cwd=cwd)
    with tempfile.TemporaryDirectory() as directory:
        output, errors = Path(directory, "output"), Path(directory, "errors")
        output.touch()
        errors.touch()
        processes = start_processes(module, *arguments, ranks=ranks, cwd=cwd, output=output, errors=errors)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        try:
            while any(process.exitcode is None for process in processes) and not any(
                process.exitcode for process in processes
            ):
                connection.wait([process.sentinel for process in processes if process.exitcode is None], 1)
                assert time.monotonic() < deadline, f"{arguments} is still running:\n{errors.read_text()}"
        finally:
            for process in processes:
                assert process.pid is not None
                kill_processes(list_process_tree(process.pid))
                process.join()
        code = next((process.exitcode for process in processes if process.exitcode), 0)
        completed = subprocess.CompletedProcess([*map(str, arguments)], code, output.read_text(), errors.read_text())
    if succeed:
        assert completed.returncode == 0, (
            f"{completed.args} exited with {completed.returncode}\n{completed.stdout}\n{completed.stderr}"
        )
        assert "Warning: " not in completed.stderr, completed.stderr
    return completed


def run_in_new_interpreter(*arguments: object, ranks: int = 0, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command to its end as a user starts it: in a new interpreter, under torchrun if `ranks` is not 0."""
    return subprocess.run(
        make_command(*arguments, ranks=ranks),
        cwd=cwd,
        env=make_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def start_processes(*arguments: object, ranks: int, cwd: Path, output: Path, errors: Path) -> list[ForkServerProcess]:
    """Start `python -m ARGUMENTS` in one process, or in one process per rank, and return the processes.

    All processes append their stdout to the file `output` and their stderr to the file `errors`.
    """
    command_arguments = list(map(str, arguments))
    if not ranks:
        return [fork_server.start_process(command_arguments, make_environment(), cwd=cwd, output=output, errors=errors)]
    return [
        fork_server.start_process(
            command_arguments, make_environment() | variables, cwd=cwd, output=output, errors=errors
        )
        for variables in make_rank_environments(ranks)
    ]


def make_rank_environments(ranks: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each rank, with a rendezvous on this machine."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_port()), "WORLD_SIZE": str(ranks)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **rendezvous} for rank in range(ranks)]


def find_free_port() -> int:
    """Return a TCP port that no process uses."""
    with socket.socket() as unused_socket:
        unused_socket.bind(("127.0.0.1", 0))
        port: int = unused_socket.getsockname()[1]
    return port


def train(directory: Path, corpus: Path, *overrides: object, ranks: int = 0) -> Path:
    """Train the tiny model with config `overrides` such as "run.steps=4"; return the run directory, `directory`/run."""
    run(*make_train_arguments(corpus, *overrides), ranks=ranks, cwd=directory)
    return directory / "run"


def make_train_arguments(corpus: Path, *overrides: object) -> tuple[object, ...]:
    """Return the arguments of `dist-llm` that train the tiny model with config `overrides`."""
    return ("train", "--config", DEBUG_CONFIG, "run.dir=run", f"data.path={corpus}", *TINY, *overrides)


def kill_when(is_ready: Callable[[], bool], arguments: Sequence[object], *, ranks: int, cwd: Path) -> None:
    """Start `dist-llm ARGUMENTS`; as soon as `is_ready()` returns true, kill all of its processes with SIGKILL.

    The output is in `cwd`/killed.txt.
    """
    log = cwd / "killed.txt"
    log.write_text("")
    processes = start_processes("dist_llm", *arguments, ranks=ranks, cwd=cwd, output=log, errors=log)
    try:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not is_ready():
            assert all(process.is_alive() for process in processes), f"ended too early:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"never ready:\n{log.read_text()}"
            time.sleep(POLL_SECONDS)
    finally:
        roots = [process.pid for process in processes if process.pid is not None]
        kill_processes([pid for root in roots for pid in list_process_tree(root)])
        for process in processes:
            process.join()


def list_process_tree(root_pid: int) -> list[int]:
    """Return the ids of the process and its descendants (torchrun starts each rank in its own session)."""
    pids = [root_pid]
    for parent in pids:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            pids += [int(child) for child in children.read_text().split()]
    return pids


def kill_processes(pids: Sequence[int]) -> None:
    """Kill the processes with these ids, if they exist."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def read_step_rows(run_directory: Path) -> list[dict[str, Any]]:
    """Return the rows of training steps in metrics.jsonl, without the rows of evaluations."""
    return [row for row in read_all_rows(run_directory) if "loss" in row]


def read_all_rows(run_directory: Path) -> list[dict[str, Any]]:
    """Return all rows of metrics.jsonl."""
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def get_column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """Return the values of one metric, one per row."""
    return [row[name] for row in rows]


def find_latest_checkpoint(run_directory: Path) -> Path:
    """Return the newest complete checkpoint."""
    return max(marker.parent for marker in (run_directory / "checkpoints").glob("step_*/COMMITTED"))


def read_progress(checkpoint: Path) -> dict[str, int]:
    """Return the counters in progress.json of a checkpoint, such as step, samples and tokens."""
    counters: dict[str, int] = json.loads((checkpoint / "progress.json").read_text())
    return counters
