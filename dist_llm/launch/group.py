"""This rank's device, and the process group for the time of a run."""

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


def barrier() -> None:
    """Wait for all ranks; nothing in a world of one."""
    if dist.is_initialized():
        dist.barrier()


def make_synchronous() -> None:
    """For debugging: each kernel is waited for, and gives the same bits each time. Call before CUDA starts."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
