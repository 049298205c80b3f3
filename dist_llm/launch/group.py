"""This rank's device, and the process group for the time of a run."""

import ctypes
import gc
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_llm.errors import ConfigError
from dist_llm.launch.world import World


def device_of(world: World) -> torch.device:
    """This rank's GPU where there are GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {world.rank} on {world.host} wants GPU {world.local_rank}, but there are only "
            f"{torch.cuda.device_count()}; start at most that many processes per node"
        )
    return torch.device("cuda", world.local_rank)


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU: what a tensor leaves goes to the next one, and not back to the system.

    glibc would map each large tensor anew, and the system fills it with zeros page by page: a tenth of a step's time
    and more. All threads share one heap, since backward, a thread of its own, can use what forward frees.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if device.type == "cpu" and mallopt is not None:  # glibc's; constants as in its malloc.h
        trim_threshold, mmap_max, arena_max = -1, -4, -8
        for option, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, 2**31 - 1)):
            mallopt(option, value)


@contextmanager
def process_group(
    world: World, device: torch.device, timeout_seconds: float = 600, alone: bool = False
) -> Iterator[None]:
    """The default process group for the time of the block; for a world of one only if `alone`.

    Whoever built models inside must have dropped them by the end: a 4-rank FSDP job that still
    holds one at interpreter exit dies one time in five ("terminate called without an active exception").
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world.size == 1 and not alone:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # c10d tells of each barrier without a device id through a warning; the device is given where it is a GPU.
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    with _meeting():
        dist.init_process_group(
            backend,
            store=torch._C._distributed_c10d.HashStore() if world.size == 1 else None,
            rank=world.rank,
            world_size=world.size,
            timeout=timedelta(seconds=timeout_seconds),
            device_id=device if device.type == "cuda" else None,
        )
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def _meeting() -> Iterator[None]:
    """Raises ConfigError where the ranks cannot meet: the port is in use, the host is unknown, a rank never comes."""
    try:
        yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        reason = str(error).strip().splitlines()[0]
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"environment: {place}: another program uses this port; set another MASTER_PORT "
                "(torchrun: --master-port or --rdzv-endpoint), or let torchrun find one with --standalone"
            ) from error
        raise ConfigError(f"environment: {place}: the ranks cannot meet there: {reason}") from error


def barrier() -> None:
    """Wait for all ranks; nothing in a world of one."""
    if dist.is_initialized():
        dist.barrier()


def make_synchronous() -> None:
    """For debugging: each kernel is waited for, and gives the same bits each time. Call before CUDA starts."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
