"""Counter-based random numbers, which are equal on every rank and layout.

A number is a pure function of a name, such as a parameter name, and an index, such as an element index. Parameter
initialization uses this, so that each rank can initialize its own shards.
"""

import math
from collections.abc import Iterator, Sequence
from types import EllipsisType

import torch
from torch import Tensor

from dist_llm.io.hashing import digest64

CHUNK_ELEMENTS = 1 << 20  # elements processed at a time, so that temporaries stay in cache
GPU_CHUNK_FACTOR = 16  # chunks are larger on a GPU, where a kernel launch costs more than the cache saves


def hash64(text: str) -> int:
    """Return a signed 64-bit hash of `text`."""
    return int.from_bytes(digest64(text.encode()), "little", signed=True)


def hash_seed(*numbers: int) -> int:
    """Return a 63-bit seed that depends on all of `numbers` and on their order."""
    return int.from_bytes(digest64(repr(numbers).encode()), "little") >> 1


def iter_element_ids(
    local: Tensor, shape: Sequence[int], offset: Sequence[int]
) -> Iterator[tuple[slice | EllipsisType, Tensor]]:
    """Yield (rows, element ids) for chunks of rows of `local`, the shard at `offset` of a full tensor of `shape`.

    An element id is the flat index of the element in the full tensor. A tensor without dimensions has one element with
    id 0.
    """
    if not local.ndim:
        yield ..., torch.zeros((), dtype=torch.int64, device=local.device)
        return
    chunk_elements = CHUNK_ELEMENTS * (GPU_CHUNK_FACTOR if local.is_cuda else 1)
    rows_per_chunk = max(1, chunk_elements // max(1, math.prod(local.shape[1:])))
    for start_row in range(0, local.shape[0], rows_per_chunk):
        rows = slice(start_row, min(start_row + rows_per_chunk, local.shape[0]))
        ids = torch.arange(rows.start, rows.stop, device=local.device) + offset[0]
        for full_size, local_size, dim_offset in zip(shape[1:], local.shape[1:], offset[1:], strict=True):
            ids = ids[..., None] * full_size + torch.arange(local_size, device=local.device) + dim_offset
        yield rows, ids


def splitmix64(x: Tensor) -> Tensor:
    """Apply the finalizer of splitmix64 to int64 values. Products wrap; the masks make the shifts logical."""
    x = x + _to_signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _to_signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _to_signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _to_signed(word: int) -> int:
    """Return the signed 64-bit integer with the bits of an unsigned one."""
    return word - (1 << 64) if word >= 1 << 63 else word
