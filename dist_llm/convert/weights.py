"""Tensors by name that are read one at a time, from any kind of file.

Names are those of our checkpoints, `model.NAME` and `optim.NAME.KEY`, or those of the program that wrote the file.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from dist_llm.errors import CheckpointError

INDEX = "model.safetensors.index.json"
TORCH_FILE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ZIP_START = b"PK\x03\x04"  # files of torch.save before version 1.6 are not zip archives, and cannot be memory-mapped


class Weights(Protocol):
    """Weights that can be converted."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of all tensors."""
        ...

    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU."""
        ...


class SafetensorsWeights:
    """A directory in Hugging Face's format: one safetensors file, or several and an index."""

    def __init__(self, directory: Path) -> None:
        files = _list_indexed_files(directory, INDEX) or sorted(directory.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{directory}: has no .safetensors file")
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            with _convert_read_errors(path), safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 # safe_open is not a mapping
                    self.files[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        path = self.files[name]
        with _convert_read_errors(path), safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_huggingface(directory: Path) -> Weights:
    """Open the tensors in a Hugging Face directory: the .safetensors files, or else pytorch_model.bin."""
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is not a directory; give the one that holds config.json and the weights")
    if (directory / INDEX).exists() or any(directory.glob("*.safetensors")):
        return SafetensorsWeights(directory)
    files = _list_indexed_files(directory, TORCH_INDEX) or [directory / TORCH_FILE]
    if not files[0].exists():
        raise CheckpointError(f"{directory}: has neither .safetensors files nor {TORCH_FILE}; copy the weights there")
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= check_only_tensors(load_torch(path), str(path))
    return DictWeights(tensors)


def _list_indexed_files(directory: Path, name: str) -> list[Path]:
    """Return the files that an index lists; an empty list if there is no index.

    Raises CheckpointError if the index is damaged, a file is missing, or a file is outside the directory.
    """
    path = directory / name
    if not path.exists():
        return []
    try:
        files = set(json.loads(path.read_bytes())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not an index of weights: {error!r}; copy it again") from None
    for file in files:
        if not isinstance(file, str) or "/" in file or "\0" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{path}: names a file outside its directory: {file!r}; get the weights elsewhere")
        if not (directory / file).is_file():
            raise CheckpointError(f"{directory}: {file}, which its index names, is missing; copy it there")
    return [directory / file for file in sorted(files)]


@contextmanager
def _convert_read_errors(path: Path) -> Iterator[None]:
    """Within the block, any error becomes a CheckpointError of the file: safetensors raises its own types."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; copy it again") from None


class DictWeights:
    """Tensors of a dictionary, such as the memory-mapped content of a `torch.save` file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class LazyWeights:
    """Tensors that are computed when they are read."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], make: Callable[[str], Tensor]) -> None:
        self.shapes, self.make = shapes, make

    def read(self, name: str) -> Tensor:
        return self.make(name)


def load_torch(path: Path) -> dict[Any, Any]:
    """Load a `torch.save` file with memory-mapped tensors; nothing in it is run.

    Raises CheckpointError if it is not a dictionary, or a tensor claims more bytes than the file has.
    """
    try:
        with path.open("rb") as file:
            mapped = file.read(len(ZIP_START)) == ZIP_START
        content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # the type depends on the file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a file of torch.save: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: contains a {type(content).__name__} instead of a dictionary")
    check_tensor_sizes(content, path)
    return content


def check_tensor_sizes(content: object, path: Path) -> None:
    """Raise CheckpointError if a tensor, anywhere in `content`, is not plain or is larger than its file.

    A few bytes can describe any number of elements (a stride of 0, a sparse layout), which a copy would allocate.
    """
    size = path.stat().st_size
    todo = [content]
    seen: set[int] = set()  # a pickle may contain a list that contains itself
    while todo:
        item = todo.pop()
        if isinstance(item, Tensor):
            if item.layout != torch.strided or item.device.type != "cpu" or item.numel() * item.element_size() > size:
                raise CheckpointError(
                    f"{path}: a tensor {list(item.shape)} ({item.layout}, {item.device}) is larger than the file or no "
                    "plain tensor; save a contiguous copy of it with torch.save"
                )
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            todo.extend(item.values() if isinstance(item, dict) else item)


def check_only_tensors(content: object, where: str) -> dict[str, Tensor]:
    """Return `content` if it is a dictionary of named tensors. Raises CheckpointError, prefixed with `where`,
    otherwise."""
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: contains a {type(content).__name__} instead of a dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{where}: {name!r} is a {type(tensor).__name__} instead of a tensor")
    return content
