"""The commands a user types, as processes with a time limit, and what they leave behind."""

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

# A step of this model takes 20 ms and more, long enough to be killed between two checkpoints,
# and is cut into microbatches at each world size up to 4.
TINY = ("run.steps=20", "data.seq_len=128", "data.micro_batch=2", "log.every=1", "eval.windows=8")


def command(*arguments: object, ranks: int = 0) -> list[str]:
    """`python -m dist_llm ...`, or with `ranks` the same under torchrun."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "dist_llm", *map(str, arguments)]


def environment() -> dict[str, str]:
    """This one, as if nothing had started it under torchrun; the environment's programs first on PATH.

    One thread per process, as torchrun sets it: the model is tiny, and tests share their cores.
    """
    clean = {k: v for k, v in os.environ.items() if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    return {**clean, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{clean.get('PATH', '')}"}


def run(
    *arguments: object, ranks: int = 0, cwd: Path, succeed: bool = True, module: str = "dist_llm"
) -> subprocess.CompletedProcess[str]:
    """Run to the end. With `succeed`, another exit than 0 or a library's warning fails the test.

    Forked by a server that has imported torch, ranks as `srun` would start them; where ranks may fail, new interpreters
    under torchrun, which tells of it.
    """
    if ranks and not succeed:
        return cold(*arguments, ranks=ranks, cwd=cwd)
    with tempfile.TemporaryDirectory() as place:
        output, errors = Path(place, "output"), Path(place, "errors")
        output.touch()
        errors.touch()
        started = start(module, *arguments, ranks=ranks, cwd=cwd, output=output, errors=errors)
        deadline = time.monotonic() + LIMIT_SECONDS
        try:
            while any(each.exitcode is None for each in started) and not any(each.exitcode for each in started):
                connection.wait([each.sentinel for each in started if each.exitcode is None], 1)
                assert time.monotonic() < deadline, f"{arguments} goes on:\n{errors.read_text()}"
        finally:
            for each in started:
                _kill(_family(each.pid))
                each.join()
        code = next((each.exitcode for each in started if each.exitcode), 0)
        done = subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())
    if succeed:
        assert done.returncode == 0, f"{done.args} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Warning: " not in done.stderr, done.stderr
    return done


def cold(*arguments: object, ranks: int = 0, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run to the end as a user would start it: a new interpreter, and torchrun for `ranks`."""
    return subprocess.run(
        command(*arguments, ranks=ranks),
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def start(*arguments: object, ranks: int, cwd: Path, output: Path, errors: Path) -> list[ForkServerProcess]:
    """The process of `python -m ARGUMENTS`, or those of its ranks."""
    words = list(map(str, arguments))
    if not ranks:
        return [warm.start_process(words, environment(), cwd, output, errors)]
    return [warm.start_process(words, environment() | place, cwd, output, errors) for place in places(ranks)]


def places(ranks: int) -> list[dict[str, str]]:
    """What torchrun tells each of so many ranks on this machine."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **meeting} for rank in range(ranks)]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def train(directory: Path, corpus: Path, *overrides: object, ranks: int = 0) -> Path:
    """Train the tiny model into `directory`/run and return that run."""
    run(*train_arguments(corpus, *overrides), ranks=ranks, cwd=directory)
    return directory / "run"


def train_arguments(corpus: Path, *overrides: object) -> tuple[object, ...]:
    return ("train", "--config", DEBUG_CONFIG, "run.dir=run", f"data.path={corpus}", *TINY, *overrides)


def kill_when(ready: Callable[[], bool], arguments: Sequence[object], ranks: int, cwd: Path) -> None:
    """Start the command; as soon as it is `ready`, SIGKILL every process of it at once."""
    log = cwd / "killed.txt"
    log.write_text("")
    started = start("dist_llm", *arguments, ranks=ranks, cwd=cwd, output=log, errors=log)
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not ready():
            assert all(each.is_alive() for each in started), f"ended too early:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"never ready:\n{log.read_text()}"
            time.sleep(POLL_SECONDS)
    finally:
        _kill([each for process in started for each in _family(process.pid)])
        for process in started:
            process.join()


def _family(process: int) -> list[int]:
    """The process and its descendants (torchrun gives each rank a session of its own)."""
    found = [process]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in children.read_text().split()]
    return found


def _kill(processes: Sequence[int]) -> None:
    for process in processes:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def metrics(run_directory: Path) -> list[dict[str, Any]]:
    """The rows of each training step; those of evaluations are left out."""
    return [row for row in all_rows(run_directory) if "loss" in row]


def all_rows(run_directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]


def column(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [row[name] for row in rows]


def newest(run_directory: Path) -> Path:
    """The newest complete checkpoint."""
    return max(marker.parent for marker in (run_directory / "checkpoints").glob("step_*/COMMITTED"))


def progress(checkpoint: Path) -> dict[str, int]:
    counters: dict[str, int] = json.loads((checkpoint / "progress.json").read_text())
    return counters
