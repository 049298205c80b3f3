"""Processes that begin with torch imported: a server that has imported it forks them.

A new interpreter takes seconds to come so far, which was most of the time of most tests of commands and of worlds.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path


def context() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.preload"])
    return found


def start(
    words: Sequence[str], environment: Mapping[str, str], cwd: Path, output: Path, errors: Path
) -> ForkServerProcess:
    """`python -m WORDS`, or `python WORDS` of a file, in a session of its own; what it says is added to these files."""
    process = context().Process(target=_command, args=(words, dict(environment), cwd, output, errors))
    process.start()
    return process


def _command(words: Sequence[str], environment: Mapping[str, str], cwd: Path, output: Path, errors: Path) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = list(words)
    try:
        if words[0].endswith(".py"):
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # forked processes leave them out
