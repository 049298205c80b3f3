"""Tensors by name, read one at a time, from whatever file holds them.

Names are those of our checkpoints, `model.NAME` and `optim.NAME.KEY`, or those of the program that wrote the file.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from dist_llm.errors import CheckpointError

INDEX = "model.safetensors.index.json"


class Weights(Protocol):
    """What can be converted."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor there is."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        ...


class SafetensorsWeights:
    """A directory in Hugging Face's form: one safetensors file, or several and an index."""

    def __init__(self, directory: Path) -> None:
        files = sorted(directory.glob("*.safetensors"))
        if (index := directory / INDEX).exists():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if missing := sorted(name for name in names if not (directory / name).exists()):
                raise CheckpointError(f"{directory}: {missing[0]}, which its index names, is missing")
            files = [directory / name for name in sorted(names)]
        if not files:
            raise CheckpointError(f"{directory}: has no .safetensors file")
        self.places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    self.places[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        with _opened(self.places[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # of a type that is its library's own
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


class DictWeights:
    """Tensors of a dictionary, such as a file of `torch.save` holds, mapped into memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class MadeWeights:
    """Tensors that are made when they are read."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], Tensor]) -> None:
        self.shapes, self.make = shapes, make

    def read(self, name: str) -> Tensor:
        return self.make(name)


def load_torch(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote, its tensors mapped and not read; nothing in it is run."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of many kinds, by what the file is
        raise CheckpointError(f"{path}: cannot be read as a file of torch.save: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__} and not a dictionary")
    return content
