"""The partition layout of ZeRO: which elements of the flat partition of a rank belong to a parameter.

A rank has one flat partition per parameter group. Stages 1 and 2 concatenate the parameters of a group and split the
result into equal partitions. Stage 3 splits each parameter and concatenates the shards of a rank. Moments have the same
layout as weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, prod

from torch import Tensor

from dist_llm.config.derive import round_up

Shapes = Mapping[str, tuple[int, ...]]  # {parameter name: shape}, in the order of the parameter group


@dataclass(frozen=True)
class PartitionLayout:
    """The layout of one parameter group.

    `slices[name][rank]` are the elements of a parameter in the partition of a rank, possibly none. In rank order, the
    slices of a parameter contain its elements in row-major order.
    """

    slices: dict[str, list[slice]]
    sizes: list[int]  # elements of the partition, by rank
    unpadded_sizes: list[int]  # elements without the padding at the end

    def views(self, name: str, partitions: Sequence[Tensor]) -> list[Tensor]:
        """Return the view of a parameter in the flat partition of each rank. `partitions` has those of all ranks."""
        return [partition[elements] for partition, elements in zip(partitions, self.slices[name], strict=True)]


def contiguous_layout(shapes: Shapes, world_size: int, gaps: Sequence[int] = ()) -> PartitionLayout:
    """Return the layout of stages 1 and 2.

    `gaps` are the numbers of unused elements after each parameter (DeepSpeed's `parameter_alignment`).
    """
    numels = [prod(shape) for shape in shapes.values()]
    gaps = gaps or [0] * len(numels)
    starts = [0, *accumulate(numel + gap for numel, gap in zip(numels, gaps, strict=True))]
    # Rounded up, so that each partition begins at a multiple of 4 bytes, also in 16-bit types.
    partition_size = round_up(starts[-1], 2 * world_size) // world_size
    slices = {
        name: [
            _clip_range(start - rank * partition_size, start + numel - rank * partition_size, partition_size)
            for rank in range(world_size)
        ]
        for name, start, numel in zip(shapes, starts, numels, strict=False)
    }
    return PartitionLayout(
        slices,
        sizes=[partition_size] * world_size,
        unpadded_sizes=[min(max(starts[-1] - rank * partition_size, 0), partition_size) for rank in range(world_size)],
    )


def per_param_layout(shapes: Shapes, world_size: int) -> PartitionLayout:
    """Return the layout of stage 3: each rank has one shard of each parameter. The last shards are padded."""
    slices, start = {}, 0
    for name, shape in shapes.items():
        shard_size = ceil(prod(shape) / world_size)
        numels = [min(max(prod(shape) - rank * shard_size, 0), shard_size) for rank in range(world_size)]
        slices[name] = [slice(start, start + numel) for numel in numels]
        start += shard_size
    return PartitionLayout(slices, [start] * world_size, [start] * world_size)


def split_sub_groups(shapes: Shapes, world_size: int, max_elements: int) -> Iterator[Shapes]:
    """Yield the sub-groups of a parameter group in stage 3. `max_elements` is DeepSpeed's `sub_group_size`.

    A sub-group ends when the partition of a rank has at least `max_elements` elements.
    """
    sub_group: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        sub_group[name] = shape
        if sum(ceil(prod(param_shape) / world_size) for param_shape in sub_group.values()) >= max_elements:
            yield sub_group
            sub_group = {}
    if sub_group:
        yield sub_group


def _clip_range(start: int, end: int, size: int) -> slice:
    """Clip [start, end) to [0, size)."""
    return slice(min(max(start, 0), size), min(max(end, 0), size))
