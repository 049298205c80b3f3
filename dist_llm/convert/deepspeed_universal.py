"""Read universal checkpoints of DeepSpeed: a directory per parameter, with one file for each of its tensors."""

from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dist_llm.convert.deepspeed_files import StoredTensor, load_mapped
from dist_llm.errors import CheckpointError


def read_universal(folder: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the name of each tensor (model.NAME or optim.NAME.KEY), and the tensor, from the files zero/NAME/KEY.pt.

    If ZeRO 3 saved them, the tensors are flat, and only zero/optimizer_state.pt has the step.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    shared_params: dict[str, str] = {}  # second name -> first name
    for path in sorted(folder.glob("*_model_states.pt"))[:1]:
        model = load_mapped(path)
        for group in model.get("param_shapes") or []:
            shapes |= {name: tuple(shape) for name, shape in group.items()}
        shared_params = model.get("shared_params") or {}
    optimizer_file = folder / "zero" / "optimizer_state.pt"
    common_state = load_mapped(optimizer_file) if optimizer_file.exists() else {}
    step = common_state.get("optimizer_state_dict", {}).get("state", {}).get(0, {}).get("step")
    names = sorted(path.name for path in (folder / "zero").iterdir() if path.is_dir())
    for name in names:
        files = {path.stem: path for path in sorted((folder / "zero" / name).glob("*.pt"))}
        tensor = _load_param(files.get("fp32", folder / "zero" / name / "fp32.pt"))
        shape = shapes.get(name, tuple(tensor.shape))
        for key, path in files.items():
            tensor = _load_param(path)
            if tensor.numel() != (1 if key == "step" else prod(shape)):
                raise CheckpointError(f"{path}: has {tensor.numel()} elements, not the {prod(shape)} of {list(shape)}")
            full_name = f"model.{name}" if key == "fp32" else f"optim.{name}.{key}"
            yield full_name, StoredTensor(() if key == "step" else shape, partial(_load_param, path, copy=True))
        if "exp_avg" in files and "step" not in files and step is not None:
            yield f"optim.{name}.step", StoredTensor((), partial(torch.tensor, float(step)))
    for second_name, first_name in shared_params.items():
        if first_name in names and second_name not in names:
            read = partial(_load_param, folder / "zero" / first_name / "fp32.pt", copy=True)
            yield f"model.{second_name}", StoredTensor(shapes[first_name], read)


def _load_param(path: Path, copy: bool = False) -> Tensor:
    """Load the tensor of one file. Without `copy`, it is a view of the memory-mapped file."""
    content = load_mapped(path)
    content = content["param"] if isinstance(content, dict) else content
    tensor = content if isinstance(content, Tensor) else torch.tensor(float(content))
    return tensor.clone() if copy else tensor
