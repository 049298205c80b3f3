"""What other libraries want in the environment before they are imported."""

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.errors import ConfigError


def prepare_deepspeed(device: torch.device) -> Any:
    """The module, which takes up the process group that there is; quieter than it is by itself.

    On CPUs it goes without the kernels that it would compile first.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning, "torch.distributed")  # of torch 2.13's names
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
    return deepspeed


def prepare_accelerate(precision: str) -> Any:
    """The module, told of the process group that there is.

    Raises ConfigError where `accelerate launch` was given another precision.
    """
    if dist.get_world_size() > 1:  # it looks here, though it takes up the group
        known = {
            "RANK": dist.get_rank(),
            "WORLD_SIZE": dist.get_world_size(),
            "LOCAL_RANK": 0,
            "MASTER_ADDR": "localhost",
        }
        for name, value in known.items():
            os.environ.setdefault(name, str(value))
    wanted = {"fp32": "no"}.get(precision, precision)
    if (launched := os.environ.get("ACCELERATE_MIXED_PRECISION", wanted)) != wanted:
        raise ConfigError(
            f"precision: {precision} is {wanted} to accelerate, but it was launched with mixed precision {launched}; "
            "set one to the other"
        )
    import accelerate

    return accelerate
