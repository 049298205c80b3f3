"""Write checkpoints that DeepSpeed can load, in a single process: ZeRO 1 to 3 and universal checkpoints.

This does not need DeepSpeed.

Files are first written with empty tensors, and then filled through a memory map, one parameter at a time. So only one
tensor is in memory. The temporary directory is renamed at the end, and then the file `latest` is written.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_llm.convert.deepspeed_files import (
    FragmentAddress,
    LossScaler,
    open_writable,
    write_placeholders,
    write_tagged_directory,
)
from dist_llm.convert.deepspeed_layout import (
    PartitionLayout,
    Shapes,
    contiguous_layout,
    per_param_layout,
    split_sub_groups,
)
from dist_llm.convert.weights import Weights
from dist_llm.errors import CheckpointError

DEEPSPEED_VERSION = "0.19.8"  # version of DeepSpeed that defines this layout
SUB_GROUP_SIZE = 1_000_000_000  # elements; the default of DeepSpeed


class _FlatTensors(NamedTuple):
    """What each rank stores as flat partitions: one for each parameter group, or at stage 3 for each sub-group."""

    shapes: list[Shapes]  # parameters of each flat tensor
    layouts: list[PartitionLayout]
    group_indices: list[int]  # index of the parameter group of each flat tensor
    steps: list[float | None]  # number of optimizer steps; None if it is not stored
    moment_keys: list[str]  # such as exp_avg; empty without moments


def write_deepspeed(
    directory: Path,
    weights: Weights,
    *,
    stage: int,
    world_size: int,
    param_groups: Sequence[Sequence[str]],
    group_settings: Sequence[Mapping[str, Any]],
    step: int,
    shared_params: Mapping[str, str] | None = None,
    sub_group_size: int = SUB_GROUP_SIZE,
    tag: str = "",
) -> Path:
    """Write a directory `tag` (default: global_step<step>) that an engine of this ZeRO stage and world size can load.

    `param_groups` has the parameter names of each parameter group of the optimizer, in order. `group_settings` has the
    other entries of each group (lr, betas, ...), which the loading engine adopts. `shared_params` is {second name:
    first name} of parameters that the model has twice. Moments are written if `weights` has them; otherwise the engine
    starts with new moments. Stage 3 must be loaded with the same `sub_group_size`. At stage 3, an fp16 engine would
    continue with a loss scale of 1, so use a universal checkpoint there.

    Raises CheckpointError for another stage, for parameters that are in no group or in two, for moments of only some
    parameters, for different step counts, and if `tag` exists.
    """
    if stage not in (1, 2, 3):
        raise CheckpointError(f"stage {stage}: only ZeRO 1, 2 and 3 can be written; write a universal checkpoint")
    shared_params = shared_params or {}
    _check_param_groups(weights, param_groups, group_settings, shared_params)
    flat = _plan_flat_tensors(weights, param_groups, stage, world_size, sub_group_size)
    flat_param_groups = _build_flat_param_groups(flat, group_settings)
    tag = tag or f"global_step{step}"
    with write_tagged_directory(directory, tag, "latest") as temporary:
        prefixes = [f"zero_pp_rank_{rank}_" for rank in range(world_size)]
        for prefix in prefixes if stage == 3 else [""]:
            write_placeholders(
                _build_model_states(flat.shapes, world_size, stage, step, shared_params),
                temporary / f"{prefix}mp_rank_00_model_states.pt",
            )
        for rank, prefix in enumerate(prefixes):
            content = _build_optim_states(flat, flat_param_groups, stage, rank)
            write_placeholders(content, temporary / f"{prefix}mp_rank_00_optim_states.pt")
        optim_states = [open_writable(temporary / f"{prefix}mp_rank_00_optim_states.pt") for prefix in prefixes]
        _fill_tensors(weights, flat, [content["optimizer_state_dict"] for content in optim_states])
        if stage < 3:  # at stage 3, all weights are in the flat tensors
            for name, tensor in open_writable(temporary / "mp_rank_00_model_states.pt")["module"].items():
                tensor.copy_(weights.read(f"model.{shared_params.get(name, name)}"))
    return directory / tag


def _build_flat_param_groups(flat: _FlatTensors, group_settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the parameter groups of DeepSpeed's optimizer, which has flat tensors in place of the parameters."""
    return [
        {**settings, "params": [index for index, owner in enumerate(flat.group_indices) if owner == group_index]}
        for group_index, settings in enumerate(group_settings)
    ]


def _plan_flat_tensors(
    weights: Weights, param_groups: Sequence[Sequence[str]], stage: int, world_size: int, sub_group_size: int
) -> _FlatTensors:
    """Return the flat tensors of a ZeRO stage and their layouts. `sub_group_size` is in elements."""
    shapes: list[Shapes] = [{name: weights.shapes[f"model.{name}"] for name in group} for group in param_groups]
    group_indices = list(range(len(param_groups)))
    if stage == 3:
        sub_groups = [
            (group_index, sub_group_shapes)
            for group_index in group_indices
            for sub_group_shapes in split_sub_groups(shapes[group_index], world_size, sub_group_size)
        ]
        group_indices = [group_index for group_index, _ in sub_groups]
        shapes = [sub_group_shapes for _, sub_group_shapes in sub_groups]
    build_layout = per_param_layout if stage == 3 else contiguous_layout
    return _FlatTensors(
        shapes,
        layouts=[build_layout(flat_shapes, world_size) for flat_shapes in shapes],
        group_indices=group_indices,
        steps=[_read_common_step(weights, flat_shapes) for flat_shapes in shapes],
        moment_keys=_get_moment_keys(weights, [name for group in param_groups for name in group]),
    )


