"""Read the `.metadata` file of a torch distributed checkpoint safely.

The file is a pickle, which could run any code. This unpickler accepts only the classes that torch writes, and dtypes.
Each tensor must be in a file of the same directory, and must not be larger than its bytes in that file.
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

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED_CLASSES = {  # (module, name)
    (_METADATA_MODULE, "BytesStorageMetadata"),
    (_METADATA_MODULE, "ChunkStorageMetadata"),
    (_METADATA_MODULE, "Metadata"),
    (_METADATA_MODULE, "MetadataIndex"),
    (_METADATA_MODULE, "StorageMeta"),
    (_METADATA_MODULE, "TensorProperties"),
    (_METADATA_MODULE, "TensorStorageMetadata"),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}


def load_metadata(content: bytes, location: str) -> Metadata:
    """Parse the metadata of a checkpoint. Raises CheckpointError, which names `location`, for any other content."""
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
    except CheckpointError as error:
        raise CheckpointError(f"{location}: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise CheckpointError(f"{location}: is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "storage_data", None), dict):
        raise CheckpointError(f"{location}: is not the metadata of a checkpoint")
    try:
        _check_sizes(metadata, location)
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:  # a field has another type
        raise CheckpointError(f"{location}: is damaged: {type(error).__name__}: {error}") from None
    for stored in metadata.storage_data.values():
        name = getattr(stored, "relative_path", None)
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{location}: names a file outside the checkpoint: {name!r}")
    return metadata


def _check_sizes(metadata: Metadata, location: str) -> None:
    """Raise CheckpointError if a tensor is larger than its chunks, or a chunk is larger than its bytes in the file."""
    chunk_bytes: dict[tuple[str, tuple[int, ...]], int] = {}
    for index, stored in metadata.storage_data.items():
        if stored.offset < 0 or stored.length < 0:
            raise CheckpointError(f"{location}: {index.fqn} lies at byte {stored.offset}, {stored.length} bytes long")
        chunk_bytes[index.fqn, tuple(index.offset or ())] = stored.length
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        num_covered = 0  # elements of the tensor in its chunks
        for chunk in entry.chunks:
            num_elements = prod(chunk.sizes)
            num_covered += num_elements
            chunk_size = num_elements * entry.properties.dtype.itemsize
            stored_bytes = chunk_bytes.get((name, tuple(chunk.offsets)), chunk_bytes.get((name, ()), 0))
            if min(chunk.sizes, default=0) < 0 or chunk_size > stored_bytes:
                raise CheckpointError(
                    f"{location}: {name} needs {chunk_size} bytes, but has {stored_bytes} in the checkpoint"
                )
        if min(entry.size, default=0) < 0 or prod(entry.size) > num_covered:
            raise CheckpointError(
                f"{location}: {name} has shape {list(entry.size)}, but {num_covered} elements in its chunks"
            )


@contextmanager
def convert_read_errors(folder: object) -> Iterator[None]:
    """Within the block, convert read errors of torch to a CheckpointError that names the first failing rank."""
    try:
        yield
    except CheckpointException as error:  # not a subclass of Exception
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError(
            f"{folder}: its tensors cannot be read on rank {rank}: {type(cause).__name__}: {cause}; check it with "
            "dist-llm convert verify, and use another checkpoint if it is damaged"
        ) from cause


# The Python unpickler is used, because the C unpickler allocates the number of bytes in a damaged length field.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _ALLOWED_CLASSES or is_dtype:
            return super().find_class(module, name)
        raise CheckpointError(f"would run {module}.{name} when it is loaded; it was not written by torch")
