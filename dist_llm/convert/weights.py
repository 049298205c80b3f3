"""Read tensors by name, one at a time, from several kinds of files.

The names are those of our checkpoints, `model.NAME` and `optim.NAME.KEY`, or those of the program that wrote the file.
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

INDEX_FILE = "model.safetensors.index.json"
TORCH_FILE, TORCH_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
ZIP_MAGIC = b"PK\x03\x04"  # files that torch before 1.6 saved are not zip archives, and cannot be memory-mapped


class Weights(Protocol):
    """Tensors by name: the source of a conversion."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of all tensors."""
        ...

    def read(self, name: str) -> Tensor:
        """Read one tensor to the CPU."""
        ...


class SafetensorsWeights:
    """The tensors of a directory in the format of Hugging Face: one safetensors file, or several and an index."""

    def __init__(self, directory: Path) -> None:
        files = _list_indexed_files(directory, INDEX_FILE) or sorted(directory.glob("*.safetensors"))
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
    if (directory / INDEX_FILE).exists() or any(directory.glob("*.safetensors")):
        return SafetensorsWeights(directory)
    files = _list_indexed_files(directory, TORCH_INDEX_FILE) or [directory / TORCH_FILE]
    if not files[0].exists():
        raise CheckpointError(f"{directory}: has neither .safetensors files nor {TORCH_FILE}; copy the weights there")
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= require_tensors(load_torch(path), str(path))
    return DictWeights(tensors)


def _list_indexed_files(directory: Path, name: str) -> list[Path]:
    """Return the files that the index `name` lists; an empty list if there is no index.

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
    """Within the block, convert any error to a CheckpointError that names the file."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; copy it again") from None


class DictWeights:
    """The tensors of a dictionary, such as the memory-mapped content of a `torch.save` file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


class LazyWeights:
    """Tensors that the function `compute(name)` computes when they are read."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], compute: Callable[[str], Tensor]) -> None:
        self.shapes, self.compute = shapes, compute

    def read(self, name: str) -> Tensor:
        return self.compute(name)


def load_torch(path: Path) -> dict[Any, Any]:
    """Load a `torch.save` file with memory-mapped tensors, without running code from the file.

    Raises CheckpointError if the content is not a dictionary, or a tensor claims more bytes than the file has.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        content = torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except Exception as error:  # the type depends on the file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: cannot be read as a file of torch.save: {reason}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: contains a {type(content).__name__} instead of a dictionary")
    check_tensor_sizes(content, path)
    return content


def check_tensor_sizes(content: object, path: Path) -> None:
    """Raise CheckpointError if a tensor anywhere in `content` is not a dense CPU tensor or is larger than its file.

    A few bytes can describe any number of elements (by a stride of 0 or a sparse layout), which a copy would allocate.
    """
    file_bytes = path.stat().st_size
    pending = [content]
    visited_ids: set[int] = set()  # a pickle may contain a list that contains itself
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            is_dense = item.layout == torch.strided and item.device.type == "cpu"
            if not is_dense or item.numel() * item.element_size() > file_bytes:
                raise CheckpointError(
                    f"{path}: a tensor {list(item.shape)} ({item.layout}, {item.device}) is larger than the file or no "
                    "plain tensor; save a contiguous copy of it with torch.save"
                )
        elif isinstance(item, dict | list | tuple) and id(item) not in visited_ids:
            visited_ids.add(id(item))
            pending.extend(item.values() if isinstance(item, dict) else item)


def require_tensors(content: object, location: str) -> dict[str, Tensor]:
    """Return `content` if it is a dictionary of named tensors.

    Otherwise raise CheckpointError, which names `location`.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{location}: contains a {type(content).__name__} instead of a dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{location}: {name!r} is a {type(tensor).__name__} instead of a tensor")
    return content
