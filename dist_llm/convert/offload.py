"""Load a model that is larger than the memory, with accelerate.

Blocks stay on GPUs, in host memory or on disk until the forward pass uses them.
"""

import atexit
import logging
import shutil
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.weights import LazyWeights
from dist_llm.convert.write_weights import write_safetensors
from dist_llm.errors import ConfigError
from dist_llm.models.build_model import build_model
from dist_llm.models.decoder import Decoder

# Share of the memory of a GPU for weights. The rest is for the block that runs, and for activations.
GPU_WEIGHT_FRACTION = 0.7


def load_offloaded(path: Path, config: ModelConfig, device: torch.device, folder: Path, memory_bytes: int) -> Decoder:
    """Load the model of a checkpoint, with at most `memory_bytes` of weights in host memory.

    Blocks that fit neither in host memory nor on a GPU are written to a new directory in `folder`, which is removed
    when the process ends. While loading, `folder` also has a copy of all weights. Raises ConfigError if accelerate is
    not installed, `folder` cannot be created, or the memory of the device is too small for embedding and head.
    """
    if find_spec("accelerate") is None:
        raise ConfigError("--offload: accelerate is not installed; pip install 'dist-llm[accelerate]'")
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from accelerate.utils import get_max_memory

    with init_empty_weights():
        model = build_model(config)
    free_bytes = {name: round(GPU_WEIGHT_FRACTION * size) for name, size in get_max_memory().items() if name != "cpu"}
    free_bytes["cpu"] = memory_bytes
    device_map = _assign_devices(model, "cpu" if device.type == "cpu" else device.index or 0, free_bytes)
    # Silences the warning that modules are offloaded.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--offload: {folder} cannot be created: {error.strerror}") from None
    offload_dir = Path(tempfile.mkdtemp(prefix="blocks_", dir=folder))
    with tempfile.TemporaryDirectory(prefix="weights_", dir=folder) as weights_dir:
        write_safetensors(Path(weights_dir), _read_model_weights(path))
        offloaded_model: Decoder = load_checkpoint_and_dispatch(
            model, weights_dir, device_map=device_map, offload_folder=offload_dir
        )
    atexit.register(shutil.rmtree, offload_dir, ignore_errors=True)
    return offloaded_model.eval()


def _assign_devices(
    model: Decoder, main_device: int | str, free_bytes: Mapping[int | str, int]
) -> dict[str, int | str]:
    """Return {module: device of its weights}: the index of a GPU, "cpu" or "disk".

    `free_bytes` is the memory for weights of each device. Embedding and head are on `main_device`.
    """
    remaining_bytes = dict(free_bytes)
    # The head may use the embedding outside of its forward call, so both must stay loaded. Only blocks are offloaded.
    resident_names = [name for name, _ in model.named_children() if name != "blocks"]
    remaining_bytes[main_device] -= _count_bytes(*(getattr(model, name) for name in resident_names))
    if remaining_bytes[main_device] < 0:
        missing_mib = -remaining_bytes[main_device] / 2**20
        limit = "--memory" if main_device == "cpu" else f"{GPU_WEIGHT_FRACTION:.0%} of the memory of the GPU"
        raise ConfigError(
            f"{limit}: embedding and head must stay in memory, and need {missing_mib:.1f} MiB more than this limit"
        )
    device_map: dict[str, int | str] = dict.fromkeys(resident_names, main_device)
    for name, block in model.blocks.items():
        target = next((target for target, size in remaining_bytes.items() if size >= _count_bytes(block)), "disk")
        device_map[f"blocks.{name}"] = target
        if target != "disk":
            remaining_bytes[target] -= _count_bytes(block)
    return device_map


def _read_model_weights(checkpoint: Path) -> LazyWeights:
    """Return a view of the weights of a checkpoint, without the prefix `model.`."""
    saved = NativeWeights(checkpoint)
    names = [name for name in saved.shapes if name.startswith("model.")]
    return LazyWeights(
        {name.removeprefix("model."): saved.shapes[name] for name in names}, lambda name: saved.read(f"model.{name}")
    )


def _count_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all parameters; shared parameters count once."""
    parameters = {parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
