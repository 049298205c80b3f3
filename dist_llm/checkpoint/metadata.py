"""torch's `.metadata` of a distributed checkpoint, read without running what a pickle may name.

It is a pickle, which may call anything when it is loaded. Here it may make the classes that torch writes, and dtypes;
and each tensor must lie in a file of the same directory.
"""

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

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
    for each in metadata.storage_data.values():
        name = getattr(each, "relative_path", None)
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{where}: names a file outside the checkpoint: {name!r}")
    return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _CLASSES or is_dtype:
            return super().find_class(module, name)
        raise CheckpointError(f"would run {module}.{name} when it is loaded; it was not written by torch")
