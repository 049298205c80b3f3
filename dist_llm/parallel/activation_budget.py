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

    block_bytes: list[dict[RecomputeMode, int]]  # of each block, by mode
    part_of_block: list[int]  # index of the model part that contains each block
    shared_bytes: list[int]  # of each model part: what several of its blocks save together, such as masks

    def bytes_by_model_part(self, modes: Sequence[RecomputeMode]) -> list[int]:
        """Return the bytes of each model part if block i uses `modes[i]`."""
        part_bytes = list(self.shared_bytes)
        for bytes_by_mode, part_index, mode in zip(self.block_bytes, self.part_of_block, modes, strict=True):
            part_bytes[part_index] += bytes_by_mode[mode]
        return part_bytes


def fit_activation_budget(
    model_parts: Sequence[Decoder],
    forward: Callable[[], Sequence[Tensor]],
    peak_in_flight: Callable[[Sequence[int]], int],
    mesh: DeviceMesh | None,
    budget_gib: float,
    selective: bool = True,
) -> None:
    """Set the recompute mode of each block of this rank so that little is recomputed within the budget; log the modes.

    `forward` runs one microbatch through all model parts. It returns the tensors that are not activations whatever the
    mode, such as receive buffers. `peak_in_flight` takes the bytes that one microbatch saves in each model part. It
    returns the peak of the bytes that this rank holds during a step, for all microbatches whose backward pass has not
    ended. `selective=False` excludes the selective mode. Raises ConfigError on all ranks if a rank cannot meet the
    budget.
    """
    sizes = _max_over_ranks(measure_activations(model_parts, forward), mesh)
    budget_bytes = int(budget_gib * GIB)
    modes, peak = choose_modes(sizes, peak_in_flight, budget_bytes, selective)
    max_peak = peak if mesh is None else max(all_gather_ints(peak, torch.device(mesh.device_type)))
    if max_peak > budget_bytes:
        raise ConfigError(
            f"parallel.activations_gib: {budget_gib:g} is less than the activations that backward needs even with full "
            f"recomputation; set at least {math.ceil(max_peak / GIB * 1e5) / 1e5:.5f}, or lower data.micro_batch"
        )
    block_names = [name for model_part in model_parts for name in model_part.blocks]
    for block_forward, mode in zip(_list_checkpointed_forwards(model_parts), modes, strict=True):
        block_forward.mode = mode
    expected_gib = peak_in_flight(sizes.bytes_by_model_part(modes)) / GIB
    formatted_modes = _format_modes(block_names, modes)
    log.info("recompute by block: %s; %.4f of %g GiB kept for backward", formatted_modes, expected_gib, budget_gib)


def measure_activations(model_parts: Sequence[Decoder], forward: Callable[[], Sequence[Tensor]]) -> ActivationSizes:
    """Measure the bytes that each block saves in each mode. The blocks keep their modes."""
    forwards = _list_checkpointed_forwards(model_parts)
    original_modes = [block_forward.mode for block_forward in forwards]
    live_tensors: list[Tensor] = []  # a storage that is kept alive does not count as an activation
    logs: dict[RecomputeMode, list[dict[StorageWeakRef, int]]] = {}
    for mode in MODES:
        for block_forward in forwards:
            block_forward.mode, block_forward.saved_bytes_log = mode, {}
        live_tensors += forward()
        logs[mode] = [block_forward.saved_bytes_log or {} for block_forward in forwards]
    for block_forward, mode in zip(forwards, original_modes, strict=True):
        block_forward.mode, block_forward.saved_bytes_log = mode, None
    for model_part in model_parts:
        reshard(model_part)  # a backward pass would do this at its end
    gc.collect()
    part_of_block = [index for index, model_part in enumerate(model_parts) for _ in model_part.blocks]
    block_bytes: list[dict[RecomputeMode, int]] = [{} for _ in forwards]
    shared_bytes = [0] * len(model_parts)  # the maximum over the modes
    for mode, block_logs in logs.items():
        num_blocks = Counter(storage for block_log in block_logs for storage in block_log)  # that saved a storage
        shared_storages: list[dict[StorageWeakRef, int]] = [{} for _ in model_parts]
        for index, block_log in enumerate(block_logs):
            activations = {storage: size for storage, size in block_log.items() if storage.expired()}
            shared = {storage: size for storage, size in activations.items() if num_blocks[storage] > 1}
            block_bytes[index][mode] = sum(activations.values()) - sum(shared.values())
            shared_storages[part_of_block[index]] |= shared
        shared_bytes = [
            max(size, sum(storages.values())) for size, storages in zip(shared_bytes, shared_storages, strict=True)
        ]
    return ActivationSizes(block_bytes, part_of_block, shared_bytes)


