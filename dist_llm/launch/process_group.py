"""Select the device of this rank, and create the process group of a run."""

import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dist_llm.compat import use_one_thread_per_gloo_group
from dist_llm.errors import ConfigError
from dist_llm.launch.world import World

_rendezvous_stores: list[dist.Store] = []  # empty, or the store that the rendezvous of this process created
_group_indices = count()


def select_device(world: World) -> torch.device:
    """Return the GPU of this rank, or the CPU on a machine without GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {world.rank} on {world.host} has local rank {world.local_rank} and needs {world.local_rank + 1} "
            f"GPUs, but the node has only {torch.cuda.device_count()}; start at most that many processes per node"
        )
    return torch.device("cuda", world.local_rank)


@contextmanager
def process_group(
    world: World, device: torch.device, timeout_seconds: float = 600, even_if_single: bool = False
) -> Iterator[None]:
    """Create the default process group for the block. A single process gets one only with `even_if_single`.

    The caller must drop all models before the block ends. A 4-rank FSDP job that still holds a model at interpreter
    exit crashes one time in five ("terminate called without an active exception").
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.world_size == 1 and not even_if_single:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Silences the warning of c10d for each barrier without a device id. On GPUs, the group below has the device.
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    use_one_thread_per_gloo_group(filter(None, os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")))
    with _convert_rendezvous_errors():
        dist.init_process_group(
            backend,
            store=_create_store(world, timeout_seconds),
            rank=world.rank,
            world_size=world.world_size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()


def _create_store(world: World, timeout_seconds: float) -> dist.Store:
    """Return an empty store for one process group.

    The ranks rendezvous once per process. A second process group, as in a script that trains and evaluates, uses the
    same store with a new prefix. Otherwise it would read the addresses of the first group.
    """
    if world.world_size == 1:
        return dist.HashStore()
    if not _rendezvous_stores:
        store, _, _ = next(
            rendezvous("env://", world.rank, world.world_size, timeout=timedelta(seconds=timeout_seconds))
        )
        store.set_timeout(timedelta(seconds=timeout_seconds))
        _rendezvous_stores.append(store)
    return dist.PrefixStore(f"group_{next(_group_indices)}", _rendezvous_stores[0])


@contextmanager
def _convert_rendezvous_errors() -> Iterator[None]:
    """Convert rendezvous failures to ConfigError: the port is in use, the host is unknown, or a rank is missing."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        reason = str(error).strip().splitlines()[0]
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"environment: {address}: the port is in use; set MASTER_PORT to a free port "
                "(torchrun: --master-port or --rdzv-endpoint), or let torchrun find one with --standalone"
            ) from error
        raise ConfigError(f"environment: {address}: rendezvous failed: {reason}") from error


def barrier() -> None:
    """Wait for all ranks. Return at once if there is no process group."""
    if dist.is_initialized():
        dist.barrier()


def make_synchronous() -> None:
    """For debugging, wait for each kernel and use deterministic kernels. Call this before CUDA is initialized."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
