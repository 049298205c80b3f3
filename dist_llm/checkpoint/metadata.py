"""torch's `.metadata` of a distributed checkpoint, read without running what a pickle may name.

It is a pickle, which may call anything when it is loaded. Here it may make the classes that torch writes, and dtypes.
Each tensor must lie in files of the same directory, and be no larger than its bytes there.
"""

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dist_llm.errors import CheckpointError

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}


def load_metadata(content: bytes, where: str) -> Metadata:
    """Raises CheckpointError, beginning with `where`, for anything but the metadata of a checkpoint."""
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{where}: is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "storage_data", None), dict):
        raise CheckpointError(f"{where}: is not the metadata of a checkpoint")
    try:
        _check_sizes(metadata, where)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:  # a number or a list of another type
        raise CheckpointError(f"{where}: is damaged: {type(error).__name__}: {error}") from None
    for each in metadata.storage_data.values():
        name = getattr(each, "relative_path", None)
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{where}: names a file outside the checkpoint: {name!r}")
    return metadata


def _check_sizes(metadata: Metadata, where: str) -> None:
    """Raises CheckpointError where a tensor is larger than its chunks, or a chunk than its bytes in the file."""
    bytes_of: dict[tuple[str, tuple[int, ...]], int] = {}
    for index, stored in metadata.storage_data.items():
        if stored.offset < 0 or stored.length < 0:
            raise CheckpointError(f"{where}: {index.fqn} lies at byte {stored.offset}, {stored.length} bytes long")
        bytes_of[index.fqn, tuple(index.offset or ())] = stored.length
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        covered = 0
        for chunk in entry.chunks:
            covered += (elements := prod(chunk.sizes))
            size = elements * entry.properties.dtype.itemsize
            stored_bytes = bytes_of.get((name, tuple(chunk.offsets)), bytes_of.get((name, ()), 0))
            if min(chunk.sizes, default=0) < 0 or size > stored_bytes:
                raise CheckpointError(f"{where}: {name} needs {size} bytes, but has {stored_bytes} in the checkpoint")
        if min(entry.size, default=0) < 0 or prod(entry.size) > covered:
            raise CheckpointError(f"{where}: {name} has shape {list(entry.size)}, but {covered} elements in its chunks")


@contextmanager
def convert_read_errors(folder: object) -> Iterator[None]:
    """Within the block what torch raises where a rank cannot read is a CheckpointError, which names the first rank."""
    try:
        yield
    except CheckpointException as error:  # no Exception
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError(
            f"{folder}: its tensors cannot be read on rank {rank}: {type(cause).__name__}: {cause}; check it with "
            "tools/convert_checkpoint.py verify, and use another checkpoint if it is damaged"
        ) from cause


# Python's own and not C's, which allocates what a damaged number asks for.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _CLASSES or is_dtype:
            return super().find_class(module, name)
        raise CheckpointError(f"would run {module}.{name} when it is loaded; it was not written by torch")
