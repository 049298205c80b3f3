"""ZeRO's partition layout: which elements of which rank's flat partition belong to a parameter.

A rank has one flat tensor per group of parameters. Stages 1 and 2 concatenate a group's parameters and split the result
into equal shards. Stage 3 splits each parameter and concatenates a rank's shards. Moments have the layout of the
weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, prod

from torch import Tensor

from dist_llm.config.derive import round_up

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class PartitionLayout:
    """The layout of one group: `slices[name][rank]` is a slice, empty if the rank has no element of the parameter.

    Concatenated in rank order, a parameter's slices are its elements in row-major order.
    """

    slices: dict[str, list[slice]]
    sizes: list[int]  # elements of each rank's partition
    unpadded_sizes: list[int]  # elements without the padding at the end

    def views(self, name: str, flats: Sequence[Tensor]) -> list[Tensor]:
        """Return the views of a parameter in the ranks' flat tensors."""
        return [flat[elements] for flat, elements in zip(flats, self.slices[name], strict=True)]


def contiguous_layout(shapes: Shapes, world: int, gaps: Sequence[int] = ()) -> PartitionLayout:
    """Return the layout of stages 1 and 2. `gaps` are unused elements after each parameter (`parameter_alignment`)."""
    numels = [prod(shape) for shape in shapes.values()]
    gaps = gaps or [0] * len(numels)
    starts = [0, *accumulate(numel + gap for numel, gap in zip(numels, gaps, strict=True))]
    # Rounded so that each partition begins at a multiple of 4 bytes, also in 16-bit types.
    size = round_up(starts[-1], 2 * world) // world
    slices = {
        name: [_clip_range(start - rank * size, start + numel - rank * size, size) for rank in range(world)]
        for name, start, numel in zip(shapes, starts, numels, strict=False)
    }
    return PartitionLayout(
        slices, [size] * world, [min(max(starts[-1] - rank * size, 0), size) for rank in range(world)]
    )


def per_param_layout(shapes: Shapes, world: int) -> PartitionLayout:
    """Return the layout of stage 3: rank r has shard r of `world` of each parameter; the last shards are padded."""
    slices, start = {}, 0
    for name, shape in shapes.items():
        shard_size = ceil(prod(shape) / world)
        numels = [min(max(prod(shape) - rank * shard_size, 0), shard_size) for rank in range(world)]
        slices[name] = [slice(start, start + numel) for numel in numels]
        start += shard_size
    return PartitionLayout(slices, [start] * world, [start] * world)


def split_sub_groups(shapes: Shapes, world: int, max_elements: int) -> Iterator[Shapes]:
    """Yield the sub-groups of stage 3. One ends when a rank's shard of it has `max_elements` elements
    (`sub_group_size`)."""
    sub_group: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        sub_group[name] = shape
        if sum(ceil(prod(member) / world) for member in sub_group.values()) >= max_elements:
            yield sub_group
            sub_group = {}
    if sub_group:
        yield sub_group


def _clip_range(start: int, end: int, size: int) -> slice:
    """Clip [start, end) to [0, size)."""
    return slice(min(max(start, 0), size), min(max(end, 0), size))
