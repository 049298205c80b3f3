"""Worlds of gloo processes, started once per size and handed one function after another.

A world that broke or hung is thrown away and the next call starts a fresh one.
"""

import atexit
import faulthandler
import gc
import os
import pickle
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from tests.warm import context

COLLECTIVE_TIMEOUT_SECONDS = 90
ANSWER_TIMEOUT_SECONDS = 240
timeout_factor = 1  # multiplies both; higher for runs that other work may delay


class WorldError(RuntimeError):
    """A rank raised; the text holds every rank's traceback."""


class GlooWorld:
    """`size` processes with a default process group. `run` calls f(*args) on all; returns their results by rank."""

    def __init__(self, size: int) -> None:
        self.store = tempfile.NamedTemporaryFile(prefix="dist_llm_world_")  # noqa: SIM115
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context().Pipe()
            process = context().Process(
                target=_serve, args=(rank, size, self.store.name, theirs, timeout_factor), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        timeout = ANSWER_TIMEOUT_SECONDS * timeout_factor
        for pipe in self.pipes:
            pipe.send((function, args))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(timeout):
                    raise EOFError(f"no answer in {timeout} s")
                ok, value = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError) as error:
                self.processes[rank].join(1)
                ok, value = False, f"{error or 'it died'} (exit code {self.processes[rank].exitcode}: -N is signal N)"
            results.append(value)
            if not ok:
                errors.append(f"--- rank {rank}\n{value}")
                timeout = 5
        if errors:
            self.stop()
            raise WorldError("\n".join(errors))
        return results

    @property
    def alive(self) -> bool:
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def pause(self, pause: bool) -> None:
        """Let its processes sleep, or wake them: gloo's threads look around all the time, work or none."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGSTOP if pause else signal.SIGCONT)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
        with suppress(FileNotFoundError):  # the processes remove it, where they end in order
            self.store.close()


_worlds: dict[int, GlooWorld] = {}


def world(size: int) -> GlooWorld:
    """The shared world of that size, started on first use; the others sleep meanwhile."""
    for other, each in _worlds.items():
        each.pause(other != size)
    if size not in _worlds or not _worlds[size].alive:
        _worlds[size] = GlooWorld(size)
    return _worlds[size]


def restart_world(size: int) -> None:
    """Let the next call start another world of that size.

    For compiled models: what torch traced of an earlier one's mesh may be found again where it cannot be used
    ("device_mesh._get_submesh is not an OpOverload", torch 2.13). A user's processes have one model.
    """
    if size in _worlds:
        _worlds.pop(size).stop()


@atexit.register
def stop_all() -> None:
    for each in _worlds.values():
        each.stop()


def _serve(rank: int, size: int, store: str, pipe: Connection, timeout_factor: int) -> None:
    faulthandler.enable()  # a crash in torch shows every thread's stack
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ.get("LAW_THREADS", "1")))
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS * timeout_factor),
    )
    _share_groups()
    _gather_and_reduce_as_on_gpus()
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        # By value: torch's own way to send tensors opens a file for each.
        pipe.send_bytes(pickle.dumps(answer))
        del answer
        gc.collect()
        gc.freeze()  # what stays is not looked at again
        torch.compiler.reset()


def _share_groups() -> None:
    """One mesh per shape and one group per set of ranks: each gloo group has threads that wake all the time."""
    import torch.distributed as dist

    from dist_llm.config.derive import AXES
    from dist_llm.engines import native
    from dist_llm.parallel.mesh import build_mesh

    meshes: dict[Any, Any] = {}
    groups: dict[Any, Any] = {}
    new_group = dist.new_group

    def shared_mesh(parallel: Any, device_type: str) -> Any:
        shape = tuple(getattr(parallel, axis) for axis in AXES)
        if shape not in meshes:
            meshes[shape] = build_mesh(parallel, device_type)
        return meshes[shape]

    def shared_group(ranks: Any = None, **options: Any) -> Any:
        key = None if ranks is None else tuple(ranks), repr(sorted(options.items()))
        if key not in groups:
            groups[key] = new_group(ranks, **options)
        return groups[key]

    native.build_mesh = shared_mesh
    dist.new_group = shared_group


def _gather_and_reduce_as_on_gpus() -> None:
    """By collectives, so that laws hold what runs there; test_direct.py holds the messages that CPUs send instead."""
    from dist_llm.parallel import p2p_collectives

    p2p_collectives.uses_p2p = lambda device: False
