"""Worlds: gloo process groups on this machine, in which law tests run functions on all ranks.

    def sum_of_ranks(offset):  # a function of a module, so that pickle can send it to the processes
        value = torch.tensor([dist.get_rank() + offset])
        dist.all_reduce(value)
        return value.item()

    assert get_world(2).run(sum_of_ranks, offset=10) == [21, 21]  # one result per rank

A world is a list of processes that wait for functions. The session shares one world per number of ranks, started on
first use, since a new process group takes seconds. A world that fails or hangs is stopped, and the next call starts a
new world.
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

from tests.fork_server import get_fork_server_context

COLLECTIVE_TIMEOUT_SECONDS = 90
RESULT_TIMEOUT_SECONDS = 240
TIMEOUT_AFTER_FAILURE_SECONDS = 5  # for the other ranks, which may wait for the failed rank
timeout_factor = 1  # multiplies both timeouts; random_runs.py raises it


class WorldError(RuntimeError):
    """At least one rank raised an exception or died. The message contains the traceback of each failed rank."""


class GlooWorld:
    """`size` processes on this machine, the ranks of one gloo process group."""

    def __init__(self, size: int) -> None:
        self.store = tempfile.NamedTemporaryFile(prefix="dist_llm_world_")  # noqa: SIM115
        self.pipes, self.processes = [], []
        for rank in range(size):
            parent_end, child_end = get_fork_server_context().Pipe()
            process = get_fork_server_context().Process(
                target=_serve, args=(rank, size, self.store.name, child_end, timeout_factor), daemon=True
            )
            process.start()
            child_end.close()
            self.pipes.append(parent_end)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on all ranks; return the results by rank.

        Functions, arguments and results are pickled. Raises WorldError if a rank raises, dies or does not answer in
        time.
        """
        timeout_seconds = RESULT_TIMEOUT_SECONDS * timeout_factor
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        results, errors = [], []
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(timeout_seconds):
                    raise EOFError(f"no answer in {timeout_seconds} s")
                has_succeeded, value = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError) as error:
                self.processes[rank].join(1)
                exit_code = self.processes[rank].exitcode
                has_succeeded = False
                value = f"{error or 'the process died'} (exit code {exit_code}: -N is signal N)"
            results.append(value)
            if not has_succeeded:
                errors.append(f"--- rank {rank}\n{value}")
                timeout_seconds = TIMEOUT_AFTER_FAILURE_SECONDS
        if errors:
            self.stop()
            raise WorldError("\n".join(errors))
        return results

    @property
    def is_alive(self) -> bool:
        """Whether all processes run; false after `stop`."""
        return bool(self.processes) and all(process.is_alive() for process in self.processes)

    def set_paused(self, paused: bool) -> None:
        """Pause the processes or let them continue. The threads of gloo poll all the time, also in an idle world."""
        for process in self.processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGSTOP if paused else signal.SIGCONT)

    def stop(self) -> None:
        """Kill all processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []
        with suppress(FileNotFoundError):  # the processes remove the file if they exit normally
            self.store.close()


_worlds: dict[int, GlooWorld] = {}


def get_world(size: int) -> GlooWorld:
    """Return the shared world of this size, started on first use, and pause all other worlds."""
    for shared_size, shared_world in _worlds.items():
        shared_world.set_paused(shared_size != size)
    if size not in _worlds or not _worlds[size].is_alive:
        _worlds[size] = GlooWorld(size)
    return _worlds[size]


def run_on_ranks(ranks: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Call the function on all ranks of a world, or in this process if `ranks` is 1; return the results by rank."""
    return [function(*args, **kwargs)] if ranks == 1 else get_world(ranks).run(function, *args, **kwargs)


def restart_world(size: int) -> None:
    """Stop the world of this size, so that the next call starts a new world.

    Tests of compiled models call this function. Within one process torch may reuse a graph traced for the mesh of an
    earlier model, and then fails with "device_mesh._get_submesh is not an OpOverload" (torch 2.13).
    """
    if size in _worlds:
        _worlds.pop(size).stop()


@atexit.register
def stop_all() -> None:
    """Stop all worlds."""
    for shared_world in _worlds.values():
        shared_world.stop()


def _serve(rank: int, size: int, store: str, pipe: Connection, timeout_factor: int) -> None:
    """In a process of a world: join the process group, then run the functions that arrive until the pipe closes."""
    faulthandler.enable()  # a crash in torch prints the stacks of all threads
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
            function, args, kwargs = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            result = True, function(*args, **kwargs)
        except BaseException:
            result = False, traceback.format_exc()
        # Plain pickle copies tensors by value. The pickling of torch.multiprocessing opens a file for each tensor.
        pipe.send_bytes(pickle.dumps(result))
        del result
        gc.collect()
        gc.freeze()  # exclude the remaining objects from later collections, which are then faster
        torch.compiler.reset()


def _share_meshes_and_groups() -> None:
    """Reuse one mesh per shape and one process group per set of ranks: each gloo group has threads that poll."""
    import torch.distributed as dist

    from dist_llm.config.derive import AXES
    from dist_llm.engines import native
    from dist_llm.parallel.mesh import build_mesh

    meshes: dict[Any, Any] = {}
    groups: dict[Any, Any] = {}
    new_group = dist.new_group

    def get_shared_mesh(parallel: Any, device_type: str) -> Any:
        shape = tuple(getattr(parallel, axis) for axis in AXES)
        if shape not in meshes:
            meshes[shape] = build_mesh(parallel, device_type)
        return meshes[shape]

    def get_shared_group(ranks: Any = None, **options: Any) -> Any:
        key = None if ranks is None else tuple(ranks), repr(sorted(options.items()))
        if key not in groups:
            groups[key] = new_group(ranks, **options)
        return groups[key]

    native.build_mesh = get_shared_mesh  # type: ignore[attr-defined]
    dist.new_group = get_shared_group  # type: ignore[assignment]


def _use_collectives_as_on_gpus() -> None:
    """Use collectives, as on GPUs. test_p2p_collectives.py tests the point-to-point messages that CPUs use instead."""
    from dist_llm.parallel import p2p_collectives

    p2p_collectives.uses_p2p = lambda device_type: False
