"""Start test processes from a fork server that has already imported torch.

    process = start_process(
        ["dist_llm", "train", "--config", "config.yaml"], environment, cwd=tmp_path, output=log, errors=log
    )
    process.join()
    assert process.exitcode == 0, log.read_text()

A new interpreter takes seconds to import torch, which would dominate the time of most end-to-end and law tests.
The fork server is a process that multiprocessing starts once. It imports fork_server_preload.py, and forks each test
process.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path


def get_fork_server_context() -> ForkServerContext:
    """Return the multiprocessing context whose fork server imports `tests.fork_server_preload`."""
    server_context = multiprocessing.get_context("forkserver")
    server_context.set_forkserver_preload(["tests.fork_server_preload"])
    return server_context


def start_process(
    arguments: Sequence[str], environment: Mapping[str, str], *, cwd: Path, output: Path, errors: Path
) -> ForkServerProcess:
    """Start `python -m ARGUMENTS`, or `python ARGUMENTS` if the first argument is a .py file, in a new session.

    `environment` replaces the environment of the process. The process appends its stdout to the file `output` and its
    stderr to the file `errors`.
    """
    process = get_fork_server_context().Process(
        target=_run_command, args=(arguments, dict(environment), cwd, output, errors)
    )
    process.start()
    return process


def _run_command(
    arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, output: Path, errors: Path
) -> None:
    """Run the command in the forked process, as a new interpreter would."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.argv = list(arguments)
    try:
        if arguments[0].endswith(".py"):
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends a forked process without the functions of atexit
