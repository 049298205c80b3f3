"""Worlds: process groups of gloo ranks on this machine that run one test function after another.

Each world size has one world, started on first use. A world that fails or hangs is stopped, and the next call starts a
new one.
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

from tests.warm import fork_server_context

COLLECTIVE_TIMEOUT_SECONDS = 90
ANSWER_TIMEOUT_SECONDS = 240
timeout_factor = 1  # factor of both timeouts; raise it where other work delays a run


class WorldError(RuntimeError):
    """At least one rank raised. The message contains the traceback of each failed rank."""


class GlooWorld:
    """`size` processes with a default process group."""

    def __init__(self, size: int) -> None:
        self.store = tempfile.NamedTemporaryFile(prefix="dist_llm_world_")  # noqa: SIM115
        self.pipes, self.processes = [], []
        for rank in range(size):
            parent_end, child_end = fork_server_context().Pipe()
            process = fork_server_context().Process(
                target=_serve, args=(rank, size, self.store.name, child_end, timeout_factor), daemon=True
            )
            process.start()
            child_end.close()
            self.pipes.append(parent_end)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on all ranks; return the results by rank."""
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
                ok, value = (
                    False,
                    f"{error or 'the process died'} (exit code {self.processes[rank].exitcode}: -N is signal N)",
                )
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
        """Stop or continue the processes. gloo's threads poll all the time, even when the world is idle."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGSTOP if pause else signal.SIGCONT)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
        with suppress(FileNotFoundError):  # the processes remove the file if they exit normally
            self.store.close()


_worlds: dict[int, GlooWorld] = {}


def world(size: int) -> GlooWorld:
    """Return the shared world of this size, started on first use. All other worlds are paused."""
    for other_size, shared in _worlds.items():
        shared.pause(other_size != size)
    if size not in _worlds or not _worlds[size].alive:
        _worlds[size] = GlooWorld(size)
    return _worlds[size]


def restart_world(size: int) -> None:
    """Stop the world of this size, so that the next call starts a new one.

    Tests of compiled models need it: torch may reuse what it traced for an earlier model's mesh, which then fails with
    "device_mesh._get_submesh is not an OpOverload" (torch 2.13). A user's process has one model.
    """
    if size in _worlds:
        _worlds.pop(size).stop()


@atexit.register
def stop_all() -> None:
    for shared in _worlds.values():
        shared.stop()


def _serve(rank: int, size: int, store: str, pipe: Connection, timeout_factor: int) -> None:
    faulthandler.enable()  # a crash in torch shows every thread's stack
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ.get("LAW_THREADS", "1")))
    warnings.simplefilter("ignore")
    from dist_llm.compat import use_one_thread_per_gloo_group

    use_one_thread_per_gloo_group()
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_SECONDS * timeout_factor),
    )
    _share_meshes_and_groups()
    _use_collectives_as_on_gpus()
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        # Pickled by value: torch's own tensor pickling opens a file for each tensor.
        pipe.send_bytes(pickle.dumps(answer))
        del answer
        gc.collect()
        gc.freeze()  # the remaining objects are excluded from later collections
        torch.compiler.reset()


def _share_meshes_and_groups() -> None:
    """Reuse one mesh per shape and one process group per set of ranks.

    Each gloo group has threads that poll all the time.
    """
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


def _use_collectives_as_on_gpus() -> None:
    """Use collectives, as GPUs do. test_p2p_collectives.py covers the point-to-point messages that CPUs use instead."""
    from dist_llm.parallel import p2p_collectives

    p2p_collectives.uses_p2p = lambda device: False
