"""Let DCP (torch.distributed.checkpoint) write and read tensors of which a rank holds a contiguous range of
elements."""

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

from dist_llm.sharded import local_with_offset

Offset = tuple[int, ...]


class FlatShard:
    """The rectangular chunks of a tensor of `shape` that this rank holds: views, by their offset in the tensor.

    There may be no chunk.
    """

    def __init__(self, shape: tuple[int, ...], chunks: Mapping[Offset, Tensor]) -> None:
        self.shape, self.chunks = shape, dict(chunks)
        self.ndim = len(shape)

    @staticmethod
    def from_flat(shape: tuple[int, ...], flat: Tensor, start: int) -> "FlatShard":
        """Build the shard whose elements are `flat`: in row-major order, from element `start` of the tensor."""
        chunks = {}
        for offset, size, begin in flat_range_to_boxes(shape, start, start + flat.numel()):
            chunks[offset] = flat[begin - start : begin - start + prod(size)].view(size)
        return FlatShard(shape, chunks)

    def size(self) -> torch.Size:
        return torch.Size(self.shape)

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        locations = self.__create_chunk_list__()
        properties = [TensorProperties.create_from_tensor(chunk) for chunk in self.chunks.values()]
        return [
            WriteItem(
                index=MetadataIndex(fqn, location.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=location, properties=chunk_properties, size=self.size()),
            )
            for location, chunk_properties in zip(locations, properties, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), chunk.size()) for offset, chunk in self.chunks.items()]


def local_chunks(tensor: Any) -> Iterator[tuple[Offset, Tensor]]:
    """Yield (offset, this rank's chunk) of a tensor, a DTensor or a FlatShard."""
    if isinstance(tensor, FlatShard):
        yield from tensor.chunks.items()
    else:
        chunk, offset = local_with_offset(tensor)
        yield offset, chunk


def chunk_at(tensor: Any, index: MetadataIndex) -> Any:
    """Return the chunk of a FlatShard that DCP addresses by `index`; a tensor is returned as it is."""
    return tensor.chunks[tuple(index.offset or ())] if isinstance(tensor, FlatShard) else tensor


def flat_range_to_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Offset, tuple[int, ...], int]]:
    """Yield (offset, size, number of the first element) of the boxes that cover elements [start, stop), in order.

    There are at most two boxes per dimension plus one: the end of a row, full rows, the beginning of a row.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start,), (stop - start,), start) if shape else ((), (), 0)
        return
    row_size = prod(shape[1:])
    first, column = divmod(start, row_size)
    if column:
        end = min(stop, (first + 1) * row_size)
        yield from _row_range_to_boxes(shape, first, start, end)
        start, first = end, first + 1
    num_full_rows = (stop - start) // row_size
    if num_full_rows > 0:
        yield (first, *[0] * (len(shape) - 1)), (num_full_rows, *shape[1:]), start
        start, first = start + num_full_rows * row_size, first + num_full_rows
    if start < stop:
        yield from _row_range_to_boxes(shape, first, start, stop)


def _row_range_to_boxes(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[Offset, tuple[int, ...], int]]:
    """Like `flat_range_to_boxes`, for elements of one row."""
    row_start = row * prod(shape[1:])
    for offset, size, begin in flat_range_to_boxes(shape[1:], start - row_start, stop - row_start):
        yield (row, *offset), (1, *size), row_start + begin
