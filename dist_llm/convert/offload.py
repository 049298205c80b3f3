"""Load a model that is larger than the memory, with accelerate.

Blocks stay on GPUs, in host memory or on disk until the forward pass uses them.
"""

import atexit
import logging
import shutil
import tempfile
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

GPU_WEIGHT_FRACTION = 0.7  # share of the memory of a GPU for weights


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
    # The head may use the embedding outside of its forward call, so both must stay loaded. Only blocks are offloaded.
    resident_names = [name for name, _ in model.named_children() if name != "blocks"]
    main_device: int | str = "cpu" if device.type == "cpu" else device.index or 0
    # The other 30% of the memory of a GPU are for the block that runs, and for activations.
    free_bytes = {name: round(GPU_WEIGHT_FRACTION * size) for name, size in get_max_memory().items() if name != "cpu"}
    free_bytes["cpu"] = memory_bytes
    free_bytes[main_device] -= _count_bytes(*(getattr(model, name) for name in resident_names))
    if free_bytes[main_device] < 0:
        raise ConfigError(
            f"--memory: embedding and head need {-free_bytes[main_device] / 2**20:.1f} MiB more than available"
        )
    device_map: dict[str, int | str] = dict.fromkeys(resident_names, main_device)
    for name, block in model.blocks.items():
        target = next((target for target, size in free_bytes.items() if size >= _count_bytes(block)), "disk")
        device_map[f"blocks.{name}"] = target
        if target != "disk":
            free_bytes[target] -= _count_bytes(block)
    saved = NativeWeights(path)
    names = [name for name in saved.shapes if name.startswith("model.")]
    weights = LazyWeights(
        {name.removeprefix("model."): saved.shapes[name] for name in names}, lambda name: saved.read(f"model.{name}")
    )
    # Silences the warning that modules are offloaded.
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--offload: {folder} cannot be created: {error.strerror}") from None
    offload_dir = Path(tempfile.mkdtemp(prefix="blocks_", dir=folder))
    with tempfile.TemporaryDirectory(prefix="weights_", dir=folder) as weights_dir:
        write_safetensors(Path(weights_dir), weights)
        offloaded_model: Decoder = load_checkpoint_and_dispatch(
            model, weights_dir, device_map=device_map, offload_folder=offload_dir
        )
    atexit.register(shutil.rmtree, offload_dir, ignore_errors=True)
    return offloaded_model.eval()


def _count_bytes(*modules: nn.Module) -> int:
    """Return the bytes of all parameters; shared parameters count once."""
    parameters = {parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
