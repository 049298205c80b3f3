"""Choose the recompute mode of each block so that its saved activations fit `parallel.activations_gib`.

A recompute mode (activation_checkpoint.py) says what a block saves for the backward pass. The saved bytes are measured:
for each mode, one forward pass logs the storages that it would save, without saving them. A storage that is freed after
this forward pass is an activation. A storage that still exists is a weight (gathered or cast), the batch, or a receive
buffer of a pipeline stage, which torch reuses for every microbatch.
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
from dist_llm.parallel.mesh import STAGE_AXES, all_gather_ints

log = logging.getLogger("dist_llm")

MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")
GIB = 1 << 30


@dataclass(frozen=True)
class ActivationSizes:
    """Bytes that one microbatch saves for the backward pass on this rank."""

    blocks: list[dict[RecomputeMode, int]]  # bytes per block and mode
    part_of_block: list[int]  # index of the model part that contains each block
    shared: list[int]  # bytes per model part that several of its blocks share, such as masks

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
    """Let each block of this rank save as much as the budget of `gib` GiB allows, and log the modes.

    `forward` runs one microbatch through all model parts. It returns tensors that exist with every mode, such as
    receive buffers. `peak_in_flight` takes the bytes that one microbatch saves in each model part, and returns the peak
    over all microbatches that have had a forward and no backward pass. `selective=False` excludes the selective mode.
    Raises ConfigError on all ranks if a rank cannot meet the budget.
    """
    sizes = _max_over_ranks(measure_activations(model_parts, forward), mesh)
    budget_bytes = int(gib * GIB)
    modes, peak = choose_modes(sizes, peak_in_flight, budget_bytes, selective)
    max_peak = peak if mesh is None else max(all_gather_ints(peak, torch.device(mesh.device_type)))
    if max_peak > budget_bytes:
        raise ConfigError(
            f"parallel.activations_gib: {gib:g} is less than the activations that backward needs even with full "
            f"recomputation; set at least {math.ceil(max_peak / GIB * 1e5) / 1e5:.5f}, or lower data.micro_batch"
        )
    block_names = [name for model_part in model_parts for name in model_part.blocks]
    for block, mode in zip(_checkpointed_forwards(model_parts), modes, strict=True):
        block.mode = mode
    expected_gib = peak_in_flight(sizes.bytes_by_model_part(modes)) / GIB
    formatted_modes = _format_modes(block_names, modes)
    log.info("recompute by block: %s; %.4f of %g GiB kept for backward", formatted_modes, expected_gib, gib)


def measure_activations(model_parts: Sequence[Decoder], forward: Callable[[], Sequence[Tensor]]) -> ActivationSizes:
    """Measure the bytes that each block saves in each mode. The blocks keep their modes."""
    blocks = _checkpointed_forwards(model_parts)
    original_modes = [block.mode for block in blocks]
    live_tensors: list[Tensor] = []  # a storage that is kept alive does not count as an activation
    logs: dict[RecomputeMode, list[dict[StorageWeakRef, int]]] = {}
    for mode in MODES:
        for block in blocks:
            block.mode, block.saved_bytes_log = mode, {}
        live_tensors += forward()
        logs[mode] = [block.saved_bytes_log or {} for block in blocks]
    for block, mode in zip(blocks, original_modes, strict=True):
        block.mode, block.saved_bytes_log = mode, None
    for model_part in model_parts:
        reshard(model_part)  # a backward pass would do this at its end
    gc.collect()
    part_of_block = [index for index, model_part in enumerate(model_parts) for _ in model_part.blocks]
    sizes: list[dict[RecomputeMode, int]] = [{} for _ in blocks]
    shared = [0] * len(model_parts)
    for mode, block_logs in logs.items():
        # Number of blocks that saved each storage.
        num_blocks = Counter(ref for block_log in block_logs for ref in block_log)
        shared_storages: list[dict[StorageWeakRef, int]] = [{} for _ in model_parts]
        for index, block_log in enumerate(block_logs):
            freed = {ref: size for ref, size in block_log.items() if ref.expired()}
            sizes[index][mode] = sum(size for ref, size in freed.items() if num_blocks[ref] == 1)
            shared_storages[part_of_block[index]] |= {ref: size for ref, size in freed.items() if num_blocks[ref] > 1}
        shared = [max(size, sum(refs.values())) for size, refs in zip(shared, shared_storages, strict=True)]
    return ActivationSizes(sizes, part_of_block, shared)


def choose_modes(
    sizes: ActivationSizes, peak_in_flight: Callable[[Sequence[int]], int], budget_bytes: int, selective: bool = True
) -> tuple[list[RecomputeMode], int]:
    """Return (modes of all blocks, peak in bytes): the first of `_iter_candidates` that fits the budget.

    If no candidate fits, return the candidate with the smallest peak.
    """
    min_peak, min_modes = -1, list[RecomputeMode]()
    for modes in _iter_candidates(len(sizes.blocks), selective):
        peak = peak_in_flight(sizes.bytes_by_model_part(modes))
        if peak <= budget_bytes:
            return modes, peak
        if min_peak < 0 or peak < min_peak:
            min_peak, min_modes = peak, modes
    return min_modes, min_peak


def _iter_candidates(num_blocks: int, selective: bool) -> Iterator[list[RecomputeMode]]:
    """Yield the modes of all blocks, from least to most recomputation, so that a larger budget never recomputes more.

    The selective mode frees 40% of the bytes of a Llama block and repeats no matrix product. The full mode frees 95% of
    the bytes and repeats all matrix products. So as few blocks as possible use the full mode, and of the other blocks
    as few as possible use the selective mode. Blocks are (nearly) equal, so only their number matters. The first blocks
    are recomputed, because the backward pass reaches them last, when most other activations have been freed.
    """
    for num_full in range(num_blocks + 1):
        for num_selective in range(num_blocks - num_full + 1 if selective else 1):
            num_none = num_blocks - num_full - num_selective
            counts: dict[RecomputeMode, int] = {"full": num_full, "selective": num_selective, "none": num_none}
            yield [mode for mode, count in counts.items() for _ in range(count)]


def _checkpointed_forwards(model_parts: Sequence[Decoder]) -> list[CheckpointedForward]:
    blocks = [block.forward for model_part in model_parts for block in model_part.blocks.values()]
    assert all(isinstance(block, CheckpointedForward) for block in blocks)
    return blocks  # type: ignore[return-value]


def _max_over_ranks(sizes: ActivationSizes, mesh: DeviceMesh | None) -> ActivationSizes:
    """Take the maximum of each size over the ranks that hold the same blocks, so that they choose the same modes."""
    if mesh is None:
        return sizes
    block_sizes = [block[mode] for block in sizes.blocks for mode in MODES]
    flat = torch.tensor([*block_sizes, *sizes.shared], device=mesh.device_type)
    for axis in STAGE_AXES:
        if mesh[axis].size() > 1:
            dist.all_reduce(flat, dist.ReduceOp.MAX, mesh.get_group(axis))
    maxima, num_block_sizes = flat.tolist(), len(block_sizes)
    by_block = [maxima[start : start + len(MODES)] for start in range(0, num_block_sizes, len(MODES))]
    blocks = [dict(zip(MODES, block_maxima, strict=True)) for block_maxima in by_block]
    return ActivationSizes(blocks, sizes.part_of_block, shared=maxima[num_block_sizes:])


def _format_modes(names: Sequence[str], modes: Sequence[RecomputeMode]) -> str:
    """Format the modes by range of block names, such as `0-3 full, 4-11 none`."""
    lines = []
    for mode, group in groupby(zip(names, modes, strict=True), key=lambda name_and_mode: name_and_mode[1]):
        group_names = [name for name, _ in group]
        name_range = group_names[0] if len(group_names) == 1 else f"{group_names[0]}-{group_names[-1]}"
        lines.append(f"{name_range} {mode}")
    return ", ".join(lines)
