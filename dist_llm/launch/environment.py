"""Prepare the environment of NCCL, DeepSpeed and accelerate, and check it against the config."""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.config.load import Violation, raise_violations
from dist_llm.config.schema import Config


def set_network_variables(variables: Mapping[str, str | int]) -> None:
    """Set the environment variables of section `run.network`. Call this before the process group is created.

    Raises ConfigError if the environment already sets a variable to a different value.
    """
    raise_violations(
        [
            Violation(
                (f"run.network.{name}",), f"is {value}, but the environment has {os.environ[name]}; change one of them"
            )
            for name, value in variables.items()
            if os.environ.get(name, str(value)) != str(value)
        ]
    )
    os.environ.update({name: str(value) for name, value in variables.items()})


def prepare_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed, let it adopt the existing process group, and reduce its logging. Return the module.

    On CPUs the shared-memory kernel of DeepSpeed is disabled, because it would have to be compiled first.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning, "torch.distributed")  # DeepSpeed uses old names
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl", verbose=False)
    return deepspeed


def prepare_accelerate() -> Any:
    """Import accelerate, and set the variables from which it reads the rank. Return the module.

    accelerate adopts the existing process group.
    """
    world_size = dist.get_world_size()
    if world_size > 1:
        variables = {"RANK": dist.get_rank(), "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost"}
        for name, value in variables.items():
            os.environ.setdefault(name, str(value))
    # If this variable is set, accelerate accepts only the DeepSpeed config that `accelerate launch` was given.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    # Without this variable, accelerate changes the number of threads.
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    import accelerate

    return accelerate


def check_accelerate(
    config: Config, device: torch.device, environ: Mapping[str, str] = os.environ
) -> Iterator[Violation]:
    """Yield violations where `accelerate launch` or this machine contradicts a config with engine: accelerate."""
    plugin, plugin_key, deepspeed = config.accelerate.plugin, "accelerate.plugin", config.deepspeed
    if plugin == "fsdp2" and device.type == "cpu":
        yield Violation((plugin_key,), "fsdp2 needs GPUs: on CPUs accelerate silently does something else; set ddp")
    precision = {"fp32": "no"}.get(config.precision, config.precision)
    # Environment variable -> (config key, values that agree with the config). The first value is the recommended one.
    expected: dict[str, tuple[str, list[str]]] = {
        "ACCELERATE_MIXED_PRECISION": ("precision", [precision]),
        "ACCELERATE_USE_DEEPSPEED": (plugin_key, [str(plugin == "deepspeed").lower()]),
        "ACCELERATE_USE_FSDP": (plugin_key, [str(plugin == "fsdp2").lower()]),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("deepspeed.stage", [str(deepspeed.stage)]),
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("deepspeed.config", [deepspeed.config or "none"]),
        # accelerate divides the loss by this number of microbatches. Our loss is already divided.
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("data.micro_batch", ["1"]),
        "ACCELERATE_GRADIENT_CLIPPING": ("optim.clip", [str(config.optim.clip or 0.0), "none"]),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("deepspeed.offload_optimizer", [deepspeed.offload_optimizer]),
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("deepspeed.offload_params", [deepspeed.offload_params]),
    }
    for name, (config_key, values) in expected.items():
        if (value := environ.get(name)) is not None and value not in values:
            advice = "change one of them"
            if name == "ACCELERATE_GRADIENT_ACCUMULATION_STEPS":
                advice = "launch without gradient accumulation, because dist_llm accumulates over microbatches itself"
            yield Violation(
                (config_key, "engine"), f"needs {name}={values[0]}, but accelerate was launched with {value}; {advice}"
            )
