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
from dist_llm.parallel.activation_checkpoint import CheckpointedForward, RecomputeMode
from dist_llm.parallel.mesh import DATA_AXES, all_gather_ints

log = logging.getLogger("dist_llm")

MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")
GIB = 1 << 30


@dataclass(frozen=True)
class ActivationSizes:
    """Bytes that a microbatch keeps: of each block by choice, and of each part what several blocks share (masks)."""

    blocks: list[dict[RecomputeMode, int]]
    parts: list[int]  # of which part each block is
    shared: list[int]

    def bytes_by_model_part(self, modes: Sequence[RecomputeMode]) -> list[int]:
        """Of each part, if its blocks do so."""
        sizes = list(self.shared)
        for block, part, mode in zip(self.blocks, self.parts, modes, strict=True):
            sizes[part] += block[mode]
        return sizes


def fit_activation_budget(
    parts: Sequence[Decoder],
    forward: Callable[[], Sequence[Tensor]],
    peak_in_flight: Callable[[Sequence[int]], int],
    mesh: DeviceMesh | None,
    gib: float,
    selective: bool = True,
) -> None:
    """Let each block of this rank keep as much as `gib` allows, and say so in the log.

    `forward` runs one microbatch through all parts, and returns what stays in any case; `most_held` turns what a
    microbatch keeps of each part into what is kept at once. `selective` may be left out. Raises ConfigError, on all
    ranks, where one of them cannot keep so little.
    """
    kept = _max_over_ranks(measure_activations(parts, forward), mesh)
    found, least = choose_modes(kept, peak_in_flight, int(gib * GIB), selective)
    worst = least if mesh is None else max(all_gather_ints(least, torch.device(mesh.device_type)))
    if worst > int(gib * GIB):
        raise ConfigError(
            f"parallel.activations_gib: {gib:g} is less than what must be kept for backward even where blocks are "
            f"computed again; set at least {math.ceil(worst / GIB * 1e5) / 1e5:.5f}, or lower data.micro_batch"
        )
    names = [name for part in parts for name in part.blocks]
    for block, mode in zip(_checkpointed_forwards(parts), found, strict=True):
        block.mode = mode
    expected = peak_in_flight(kept.bytes_by_model_part(found)) / GIB
    log.info("recompute by block: %s; %.4f of %g GiB kept for backward", _format_modes(names, found), expected, gib)


def measure_activations(parts: Sequence[Decoder], forward: Callable[[], Sequence[Tensor]]) -> ActivationSizes:
    """What each block keeps by each choice, and leave the blocks as they were."""
    blocks = _checkpointed_forwards(parts)
    before = [block.mode for block in blocks]
    inbox: list[Tensor] = []
    ledgers: dict[RecomputeMode, list[dict[StorageWeakRef, int]]] = {}
    for mode in MODES:
        for block in blocks:
            block.mode, block.saved_bytes_log = mode, {}
        inbox += forward()
        ledgers[mode] = [block.saved_bytes_log or {} for block in blocks]
    for block, mode in zip(blocks, before, strict=True):
        block.mode, block.saved_bytes_log = mode, None
    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what backward would have done
    gc.collect()
    owners = [number for number, part in enumerate(parts) for _ in part.blocks]
    sizes: list[dict[RecomputeMode, int]] = [{} for _ in blocks]
    shared = [0] * len(parts)
    for mode, each in ledgers.items():
        times = Counter(ref for ledger in each for ref in ledger)
        common: list[dict[StorageWeakRef, int]] = [{} for _ in parts]
        for number, ledger in enumerate(each):
            gone = {ref: size for ref, size in ledger.items() if ref.expired()}
            sizes[number][mode] = sum(size for ref, size in gone.items() if times[ref] == 1)
            common[owners[number]] |= {ref: size for ref, size in gone.items() if times[ref] > 1}
        shared = [max(most, sum(found.values())) for most, found in zip(shared, common, strict=True)]
    return ActivationSizes(sizes, owners, shared)


def choose_modes(
    kept: ActivationSizes, peak_in_flight: Callable[[Sequence[int]], int], budget: int, selective: bool = True
) -> tuple[list[RecomputeMode], int]:
    """The first of `_orders` that fits (or the smallest), and the fewest bytes that any of them keeps."""
    least, smallest = -1, list[RecomputeMode]()
    for modes in _candidates(len(kept.blocks), selective):
        size = peak_in_flight(kept.bytes_by_model_part(modes))
        if size <= budget:
            return modes, size
        if least < 0 or size < least:
            least, smallest = size, modes
    return smallest, least


def _candidates(blocks: int, selective: bool) -> Iterator[list[RecomputeMode]]:
    """From what computes least again to what computes most: so a larger budget never computes more.

    Selective before full: it frees 0.4 of a Llama block's bytes and repeats no matrix product, full 0.95 and repeats
    all. So as few blocks as possible are full, then as few as possible selective. Blocks are equal, or nearly: how many
    is all there is to choose. The first are computed again, since backward comes to them when little else is held.
    """
    for full in range(blocks + 1):
        for some in range(blocks - full + 1 if selective else 1):
            counts: dict[RecomputeMode, int] = {"full": full, "selective": some, "none": blocks - full - some}
            yield [mode for mode, count in counts.items() for _ in range(count)]


def _checkpointed_forwards(parts: Sequence[Decoder]) -> list[CheckpointedForward]:
    blocks = [block.forward for part in parts for block in part.blocks.values()]
    assert all(isinstance(block, CheckpointedForward) for block in blocks)
    return blocks  # type: ignore[return-value]


def _max_over_ranks(kept: ActivationSizes, mesh: DeviceMesh | None) -> ActivationSizes:
    """The largest of each number over the ranks with these blocks: what they compute again, they compute together."""
    if mesh is None:
        return kept
    numbers = [[block[mode] for mode in MODES] for block in kept.blocks]
    flat = torch.tensor([*(size for each in numbers for size in each), *kept.shared], device=mesh.device_type)
    for axis in (*DATA_AXES, "tp"):
        if mesh[axis].size() > 1:
            dist.all_reduce(flat, dist.ReduceOp.MAX, mesh.get_group(axis))
    sizes, split = flat.tolist(), len(MODES) * len(kept.blocks)
    rows = (sizes[at : at + len(MODES)] for at in range(0, split, len(MODES)))
    return ActivationSizes([dict(zip(MODES, row, strict=True)) for row in rows], kept.parts, sizes[split:])


def _format_modes(names: Sequence[str], modes: Sequence[RecomputeMode]) -> str:
    """`0-3 full, 4-11 none`."""
    runs = [[name for name, _ in run] for _, run in groupby(zip(names, modes, strict=True), lambda pair: pair[1])]
    kinds = [mode for mode, _ in groupby(modes)]
    spans = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(f"{span} {kind}" for span, kind in zip(spans, kinds, strict=True))