def choose_modes(
    sizes: ActivationSizes, peak_in_flight: Callable[[Sequence[int]], int], budget_bytes: int, selective: bool = True
) -> tuple[list[RecomputeMode], int]:
    """Return (modes of all blocks, peak in bytes): the first of `_iter_candidates` that fits the budget.

    If no candidate fits, return the candidate with the smallest peak.
    """
    min_peak, min_modes = -1, list[RecomputeMode]()
    for modes in _iter_candidates(len(sizes.block_bytes), selective):
        peak = peak_in_flight(sizes.bytes_by_model_part(modes))
        if peak <= budget_bytes:
            return modes, peak
        if min_peak < 0 or peak < min_peak:
            min_peak, min_modes = peak, modes
    return min_modes, min_peak


def _iter_candidates(num_blocks: int, selective: bool) -> Iterator[list[RecomputeMode]]:
    """Yield the modes of all blocks, from least to most recomputation.

    Candidates have as few blocks with the full mode as possible, then as few with the selective mode as possible: for
    a Llama block, selective frees 40% of the bytes and repeats no matrix product, while full frees 95% and repeats all
    of them. Blocks are (nearly) equal, so only their number matters. The blocks that recompute most are the first ones:
    the backward pass reaches them last, when most other activations have been freed.

    The order is the same for each budget, so a larger budget never recomputes more.
    """
    for num_full in range(num_blocks + 1):
        for num_selective in range(num_blocks - num_full + 1 if selective else 1):
            num_none = num_blocks - num_full - num_selective
            counts: dict[RecomputeMode, int] = {"full": num_full, "selective": num_selective, "none": num_none}
            yield [mode for mode, count in counts.items() for _ in range(count)]


def _list_checkpointed_forwards(model_parts: Sequence[Decoder]) -> list[CheckpointedForward]:
    forwards = [block.forward for model_part in model_parts for block in model_part.blocks.values()]
    assert all(isinstance(block_forward, CheckpointedForward) for block_forward in forwards)
    return forwards  # type: ignore[return-value]


def _max_over_ranks(sizes: ActivationSizes, mesh: DeviceMesh | None) -> ActivationSizes:
    """Take the maximum of each size over the ranks that hold the same blocks, so that they choose the same modes."""
    if mesh is None:
        return sizes
    flat_block_bytes = [bytes_by_mode[mode] for bytes_by_mode in sizes.block_bytes for mode in MODES]
    flat = torch.tensor([*flat_block_bytes, *sizes.shared_bytes], device=mesh.device_type)
    for axis in STAGE_AXES:
        if mesh[axis].size() > 1:
            dist.all_reduce(flat, dist.ReduceOp.MAX, mesh.get_group(axis))
    maxima, num_block_values = flat.tolist(), len(flat_block_bytes)
    maxima_by_block = [maxima[start : start + len(MODES)] for start in range(0, num_block_values, len(MODES))]
    block_bytes = [dict(zip(MODES, block_maxima, strict=True)) for block_maxima in maxima_by_block]
    return ActivationSizes(block_bytes, sizes.part_of_block, shared_bytes=maxima[num_block_values:])


def _format_modes(names: Sequence[str], modes: Sequence[RecomputeMode]) -> str:
    """Format the modes by range of block names, such as `0-3 full, 4-11 none`."""
    lines = []
    for mode, group in groupby(zip(names, modes, strict=True), key=lambda name_and_mode: name_and_mode[1]):
        group_names = [name for name, _ in group]
        name_range = group_names[0] if len(group_names) == 1 else f"{group_names[0]}-{group_names[-1]}"
        lines.append(f"{name_range} {mode}")
    return ", ".join(lines)