def write_universal(directory: Path, weights: Weights, *, step: int, tag: str = "") -> Path:
    """Write a universal checkpoint, for any ZeRO stage and world size, to `directory/tag` (default: global_step<step>).

    The loading engine needs the setting {"checkpoint": {"load_universal": true}}.

    The checkpoint has no optimizer settings, so those of the loading engine apply. Without moments in `weights` it
    loads only at stages 1 and 2, because stage 3 of DeepSpeed requires moments. At stage 3, all groups of a torch
    optimizer get the same tensor `step` after loading, and each group increments it. Clone it in each state, or use
    `write_deepspeed`.

    Raises CheckpointError for moments of only some parameters, and if `tag` exists.
    """
    shapes = {name.removeprefix("model."): shape for name, shape in weights.shapes.items() if name.startswith("model.")}
    moments, steps = _get_moment_keys(weights, list(shapes)), _read_common_step(weights, shapes)
    tag = tag or f"global_step{step}"
    with write_tagged_directory(directory, tag, "latest_universal") as temporary:
        for name in shapes:
            folder = temporary / "zero" / name
            folder.mkdir(parents=True)
            for key, full_name in {"fp32": f"model.{name}", **{key: f"optim.{name}.{key}" for key in moments}}.items():
                torch.save({"param": weights.read(full_name).float().contiguous(), "cat_dim": 0}, folder / f"{key}.pt")
            if steps is not None:
                torch.save(torch.tensor(steps), folder / "step.pt")
        # An engine copies the settings of its groups from this list. The settings are empty, but the list must have at
        # least as many entries as the engine has groups.
        no_settings = [{"params": [index]} for index in range(len(shapes))]
        state = {} if steps is None else {0: {"step": torch.tensor(steps)}}
        optimizer = {"state": state, "param_groups": no_settings}
        common_state = {"optimizer_state_dict": optimizer, "param_groups": no_settings, "ds_version": DEEPSPEED_VERSION}
        torch.save(common_state, temporary / "zero" / "optimizer_state.pt")
        model_states = _build_model_states([shapes], world_size=1, stage=3, step=step, shared_params={})
        for prefix in ("", "zero_pp_rank_0_"):  # the names that stages 1 and 2, and stage 3, read
            torch.save(model_states, temporary / f"{prefix}mp_rank_00_model_states.pt")
    return directory / tag


def _check_param_groups(
    weights: Weights,
    param_groups: Sequence[Sequence[str]],
    group_settings: Sequence[Mapping[str, Any]],
    shared_params: Mapping[str, str],
) -> None:
    """Raise CheckpointError unless each parameter of `weights` is in exactly one group, and each group has settings."""
    if len(group_settings) != len(param_groups) or not all(param_groups):
        raise CheckpointError(
            f"{len(param_groups)} parameter groups, {len(group_settings)} settings: give one for each group, and no "
            "empty group"
        )
    names = [name for group in param_groups for name in group]
    if len(set(names)) != len(names):
        raise CheckpointError(
            "a parameter is twice in the parameter groups; give the parameter groups of the optimizer unchanged"
        )
    trained_names = {name.removeprefix("model.") for name in weights.shapes if name.startswith("model.")}
    trained_names -= shared_params.keys()
    if mismatches := sorted(trained_names.symmetric_difference(names)):
        problem = "in no parameter group" if mismatches[0] in trained_names else "not in the weights"
        raise CheckpointError(
            f"{mismatches[0]} is {problem}; the parameter groups must have each parameter once (frozen parameters and "
            "buffers cannot be written; remove them)"
        )


def _get_moment_keys(weights: Weights, names: Sequence[str]) -> list[str]:
    """Return the keys of the moments, such as exp_avg; all parameters must have the same. Empty without moments."""
    keys: dict[str, set[str]] = {name: set() for name in names}
    for full_name in weights.shapes:
        name, _, key = full_name.removeprefix("optim.").rpartition(".")
        if full_name.startswith("optim.") and name in keys:
            keys[name].add(key)
    all_keys = set().union(*keys.values())
    if lacking := [name for name in names if keys[name] != all_keys]:
        raise CheckpointError(f"{lacking[0]} lacks moments that others have; remove all moments, or none")
    return sorted(all_keys - {"step"})


def _read_common_step(weights: Weights, names: Iterator[str] | Mapping[str, Any]) -> float | None:
    """Return the number of optimizer steps of these parameters; None if it is not stored."""
    step_names = [f"optim.{name}.step" for name in names]
    steps = {float(weights.read(step_name)) for step_name in step_names if step_name in weights.shapes}
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters have taken {sorted(steps)} steps, but DeepSpeed stores one number; remove all moments"
        )
    return steps.pop() if steps else None


