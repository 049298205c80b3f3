"""Read a checkpoint of ZeRO stages 0 to 3: one file of optimizer states per rank, which hold partitions of tensors.

A parameter group is a group of the optimizer: the parameters that share a learning rate and a weight decay.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.convert.deepspeed_files import StoredTensor, load_mapped
from dist_llm.convert.deepspeed_layout import PartitionLayout, contiguous_layout, per_param_layout
from dist_llm.errors import CheckpointError

RANK_FILE = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")
MAX_RANKS = 1 << 20  # a file that claims more ranks is damaged


def read_zero(folder: Path, param_groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the name of each tensor (model.NAME or optim.NAME.KEY), and the tensor.

    `param_groups` has the parameter names of each group of the optimizer. Only ZeRO 0 needs them.
    """
    model_files, optim_files = _find_rank_files(folder, "model"), _find_rank_files(folder, "optim")
    if 0 not in model_files:
        raise CheckpointError(f"{folder}: has no model states of rank 0; copy them from the directory of the run")
    model_states = load_mapped(model_files[0])
    if not isinstance(model_states, dict) or not isinstance(model_states.get("module"), dict):
        raise CheckpointError(f"{model_files[0]}: has no `module`; checkpoints of pipelines are not supported")
    if model_states.get("param_shapes") is None:
        yield from _read_unpartitioned(model_files[0], model_states, param_groups)
        return
    world_size = model_states["dp_world_size"]
    _check_all_ranks(folder, "optim", optim_files, world_size)
    optim_states = [load_mapped(optim_files[rank])["optimizer_state_dict"] for rank in range(world_size)]
    is_stage_3 = "fp32_flat_groups" in optim_states[0]
    if is_stage_3:
        _check_all_ranks(folder, "model", model_files, world_size)
    optimizer_tensors = dict(_read_optimizer_tensors(optim_files, model_states["param_shapes"], optim_states))
    yield from optimizer_tensors.items()
    frozen_shards = (
        [load_mapped(model_files[rank]).get("frozen_param_fragments") or {} for rank in range(world_size)]
        if is_stage_3
        else []
    )
    yield from _read_other_weights(model_states, optimizer_tensors, frozen_shards).items()


