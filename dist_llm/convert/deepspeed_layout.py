"""Where ZeRO keeps a parameter: which elements of which rank's flat partition.

A rank holds one flat tensor per group of parameters. Stages 1 and 2 lay a group's parameters one after another and
cut the whole into equal parts; stage 3 cuts each parameter and lays a rank's parts one after another. Moments lie as
the weights do.
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
    """Of one group: `places[name][rank]` is a slice, empty where the rank holds none of the parameter.

    Joined in the order of ranks, a parameter's slices are its elements in row-major order.
    """

    slices: dict[str, list[slice]]
    sizes: list[int]  # elements of each rank's partition
    unpadded_sizes: list[int]  # the same without the padding at its end

    def views(self, name: str, flats: Sequence[Tensor]) -> list[Tensor]:
        """The views of a parameter in the ranks' flat tensors."""
        return [flat[elements] for flat, elements in zip(flats, self.slices[name], strict=True)]


def contiguous_layout(shapes: Shapes, world: int, gaps: Sequence[int] = ()) -> PartitionLayout:
    """Stages 1 and 2. `gaps` are elements left free after each parameter (DeepSpeed's `parameter_alignment`)."""
    numels = [prod(shape) for shape in shapes.values()]
    gaps = gaps or [0] * len(numels)
    starts = [0, *accumulate(numel + gap for numel, gap in zip(numels, gaps, strict=True))]
    # Rounded so that each partition begins at a multiple of 4 bytes, in halves too.
    size = round_up(starts[-1], 2 * world) // world
    slices = {
        name: [_clip_range(start - rank * size, start + numel - rank * size, size) for rank in range(world)]
        for name, start, numel in zip(shapes, starts, numels, strict=False)
    }
    return PartitionLayout(
        slices, [size] * world, [min(max(starts[-1] - rank * size, 0), size) for rank in range(world)]
    )


def per_param_layout(shapes: Shapes, world: int) -> PartitionLayout:
    """Stage 3: rank r holds the r-th of `world` parts of each parameter, the last parts padded to the others' size."""
    slices, start = {}, 0
    for name, shape in shapes.items():
        shard_size = ceil(prod(shape) / world)
        numels = [min(max(prod(shape) - rank * shard_size, 0), shard_size) for rank in range(world)]
        slices[name] = [slice(start, start + numel) for numel in numels]
        start += shard_size
    return PartitionLayout(slices, [start] * world, [start] * world)


def split_sub_groups(shapes: Shapes, world: int, max_elements: int) -> Iterator[Shapes]:
    """Stage 3 cuts a group once a rank's part of it has `most` elements (`sub_group_size`)."""
    sub_group: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        sub_group[name] = shape
        if sum(ceil(prod(member) / world) for member in sub_group.values()) >= max_elements:
            yield sub_group
            sub_group = {}
    if sub_group:
        yield sub_group


def _clip_range(start: int, end: int, size: int) -> slice:
    """[start, end) cut to [0, size)."""
    return slice(min(max(start, 0), size), min(max(end, 0), size))