def _build_model_states(
    shapes: Sequence[Shapes], world_size: int, stage: int, step: int, shared_params: Mapping[str, str]
) -> dict[str, Any]:
    """Build the content of a model file. At stage 3, `module` has empty tensors: weights are in the optimizer files."""
    module = {name: torch.empty(shape if stage < 3 else 0) for group in shapes for name, shape in group.items()}
    return {
        "module": OrderedDict(
            {**module, **{second_name: module[first_name] for second_name, first_name in shared_params.items()}}
        ),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in group.items()) for group in shapes],
        "frozen_param_shapes": None,
        "shared_params": dict(shared_params),
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": 0,
        "global_steps": step,
        "dp_world_size": world_size,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": DEEPSPEED_VERSION,
    }


def _build_optim_states(
    flat: _FlatTensors, flat_param_groups: Sequence[Mapping[str, Any]], stage: int, rank: int
) -> dict[str, Any]:
    """Build the content of the optimizer file of a rank, with tensors of the right sizes and without values."""
    state = {
        index: {
            **({} if flat.steps[index] is None else {"step": torch.empty(())}),
            **{key: torch.empty(layout.sizes[rank]) for key in flat.moment_keys},
        }
        for index, layout in enumerate(flat.layouts)
    }
    optimizer = {
        "state": {index: values for index, values in state.items() if values},
        "param_groups": list(flat_param_groups),
    }
    master_weights = [torch.empty(layout.unpadded_sizes[rank]) for layout in flat.layouts]
    build_states = _build_stage_3_states if stage == 3 else _build_stage_1_states
    return {
        "optimizer_state_dict": {"zero_stage": stage, **build_states(flat.layouts, optimizer, master_weights, rank)},
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": DEEPSPEED_VERSION,
    }


def _build_stage_3_states(
    layouts: Sequence[PartitionLayout], optimizer: Mapping[str, Any], master_weights: Sequence[Tensor], rank: int
) -> dict[str, Any]:
    """Build the optimizer state of a rank as stage 3 stores it."""
    return {
        "loss_scaler": LossScaler(),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": len(layouts[0].sizes),
        "optimizer_state_dict": optimizer,
        "fp32_flat_groups": master_weights,
    }


def _build_stage_1_states(
    layouts: Sequence[PartitionLayout], optimizer: Mapping[str, Any], master_weights: Sequence[Tensor], rank: int
) -> dict[str, Any]:
    """Build the optimizer state of a rank as stages 1 and 2 store it."""
    return {
        "base_optimizer_state": optimizer,
        "single_partition_of_fp32_groups": master_weights,
        "group_paddings": [layout.sizes[rank] - layout.unpadded_sizes[rank] for layout in layouts],
        "param_alignment_paddings": [[0] * len(layout.slices) for layout in layouts],
        "partition_count": [len(layout.sizes) for layout in layouts],
        "ds_version": DEEPSPEED_VERSION,
        "param_slice_mappings": [_get_fragment_addresses(layout, rank) for layout in layouts],
    }


def _get_fragment_addresses(layout: PartitionLayout, rank: int) -> "OrderedDict[str, FragmentAddress]":
    """Return the range of each parameter on a rank, which DeepSpeed's converter to universal checkpoints reads."""
    slices = ((name, by_rank[rank]) for name, by_rank in layout.slices.items())
    return OrderedDict(
        (name, FragmentAddress(elements.stop - elements.start, elements.start))
        for name, elements in slices
        if elements.stop > elements.start
    )


def _fill_tensors(weights: Weights, flat: _FlatTensors, optim_states: Sequence[Any]) -> None:
    """Copy each tensor to the memory-mapped optimizer states of all ranks."""
    is_stage_3 = "fp32_flat_groups" in optim_states[0]
    master_weights_key = "fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"
    optimizer_key = "optimizer_state_dict" if is_stage_3 else "base_optimizer_state"
    for index, layout in enumerate(flat.layouts):
        master_weights = [rank_state[master_weights_key][index] for rank_state in optim_states]
        optimizers = [rank_state[optimizer_key]["state"] for rank_state in optim_states]
        for name in layout.slices:
            _scatter_to_views(weights.read(f"model.{name}"), layout.views(name, master_weights))
            for key in flat.moment_keys:
                moment_partitions = [optimizer[index][key] for optimizer in optimizers]
                _scatter_to_views(weights.read(f"optim.{name}.{key}"), layout.views(name, moment_partitions))
        for optimizer in optimizers if flat.steps[index] is not None else ():
            optimizer[index]["step"].fill_(flat.steps[index])


def _scatter_to_views(tensor: Tensor, views: Sequence[Tensor]) -> None:
    """Copy the elements of `tensor`, in order, to `views`."""
    chunks = torch.split_with_sizes(tensor.reshape(-1), [view.numel() for view in views])
    for view, chunk in zip(views, chunks, strict=True):
        view.copy_(chunk)
