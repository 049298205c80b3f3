"""Tensors of which a rank holds a stretch of elements, as flat partitions do: as DCP can write and read them."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dist_llm.parallel.mesh import local_with_offset

Offset = tuple[int, ...]


class FlatShard:
    """This rank's rectangular pieces of a tensor of `shape`: views, by their offsets in it. None is fine too."""

    def __init__(self, shape: tuple[int, ...], pieces: Mapping[Offset, Tensor]) -> None:
        self.shape, self.chunks = shape, dict(pieces)
        self.ndim = len(shape)

    @staticmethod
    def from_flat(shape: tuple[int, ...], flat: Tensor, start: int) -> "FlatShard":
        """`flat` holds the elements from number `start` on, in row-major order."""
        pieces = {}
        for offset, size, begin in flat_range_to_boxes(shape, start, start + flat.numel()):
            pieces[offset] = flat[begin - start : begin - start + prod(size)].view(size)
        return FlatShard(shape, pieces)

    def size(self) -> torch.Size:
        return torch.Size(self.shape)

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        chunks = self.__create_chunk_list__()
        properties = [TensorProperties.create_from_tensor(piece) for piece in self.chunks.values()]
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=each, size=self.size()),
            )
            for chunk, each in zip(chunks, properties, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), piece.size()) for offset, piece in self.chunks.items()]


def local_chunks(held: Any) -> Iterator[tuple[Offset, Tensor]]:
    """(offset, this rank's part) of a tensor, a DTensor or boxes."""
    if isinstance(held, FlatShard):
        yield from held.chunks.items()
    else:
        part, offset = local_with_offset(held)
        yield offset, part


def chunk_at(held: Any, index: MetadataIndex) -> Any:
    """What DCP means by `index`, of a tensor or of boxes."""
    return held.chunks[tuple(index.offset or ())] if isinstance(held, FlatShard) else held


def flat_range_to_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Offset, tuple[int, ...], int]]:
    """(offset, size, first element's number) of the boxes that elements [start, stop) of a tensor are, in order.

    At most two per dimension and one more: the end of a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,), start) if shape else ((), (), 0)
        return
    row = prod(shape[1:])
    first, inside = divmod(start, row)
    if inside:
        end = min(stop, (first + 1) * row)
        yield from _row_range_to_boxes(shape, first, start, end)
        start, first = end, first + 1
    whole = (stop - start) // row
    if whole > 0:
        yield (first, *[0] * (len(shape) - 1)), (whole, *shape[1:]), start
        start, first = start + whole * row, first + whole
    if start < stop:
        yield from _row_range_to_boxes(shape, first, start, stop)


def _row_range_to_boxes(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[Offset, tuple[int, ...], int]]:
    """The same of elements that lie in one row."""
    before = row * prod(shape[1:])
    for offset, size, begin in flat_range_to_boxes(shape[1:], start - before, stop - before):
        yield (row, *offset), (1, *size), before + begin
