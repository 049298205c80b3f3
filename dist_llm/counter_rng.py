"""Counter-based random numbers: a pure function of (parameter name, element index), equal on every rank and layout."""

import math
from collections.abc import Iterator, Sequence
from types import EllipsisType

import torch
from torch import Tensor

from dist_llm.io.hashing import digest64

CHUNK_ELEMENTS = 1 << 20  # elements processed at a time, so that temporaries stay in cache
GPU_CHUNK_FACTOR = 16  # larger on a GPU, where a kernel launch costs more than a cache saves


def hash64(text: str) -> int:
    """Return a signed 64-bit hash of `text`."""
    return int.from_bytes(digest64(text.encode()), "little", signed=True)


def hash_seed(*numbers: int) -> int:
    """Return a 63-bit seed that depends on all of `numbers` and on their order."""
    return int.from_bytes(digest64(repr(numbers).encode()), "little") >> 1


def iter_element_ids(
    local: Tensor, shape: Sequence[int], offset: Sequence[int]
) -> Iterator[tuple[slice | EllipsisType, Tensor]]:
    """Yield (rows, element ids) in chunks of rows of `local`.

    An id is an element's flat index in the full tensor of `shape`.

    `local` is the shard of the full tensor at `offset`. A tensor without dimensions is one element with id 0.
    """
    if not local.ndim:
        yield ..., torch.zeros((), dtype=torch.int64, device=local.device)
        return
    per_chunk = max(
        1, CHUNK_ELEMENTS * (GPU_CHUNK_FACTOR if local.is_cuda else 1) // max(1, math.prod(local.shape[1:]))
    )
    for start in range(0, local.shape[0], per_chunk):
        rows = slice(start, min(start + per_chunk, local.shape[0]))
        ids = torch.arange(rows.start, rows.stop, device=local.device) + offset[0]
        for size, local_size, start_id in zip(shape[1:], local.shape[1:], offset[1:], strict=True):
            ids = ids[..., None] * size + torch.arange(local_size, device=local.device) + start_id
        yield rows, ids


def splitmix64(x: Tensor) -> Tensor:
    """Apply the finalizer of splitmix64 to int64 values. Products wrap; the masks make the shifts logical."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
