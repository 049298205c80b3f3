"""Write tensors one at a time, so that at most one is in memory.

The output of a conversion appears atomically: complete or not at all.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_write import CheckpointGroup, CheckpointWrite
from dist_llm.convert.weights import INDEX_FILE, Weights
from dist_llm.errors import CheckpointError
from dist_llm.io.atomic import create_atomically, open_durably

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Names of tensors that may be all zero: moments, and segment embeddings that only the BERT of Hugging Face has.
MAY_BE_ZERO = re.compile(r"optim\..*|.*token_type_embeddings\.weight")
SHARD_BYTES = 5_000_000_000  # maximum size of a safetensors file, unless one tensor is larger


@contextmanager
def write_atomically(target: Path) -> Iterator[Path]:
    """Yield a temporary path for a new file or directory, which is renamed to `target` if the block succeeds.

    Raises CheckpointError if `target` exists.
    """
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists; name another output, or remove it")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with create_atomically(target) as temporary:
            yield temporary
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error}") from None


def write_native(directory: Path, weights: Weights, files: Mapping[str, bytes]) -> None:
    """Write a checkpoint in our format, with all tensors in fp32 and the small `files`."""
    state = {name: torch.empty(shape, device="meta") for name, shape in weights.shapes.items()}
    write = CheckpointWrite(
        CheckpointGroup(), CheckpointFolder(directory), state, _Float32View(weights), files, few_files=False
    )
    write.start()
    write.finish()


class _Float32View(Mapping[str, Tensor]):
    """A mapping of the tensors of `weights`, which are converted to fp32 when they are read."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return self.weights.read(name).float().contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.shapes)

    def __len__(self) -> int:
        return len(self.weights.shapes)


def write_safetensors(
    directory: Path, weights: Weights, dtype: torch.dtype = torch.float32, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write model.safetensors, or several files of at most `shard_bytes` and an index, as Hugging Face does.

    The writer of the safetensors library would hold a full file in memory.
    """
    shards: list[list[str]] = [[]]
    current_bytes = 0  # of the last shard
    for name, shape in weights.shapes.items():
        tensor_bytes = _count_bytes(shape, dtype)
        if shards[-1] and current_bytes + tensor_bytes > shard_bytes:
            shards.append([])
            current_bytes = 0
        shards[-1].append(name)
        current_bytes += tensor_bytes
    files = [f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        _write_shard(directory / file, weights, names, dtype)
    if len(files) > 1:
        total_bytes = sum(_count_bytes(shape, dtype) for shape in weights.shapes.values())
        file_of = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total_bytes}, "weight_map": file_of}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(path: Path, weights: Weights, names: list[str], dtype: torch.dtype) -> None:
    """Write one safetensors file: header length in 8 bytes, header in JSON, tensors in the order of the header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape = weights.shapes[name]
        begin, end = end, end + _count_bytes(shape, dtype)
        header[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    with open_durably(path) as file:
        file.write(struct.pack("<Q", len(header_bytes)) + header_bytes)
        for name in names:
            file.write(_tensor_bytes(weights.read(name).to(dtype)))


def _count_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def verify_written(written: Weights, source: Weights, dtype: torch.dtype) -> None:
    """Raise CheckpointError unless `written` has the names, shapes and values of `source`, and all values are finite.

    A weight matrix of zeros is also an error, unless MAY_BE_ZERO matches its name.
    """
    names = written.shapes.keys() | source.shapes.keys()
    if differing := sorted(name for name in names if written.shapes.get(name) != source.shapes.get(name)):
        raise CheckpointError(f"the written tensors differ from the source in name or shape: {differing}")
    for name, shape in source.shapes.items():
        expected = _compute_digest(source.read(name).to(dtype))  # a digest, because only one tensor may be in memory
        actual = written.read(name).to(dtype)
        # aminmax allocates no temporary tensor.
        smallest, largest = actual.aminmax() if actual.numel() else (torch.ones(1), torch.ones(1))
        if not (torch.isfinite(smallest) and torch.isfinite(largest)):
            raise CheckpointError(f"{name}: has values that are not finite")
        if _compute_digest(actual) != expected:
            raise CheckpointError(f"{name}: the written values differ from the source")
        if len(shape) > 1 and not MAY_BE_ZERO.fullmatch(name) and smallest == largest == 0:
            raise CheckpointError(f"{name}: is all zero")


def _compute_digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(_tensor_bytes(tensor)).digest()


def _tensor_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
