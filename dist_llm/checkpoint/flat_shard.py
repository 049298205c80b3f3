"""Let DCP (torch.distributed.checkpoint) write and read tensors of which a rank has a flat range of elements.

ZeRO partitions tensors into such ranges. DCP only supports rectangular chunks, so a range is split into rectangles.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from dist_llm.sharded import local_with_offset

Offset = tuple[int, ...]  # of a chunk in its tensor, one index per dimension


class Box(NamedTuple):
    """The position of a rectangular chunk in its tensor."""

    offset: Offset
    size: tuple[int, ...]
    first_element: int  # index of its first element in row-major order


class FlatShard:
    """The rectangular chunks, possibly none, that this rank holds of a tensor of `shape`.

    `chunks` maps the offset of each chunk in the tensor to its elements, a view.
    """

    def __init__(self, shape: tuple[int, ...], chunks: Mapping[Offset, Tensor]) -> None:
        self.shape, self.chunks = shape, dict(chunks)
        self.ndim = len(shape)

    @staticmethod
    def from_flat(shape: tuple[int, ...], flat: Tensor, start: int) -> "FlatShard":
        """Build the shard that holds the elements `flat` of the tensor, in row-major order from element `start` on."""
        chunks = {}
        for box in flat_range_to_boxes(shape, start, start + flat.numel()):
            chunk_start = box.first_element - start
            chunks[box.offset] = flat[chunk_start : chunk_start + prod(box.size)].view(box.size)
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
    """Yield (offset, chunk) for each chunk on this rank of a tensor, a DTensor or a FlatShard."""
    if isinstance(tensor, FlatShard):
        yield from tensor.chunks.items()
    else:
        chunk, offset = local_with_offset(tensor)
        yield offset, chunk


def chunk_at(tensor: Any, index: MetadataIndex) -> Any:
    """Return the chunk of a FlatShard that DCP addresses by `index`. Return any other tensor unchanged."""
    return tensor.chunks[tuple(index.offset or ())] if isinstance(tensor, FlatShard) else tensor


def flat_range_to_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes that together contain the elements [start, stop) of a tensor of `shape`, in order.

    A range is the end of one row, full rows, and the beginning of another row. The full rows are one box. The two
    partial rows are split in the same way along the next dimension.
    """
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,), (stop - start,), start) if shape else Box((), (), 0)
        return
    row_elements = prod(shape[1:])
    row, column = divmod(start, row_elements)
    if column:
        row_end = min(stop, (row + 1) * row_elements)
        yield from _row_range_to_boxes(shape, row, start, row_end)
        start, row = row_end, row + 1
    num_full_rows = (stop - start) // row_elements
    if num_full_rows > 0:
        yield Box((row, *[0] * (len(shape) - 1)), (num_full_rows, *shape[1:]), start)
        start, row = start + num_full_rows * row_elements, row + num_full_rows
    if start < stop:
        yield from _row_range_to_boxes(shape, row, start, stop)


def _row_range_to_boxes(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes of the elements [start, stop), which all lie in row `row` of the first dimension."""
    row_start = row * prod(shape[1:])
    for box in flat_range_to_boxes(shape[1:], start - row_start, stop - row_start):
        yield Box((row, *box.offset), (1, *box.size), row_start + box.first_element)