def _read_optimizer_tensors(
    files: Mapping[int, Path], param_groups: Sequence[Mapping[str, Sequence[int]]], optim_states: Sequence[Any]
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the fp32 master weights and the moments of all trained parameters.

    `param_groups` has {parameter name: shape} of each parameter group. `optim_states` has the content of the optimizer
    file of each rank, and `files` the path.
    """
    is_stage_3 = "fp32_flat_groups" in optim_states[0]
    master_weights_key = "fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"
    optimizer_key = "optimizer_state_dict" if is_stage_3 else "base_optimizer_state"
    if len(optim_states[0][master_weights_key]) != len(param_groups):
        raise CheckpointError(
            f"{files[0]}: does not have the {len(param_groups)} parameter groups of its model states; copy the model "
            "and optimizer states of the same step"
        )
    for group_index, param_group in enumerate(param_groups):
        shapes = {name: tuple(shape) for name, shape in param_group.items()}
        layout = _resolve_layout(files, shapes, group_index, optim_states)
        states = [_get_group_state(rank_state[optimizer_key], group_index) for rank_state in optim_states]
        moment_keys = {key for key, value in states[0].items() if isinstance(value, Tensor) and value.ndim}
        moments = {key: [state[key] for state in states] for key in sorted(moment_keys)}
        master_weights = [rank_state[master_weights_key][group_index] for rank_state in optim_states]
        for key, partitions in {"weights": master_weights, **moments}.items():
            _check_partition_sizes(files, f"{key} of parameter group {group_index}", partitions, layout)
        scalars = {key: states[0][key] for key in states[0].keys() - moment_keys}
        for name, shape in shapes.items():
            yield f"model.{name}", StoredTensor(shape, partial(_concatenate, layout.views(name, master_weights)))
            for key, partitions in moments.items():
                read = partial(_concatenate, layout.views(name, partitions))
                yield f"optim.{name}.{key}", StoredTensor(shape, read)
            for key, value in scalars.items():
                yield f"optim.{name}.{key}", StoredTensor((), partial(torch.tensor, float(value)))


def _resolve_layout(
    files: Mapping[int, Path], shapes: Mapping[str, tuple[int, ...]], group_index: int, optim_states: Sequence[Any]
) -> PartitionLayout:
    """Return the layout of a parameter group. Raises CheckpointError if the group is not partitioned over all ranks."""
    num_ranks = len(optim_states)
    num_partitions = optim_states[0]["partition_count"]  # a list by parameter group at stages 1 and 2
    if (num_partitions[group_index] if isinstance(num_partitions, list) else num_partitions) != num_ranks:
        raise CheckpointError(
            f"{files[0]}: parameter group {group_index} is on other ranks than the rest (expert parallelism?): "
            "not supported"
        )
    if "fp32_flat_groups" in optim_states[0]:
        return per_param_layout(shapes, num_ranks)
    gaps = optim_states[0].get("param_alignment_paddings", {group_index: ()})[group_index]
    return contiguous_layout(shapes, num_ranks, gaps)


def _get_group_state(optimizer: Any, group_index: int) -> dict[str, Any]:
    """Return the optimizer state of a parameter group on one rank, {key: partition of a moment, or a scalar}.

    With `elastic_checkpoint`, `optimizer` is a list of these states. Some optimizers store the step in `param_groups`.
    """
    if isinstance(optimizer, list):
        return optimizer[group_index]
    steps = {
        index: group["step"] for group in optimizer["param_groups"] if "step" in group for index in group["params"]
    }
    state = optimizer["state"].get(group_index, {})
    return {"step": steps[group_index], **state} if state and group_index in steps else state


def _read_other_weights(
    model_states: Any, optimizer_tensors: Mapping[str, StoredTensor], frozen_shards: Sequence[Any]
) -> dict[str, StoredTensor]:
    """Return weights that are not in the optimizer state: frozen parameters, buffers, names of shared parameters.

    At stage 3, `frozen_shards` has {name: shard} of the frozen parameters for each rank. At other stages it is empty,
    because `module` has the full tensors.
    """
    weights: dict[str, StoredTensor] = {}
    for name, shape in (model_states.get("frozen_param_shapes") or {}).items() if frozen_shards else ():
        layout = per_param_layout({name: tuple(shape)}, len(frozen_shards))
        views = layout.views(name, [shards[name] for shards in frozen_shards])
        weights[f"model.{name}"] = StoredTensor(tuple(shape), partial(_concatenate, views))
    for second_name, first_name in (model_states.get("shared_params") or {}).items():
        if f"model.{first_name}" in optimizer_tensors:
            weights[f"model.{second_name}"] = optimizer_tensors[f"model.{first_name}"]
    names = model_states["buffer_names"] if frozen_shards else model_states["module"]
    for name, tensor in ((name, model_states["module"].get(name)) for name in names):
        if isinstance(tensor, Tensor) and f"model.{name}" not in optimizer_tensors.keys() | weights.keys():
            weights[f"model.{name}"] = StoredTensor(tuple(tensor.shape), tensor.clone)
    return weights


def _read_unpartitioned(
    path: Path, model_states: Any, param_groups: Sequence[Sequence[str]]
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of ZeRO 0: weights by name, and moments by the index of the parameter in the optimizer."""
    optimizer = model_states.get("optimizer") or {"state": {}}
    if "state" not in optimizer:
        raise CheckpointError(
            f"{path}: the fp32 weights of bf16 and fp16 at stage 0 are stored in a form that is not supported; "
            "save at stage 1, or as a universal checkpoint"
        )
    for name, tensor in model_states["module"].items():
        if isinstance(tensor, Tensor):
            yield f"model.{name}", StoredTensor(tuple(tensor.shape), tensor.clone)
    names = [name for group in param_groups for name in group]
    if names and optimizer["state"] and len(names) != sum(len(group["params"]) for group in optimizer["param_groups"]):
        raise CheckpointError(
            f"{path}: its optimizer does not have {len(names)} parameters, as `param_groups` has; give the parameter "
            "groups of this optimizer"
        )
    for param_index, name in enumerate(names):
        for key, value in optimizer["state"].get(param_index, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
            if tensor.ndim and tensor.shape != model_states["module"][name].shape:
                raise CheckpointError(
                    f"{path}: {key} number {param_index} does not have the shape of {name}; give `param_groups` in the "
                    "order of the optimizer"
                )
            yield f"optim.{name}.{key}", StoredTensor(tuple(tensor.shape), tensor.clone)


def _concatenate(chunks: Sequence[Tensor]) -> Tensor:
    """Concatenate the slices of a parameter, in the order of the ranks, to a flat tensor."""
    return torch.cat([chunk.reshape(-1) for chunk in chunks])


def _find_rank_files(folder: Path, kind: str) -> dict[int, Path]:
    """Return {data-parallel rank: path} of the files of a kind ("model" or "optim")."""
    files = {}
    for path in folder.glob(f"*_{kind}_states.pt"):
        match = RANK_FILE.fullmatch(path.name)
        if match is None or int(match[2]):
            raise CheckpointError(
                f"{path}: of a run with tensor, pipeline or expert parallelism, which is not supported; "
                "use a checkpoint of data-parallel ranks only"
            )
        files[int(match[1] or 0)] = path
    return files


def _check_all_ranks(folder: Path, kind: str, files: Mapping[int, Path], world_size: int) -> None:
    """Raise CheckpointError unless there is one file of this kind for each rank."""
    if type(world_size) is not int or not 0 < world_size <= MAX_RANKS:
        raise CheckpointError(f"{folder}: says that {world_size!r} ranks saved it; the file is damaged: copy it again")
    missing_ranks = sorted(set(range(world_size)) - files.keys())
    if missing_ranks:
        raise CheckpointError(
            f"{folder}: was saved by {world_size} ranks; the {kind} states of "
            f"{', '.join(map(str, missing_ranks))} are missing; "
            "copy their zero_pp_rank_* files too (each node may have written its own disk)"
        )
    if surplus_ranks := sorted(files.keys() - set(range(world_size))):
        raise CheckpointError(
            f"{folder}: was saved by {world_size} ranks, but has {kind} states of "
            f"{', '.join(map(str, surplus_ranks))}; move the files of the other run away"
        )


def _check_partition_sizes(
    files: Mapping[int, Path], description: str, partitions: Sequence[Tensor], layout: PartitionLayout
) -> None:
    """Raise CheckpointError if the partition of a rank does not have the number of elements of the layout."""
    for rank, partition in enumerate(partitions):
        if partition.numel() not in (layout.unpadded_sizes[rank], layout.sizes[rank]):
            raise CheckpointError(
                f"{files[rank]}: {description} have {partition.numel()} elements, not {layout.sizes[rank]} "
                f"({layout.unpadded_sizes[rank]} without padding); the file is damaged or of another run: copy it again"
            )
