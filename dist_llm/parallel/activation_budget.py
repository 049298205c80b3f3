"""Choose the recompute mode of each block so that its saved activations fit `parallel.activations_gib`.

The bytes that a block saves for backward are measured: the forward pass runs once for each mode and logs what it would
save, without saving it. A storage that is freed after this forward pass was an activation. A storage that still exists
is a weight (gathered or cast), the batch, or a receive buffer of a pipeline stage, which torch reuses for every
microbatch.
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
from torch.multiprocessing.reductions import StorageWeakRef

from dist_llm.errors import ConfigError
from dist_llm.models.decoder import Decoder
from dist_llm.parallel.activation_checkpoint import CheckpointedForward, RecomputeMode
from dist_llm.parallel.fsdp import reshard
from dist_llm.parallel.mesh import DATA_AXES, all_gather_ints

log = logging.getLogger("dist_llm")

MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")
GIB = 1 << 30


@dataclass(frozen=True)
class ActivationSizes:
    """Bytes that one microbatch saves for backward on this rank."""

    blocks: list[dict[RecomputeMode, int]]  # per block and mode
    part_of_block: list[int]  # index of the model part that holds each block
    shared: list[int]  # per model part: bytes that several of its blocks save once, such as masks

    def bytes_by_model_part(self, modes: Sequence[RecomputeMode]) -> list[int]:
        """Return the bytes of each model part if block i uses `modes[i]`."""
        sizes = list(self.shared)
        for block, model_part, mode in zip(self.blocks, self.part_of_block, modes, strict=True):
            sizes[model_part] += block[mode]
        return sizes


def fit_activation_budget(
    model_parts: Sequence[Decoder],
    forward: Callable[[], Sequence[Tensor]],
    peak_in_flight: Callable[[Sequence[int]], int],
    mesh: DeviceMesh | None,
    gib: float,
    selective: bool = True,
) -> None:
    """Let each block of this rank save as much as `gib` allows, and log the modes.

    `forward` runs one microbatch through all model parts and returns the tensors that exist in any case.
    `peak_in_flight` converts the bytes that one microbatch saves in each part to the peak over all microbatches in
    flight. `selective=False` excludes the selective mode. Raises ConfigError on all ranks if one of them cannot meet
    the budget.
    """
    sizes = _max_over_ranks(measure_activations(model_parts, forward), mesh)
    modes, peak = choose_modes(sizes, peak_in_flight, int(gib * GIB), selective)
    max_peak = peak if mesh is None else max(all_gather_ints(peak, torch.device(mesh.device_type)))
    if max_peak > int(gib * GIB):
        raise ConfigError(
            f"parallel.activations_gib: {gib:g} is less than the activations that backward needs even with full "
            f"recomputation; set at least {math.ceil(max_peak / GIB * 1e5) / 1e5:.5f}, or lower data.micro_batch"
        )
    names = [name for model_part in model_parts for name in model_part.blocks]
    for block, mode in zip(_checkpointed_forwards(model_parts), modes, strict=True):
        block.mode = mode
    expected = peak_in_flight(sizes.bytes_by_model_part(modes)) / GIB
    log.info("recompute by block: %s; %.4f of %g GiB kept for backward", _format_modes(names, modes), expected, gib)


def measure_activations(model_parts: Sequence[Decoder], forward: Callable[[], Sequence[Tensor]]) -> ActivationSizes:
    """Measure the bytes that each block saves in each mode. The modes of the blocks are unchanged afterwards."""
    blocks = _checkpointed_forwards(model_parts)
    original_modes = [block.mode for block in blocks]
    inputs: list[Tensor] = []
    logs: dict[RecomputeMode, list[dict[StorageWeakRef, int]]] = {}
    for mode in MODES:
        for block in blocks:
            block.mode, block.saved_bytes_log = mode, {}
        inputs += forward()
        logs[mode] = [block.saved_bytes_log or {} for block in blocks]
    for block, mode in zip(blocks, original_modes, strict=True):
        block.mode, block.saved_bytes_log = mode, None
    for model_part in model_parts:
        reshard(model_part)  # as a backward does at its end
    gc.collect()
    part_of_block = [index for index, model_part in enumerate(model_parts) for _ in model_part.blocks]
    sizes: list[dict[RecomputeMode, int]] = [{} for _ in blocks]
    shared = [0] * len(model_parts)
    for mode, block_logs in logs.items():
        num_blocks = Counter(ref for block_log in block_logs for ref in block_log)  # blocks that saved each storage
        shared_storages: list[dict[StorageWeakRef, int]] = [{} for _ in model_parts]
        for index, block_log in enumerate(block_logs):
            freed = {ref: size for ref, size in block_log.items() if ref.expired()}
            sizes[index][mode] = sum(size for ref, size in freed.items() if num_blocks[ref] == 1)
            shared_storages[part_of_block[index]] |= {ref: size for ref, size in freed.items() if num_blocks[ref] > 1}
        shared = [max(size, sum(refs.values())) for size, refs in zip(shared, shared_storages, strict=True)]
    return ActivationSizes(sizes, part_of_block, shared)


def choose_modes(
    sizes: ActivationSizes, peak_in_flight: Callable[[Sequence[int]], int], budget: int, selective: bool = True
) -> tuple[list[RecomputeMode], int]:
    """Return the first of `_candidates` whose peak fits `budget` (in bytes), with its peak.

    If none fits, return the smallest.
    """
    min_peak, min_modes = -1, list[RecomputeMode]()
    for modes in _candidates(len(sizes.blocks), selective):
        peak = peak_in_flight(sizes.bytes_by_model_part(modes))
        if peak <= budget:
            return modes, peak
        if min_peak < 0 or peak < min_peak:
            min_peak, min_modes = peak, modes
    return min_modes, min_peak


def _candidates(blocks: int, selective: bool) -> Iterator[list[RecomputeMode]]:
    """Yield the modes of all blocks, from least to most recomputation, so that a larger budget never recomputes more.

    Selective comes before full. Selective frees 0.4 of a Llama block's bytes and repeats no matrix product; full frees
    0.95 and repeats all. So as few blocks as possible are full, then as few as possible are selective. Blocks are
    (nearly) equal, so only their number matters. The first blocks are recomputed, because backward reaches them when
    little else is in memory.
    """
    for full in range(blocks + 1):
        for partial in range(blocks - full + 1 if selective else 1):
            counts: dict[RecomputeMode, int] = {"full": full, "selective": partial, "none": blocks - full - partial}
            yield [mode for mode, count in counts.items() for _ in range(count)]


def _checkpointed_forwards(model_parts: Sequence[Decoder]) -> list[CheckpointedForward]:
    blocks = [block.forward for model_part in model_parts for block in model_part.blocks.values()]
    assert all(isinstance(block, CheckpointedForward) for block in blocks)
    return blocks  # type: ignore[return-value]


def _max_over_ranks(sizes: ActivationSizes, mesh: DeviceMesh | None) -> ActivationSizes:
    """Take the maximum of each number over the ranks that hold the same blocks, so that they choose the same modes."""
    if mesh is None:
        return sizes
    numbers = [block[mode] for block in sizes.blocks for mode in MODES]
    flat = torch.tensor([*numbers, *sizes.shared], device=mesh.device_type)
    for axis in (*DATA_AXES, "tp"):
        if mesh[axis].size() > 1:
            dist.all_reduce(flat, dist.ReduceOp.MAX, mesh.get_group(axis))
    maxima, split = flat.tolist(), len(MODES) * len(sizes.blocks)
    rows = (maxima[start : start + len(MODES)] for start in range(0, split, len(MODES)))
    return ActivationSizes([dict(zip(MODES, row, strict=True)) for row in rows], sizes.part_of_block, maxima[split:])


def _format_modes(names: Sequence[str], modes: Sequence[RecomputeMode]) -> str:
    """Return the modes by range of block names, such as `0-3 full, 4-11 none`."""
    runs = [[name for name, _ in run] for _, run in groupby(zip(names, modes, strict=True), lambda pair: pair[1])]
    kinds = [mode for mode, _ in groupby(modes)]
    spans = [run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ", ".join(f"{span} {kind}" for span, kind in zip(spans, kinds, strict=True))
