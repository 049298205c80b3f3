"""Which blocks are computed again, so that what is kept for backward fits `parallel.activations_gib`.

What a block keeps is measured: forward runs once for each choice, and writes down instead of keeping. Storages that
are gone afterwards were activations; those that are still there are weights, gathered or rounded, the batch, and what
other stages of a pipeline hand over, which torch receives in one place all the time.
"""

import gc
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef

from dist_llm.errors import ConfigError
from dist_llm.models.decoder import Decoder
from dist_llm.parallel.mesh import DATA_AXES, gather
from dist_llm.parallel.recompute import Choice, Recomputed

log = logging.getLogger("dist_llm")

CHOICES: tuple[Choice, ...] = ("none", "selective", "full")
GIB = 1 << 30


@dataclass(frozen=True)
class Kept:
    """Bytes that a microbatch keeps: of each block by choice, and of each part what several blocks share (masks)."""

    blocks: list[dict[Choice, int]]
    parts: list[int]  # of which part each block is
    shared: list[int]

    def of_parts(self, choices: Sequence[Choice]) -> list[int]:
        """Of each part, if its blocks do so."""
        sizes = list(self.shared)
        for block, part, choice in zip(self.blocks, self.parts, choices, strict=True):
            sizes[part] += block[choice]
        return sizes


def fit(
    parts: Sequence[Decoder],
    forward: Callable[[], Sequence[Tensor]],
    most_held: Callable[[Sequence[int]], int],
    mesh: DeviceMesh | None,
    gib: float,
    selective: bool = True,
) -> None:
    """Let each block of this rank keep as much as `gib` allows, and say so in the log.

    `forward` runs one microbatch through all parts, and returns what stays in any case; `most_held` turns what a
    microbatch keeps of each part into what is kept at once. `selective` may be left out. Raises ConfigError, on all
    ranks, where one of them cannot keep so little.
    """
    kept = _agreed(measure(parts, forward), mesh)
    found, least = choose(kept, most_held, int(gib * GIB), selective)
    worst = least if mesh is None else max(gather(least, torch.device(mesh.device_type)))
    if worst > int(gib * GIB):
        raise ConfigError(
            f"parallel.activations_gib: {gib:g} is less than what must be kept for backward even where blocks are "
            f"computed again; set at least {math.ceil(worst / GIB * 1e5) / 1e5:.5f}, or lower data.micro_batch"
        )
    names = [name for part in parts for name in part.blocks]
    for block, choice in zip(_blocks(parts), found, strict=True):
        block.choice = choice
    expected = most_held(kept.of_parts(found)) / GIB
    log.info("recompute by block: %s; %.4f of %g GiB kept for backward", _summary(names, found), expected, gib)


def measure(parts: Sequence[Decoder], forward: Callable[[], Sequence[Tensor]]) -> Kept:
    """What each block keeps by each choice, and leave the blocks as they were."""
    blocks = _blocks(parts)
    before = [block.choice for block in blocks]
    inbox: list[Tensor] = []
    ledgers: dict[Choice, list[dict[StorageWeakRef, int]]] = {}
    for choice in CHOICES:
        for block in blocks:
            block.choice, block.ledger = choice, {}
        inbox += forward()
        ledgers[choice] = [block.ledger or {} for block in blocks]
    for block, choice in zip(blocks, before, strict=True):
        block.choice, block.ledger = choice, None
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what backward would have done
    gc.collect()
    owners = [number for number, part in enumerate(parts) for _ in part.blocks]
    sizes: list[dict[Choice, int]] = [{} for _ in blocks]
    shared = [0] * len(parts)
    for choice, each in ledgers.items():
        times = Counter(ref for ledger in each for ref in ledger)
        common: list[dict[StorageWeakRef, int]] = [{} for _ in parts]
        for number, ledger in enumerate(each):
            gone = {ref: size for ref, size in ledger.items() if ref.expired()}
            sizes[number][choice] = sum(size for ref, size in gone.items() if times[ref] == 1)
            common[owners[number]] |= {ref: size for ref, size in gone.items() if times[ref] > 1}
        shared = [max(most, sum(found.values())) for most, found in zip(shared, common, strict=True)]
    return Kept(sizes, owners, shared)


def choose(
    kept: Kept, most_held: Callable[[Sequence[int]], int], budget: int, selective: bool = True
) -> tuple[list[Choice], int]:
    """The first of `_orders` that fits (or the smallest), and the fewest bytes that any of them keeps."""
    least, smallest = -1, list[Choice]()
    for choices in _orders(len(kept.blocks), selective):
        size = most_held(kept.of_parts(choices))
        if size <= budget:
            return choices, size
        if least < 0 or size < least:
            least, smallest = size, choices
    return smallest, least


def _orders(blocks: int, selective: bool) -> Iterator[list[Choice]]:
    """From what computes least again to what computes most: so a larger budget never computes more.

    Selective before full: it frees 0.4 of a Llama block's bytes and repeats no matrix product, full 0.95 and repeats
    all. So as few blocks as possible are full, then as few as possible selective. Blocks are equal, or nearly: how many
    is all there is to choose. The first are computed again, since backward comes to them when little else is held.
    """
    for full in range(blocks + 1):
        for some in range(blocks - full + 1 if selective else 1):
            counts: dict[Choice, int] = {"full": full, "selective": some, "none": blocks - full - some}
            yield [choice for choice, count in counts.items() for _ in range(count)]


def _blocks(parts: Sequence[Decoder]) -> list[Recomputed]:
    blocks = [block.forward for part in parts for block in part.blocks.values()]
    assert all(isinstance(block, Recomputed) for block in blocks)
    return blocks  # type: ignore[return-value]


def _agreed(kept: Kept, mesh: DeviceMesh | None) -> Kept:
    """The largest of each number over the ranks with these blocks: what they compute again, they compute together."""
    if mesh is None:
        return kept
    numbers = [[block[choice] for choice in CHOICES] for block in kept.blocks]
    flat = torch.tensor([*(size for each in numbers for size in each), *kept.shared], device=mesh.device_type)
    for axis in (*DATA_AXES, "tp"):
        if mesh[axis].size() > 1:
            dist.all_reduce(flat, dist.ReduceOp.MAX, mesh.get_group(axis))
    sizes, split = flat.tolist(), len(CHOICES) * len(kept.blocks)
    rows = (sizes[at : at + len(CHOICES)] for at in range(0, split, len(CHOICES)))
    return Kept([dict(zip(CHOICES, row, strict=True)) for row in rows], kept.parts, sizes[split:])


def _summary(names: Sequence[str], choices: Sequence[Choice]) -> str:
    """`0-3 full, 4-11 none`."""
    runs = [[name for name, _ in run] for _, run in groupby(zip(names, choices, strict=True), lambda pair: pair[1])]
    kinds = [choice for choice, _ in groupby(choices)]
    spans = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(f"{span} {kind}" for span, kind in zip(spans, kinds, strict=True))
