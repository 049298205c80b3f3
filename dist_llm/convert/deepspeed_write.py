"""Write checkpoints that DeepSpeed can load, in a single process: ZeRO 1 to 3 and universal checkpoints.

This does not need DeepSpeed.

Files are first written with empty tensors, and then filled through a memory map, one parameter at a time. So only one
tensor is in memory. The temporary directory is renamed at the end, and then the file `latest` is written.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def write_deepspeed(
    directory: Path,
    weights: Weights,
    stage: int,
    world_size: int,
    *,
    groups: Sequence[Sequence[str]],
    settings: Sequence[Mapping[str, Any]],
    step: int,
    shared: Mapping[str, str] | None = None,
    sub_group_size: int = SUB_GROUP_SIZE,
    tag: str = "",
) -> Path:
    """Write a directory `tag` (default: global_step<step>) that an engine of this ZeRO stage and world size can load.

    `groups` has the parameter names of each parameter group of the optimizer, in order. `settings` has the other
    entries of each group in `param_groups` (lr, betas, ...), which the loading engine adopts. `shared` is {second name:
    first name} of parameters that the model has twice. Moments are written if `weights` has them; otherwise the engine
    starts with new moments. Stage 3 must be loaded with the same `sub_group_size`. At stage 3, an fp16 engine would
    continue with a loss scale of 1, so use a universal checkpoint there.

    Raises CheckpointError for another stage, for parameters that are in no group or in two, for moments of only some
    parameters, for different step counts, and if `tag` exists.
    """
    if stage not in (1, 2, 3):
        raise CheckpointError(f"stage {stage}: only ZeRO 1, 2 and 3 can be written; write a universal checkpoint")
    shared = shared or {}
    _check_groups(weights, groups, settings, shared)
    shapes: list[Shapes] = [{name: weights.shapes[f"model.{name}"] for name in group} for group in groups]
    group_of_flat = list(range(len(groups)))  # parameter group of each flat tensor
    if stage == 3:
        sub_groups = [
            (group, sub_group_shapes)
            for group in group_of_flat
            for sub_group_shapes in split_sub_groups(shapes[group], world_size, sub_group_size)
        ]
        group_of_flat = [group for group, _ in sub_groups]
        shapes = [sub_group_shapes for _, sub_group_shapes in sub_groups]
    layouts = [
        per_param_layout(group, world_size) if stage == 3 else contiguous_layout(group, world_size) for group in shapes
    ]
    moments = _moment_keys(weights, [name for group in groups for name in group])
    steps = [_common_step(weights, group) for group in shapes]
    flat_groups = [
        {**group_settings, "params": [index for index, owner in enumerate(group_of_flat) if owner == group]}
        for group, group_settings in enumerate(settings)
    ]
    tag = tag or f"global_step{step}"
    with write_tagged_directory(directory, tag, "latest") as temporary:
        prefixes = [f"zero_pp_rank_{rank}_" for rank in range(world_size)]
        for prefix in prefixes if stage == 3 else [""]:
            write_placeholders(
                _build_model_states(shapes, world_size, stage, step, shared),
                temporary / f"{prefix}mp_rank_00_model_states.pt",
            )
        for rank, prefix in enumerate(prefixes):
            content = _build_optim_states(layouts, flat_groups, moments, steps, stage, rank)
            write_placeholders(content, temporary / f"{prefix}mp_rank_00_optim_states.pt")
        optim_states = [open_writable(temporary / f"{prefix}mp_rank_00_optim_states.pt") for prefix in prefixes]
        _fill_tensors(weights, layouts, [content["optimizer_state_dict"] for content in optim_states], moments, steps)
        if stage < 3:
            for name, tensor in open_writable(temporary / "mp_rank_00_model_states.pt")["module"].items():
                tensor.copy_(weights.read(f"model.{shared.get(name, name)}"))
    return directory / tag


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
    moments, steps = _moment_keys(weights, list(shapes)), _common_step(weights, shapes)
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
        model_states = _build_model_states([shapes], world_size=1, stage=3, step=step, shared={})
        for prefix in ("", "zero_pp_rank_0_"):  # the names that stages 1 and 2, and stage 3, read
            torch.save(model_states, temporary / f"{prefix}mp_rank_00_model_states.pt")
    return directory / tag


def _check_groups(
    weights: Weights,
    groups: Sequence[Sequence[str]],
    settings: Sequence[Mapping[str, Any]],
    shared: Mapping[str, str],
) -> None:
    if len(settings) != len(groups) or not all(groups):
        raise CheckpointError(
            f"{len(groups)} groups, {len(settings)} settings: one for each, and no group may be empty"
        )
    names = [name for group in groups for name in group]
    if len(set(names)) != len(names):
        raise CheckpointError("a parameter is twice in the groups; give the groups of the optimizer unchanged")
    weight_names = {name.removeprefix("model.") for name in weights.shapes if name.startswith("model.")} - shared.keys()
    if mismatches := sorted(weight_names.symmetric_difference(names)):
        raise CheckpointError(
            f"{mismatches[0]} is {'in no group' if mismatches[0] in weight_names else 'not in the weights'}; groups "
            "must have each parameter once (frozen parameters and buffers cannot be written; remove them)"
        )


def _moment_keys(weights: Weights, names: Sequence[str]) -> list[str]:
    """Return the keys of the moments of all parameters, such as exp_avg; an empty list without moments."""
    keys: dict[str, set[str]] = {name: set() for name in names}
    for full_name in weights.shapes:
        name, _, key = full_name.removeprefix("optim.").rpartition(".")
        if full_name.startswith("optim.") and name in keys:
            keys[name].add(key)
    all_keys = set().union(*keys.values())
    if lacking := [name for name in names if keys[name] != all_keys]:
        raise CheckpointError(f"{lacking[0]} lacks moments that others have; remove all moments, or none")
    return sorted(all_keys - {"step"})


def _common_step(weights: Weights, names: Iterator[str] | Mapping[str, Any]) -> float | None:
    """Return the number of optimizer steps of these parameters; None if it is not stored."""
    step_names = [f"optim.{name}.step" for name in names]
    steps = {float(weights.read(step_name)) for step_name in step_names if step_name in weights.shapes}
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters have taken {sorted(steps)} steps, but DeepSpeed stores one number; remove all moments"
        )
    return steps.pop() if steps else None


def _build_model_states(
    shapes: Sequence[Shapes], world_size: int, stage: int, step: int, shared: Mapping[str, str]
) -> dict[str, Any]:
    """Build the content of a model file. At stage 3, `module` has empty tensors: weights are in the optimizer files."""
    module = {name: torch.empty(shape if stage < 3 else 0) for group in shapes for name, shape in group.items()}
    return {
        "module": OrderedDict({**module, **{second: module[first] for second, first in shared.items()}}),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in group.items()) for group in shapes],
        "frozen_param_shapes": None,
        "shared_params": dict(shared),
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
    layouts: Sequence[PartitionLayout],
    param_groups: Sequence[Mapping[str, Any]],
    moments: Sequence[str],
    steps: Sequence[float | None],
    stage: int,
    rank: int,
) -> dict[str, Any]:
    """Build the content of the optimizer file of a rank, with tensors of the right sizes and without values."""
    world_size = len(layouts[0].sizes)
    state = {
        index: {
            **({} if steps[index] is None else {"step": torch.empty(())}),
            **{key: torch.empty(layout.sizes[rank]) for key in moments},
        }
        for index, layout in enumerate(layouts)
    }
    optimizer = {
        "state": {index: values for index, values in state.items() if values},
        "param_groups": list(param_groups),
    }
    flats = [torch.empty(layout.unpadded_sizes[rank]) for layout in layouts]
    if stage == 3:
        content = {
            "zero_stage": stage,
            "loss_scaler": LossScaler(),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": world_size,
            "optimizer_state_dict": optimizer,
            "fp32_flat_groups": flats,
        }
    else:
        content = {
            "zero_stage": stage,
            "base_optimizer_state": optimizer,
            "single_partition_of_fp32_groups": flats,
            "group_paddings": [layout.sizes[rank] - layout.unpadded_sizes[rank] for layout in layouts],
            "param_alignment_paddings": [[0] * len(layout.slices) for layout in layouts],
            "partition_count": [world_size] * len(layouts),
            "ds_version": DEEPSPEED_VERSION,
            "param_slice_mappings": [_fragment_addresses(layout, rank) for layout in layouts],
        }
    return {
        "optimizer_state_dict": content,
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": DEEPSPEED_VERSION,
    }


def _fragment_addresses(layout: PartitionLayout, rank: int) -> "OrderedDict[str, FragmentAddress]":
    """Return the range of each parameter on a rank, which DeepSpeed's converter to universal checkpoints reads."""
    slices = ((name, by_rank[rank]) for name, by_rank in layout.slices.items())
    return OrderedDict(
        (name, FragmentAddress(elements.stop - elements.start, elements.start))
        for name, elements in slices
        if elements.stop > elements.start
    )


def _fill_tensors(
    weights: Weights,
    layouts: Sequence[PartitionLayout],
    optim_states: Sequence[Any],
    moments: Sequence[str],
    steps: Sequence[float | None],
) -> None:
    """Copy each tensor to the memory-mapped optimizer states of all ranks."""
    is_stage_3 = "fp32_flat_groups" in optim_states[0]
    flats_key = "fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"
    base_key = "optimizer_state_dict" if is_stage_3 else "base_optimizer_state"
    for index, layout in enumerate(layouts):
        flats = [rank_state[flats_key][index] for rank_state in optim_states]
        optimizers = [rank_state[base_key]["state"] for rank_state in optim_states]
        for name in layout.slices:
            _scatter_to_views(weights.read(f"model.{name}"), layout.views(name, flats))
            for key in moments:
                states = [optimizer[index][key] for optimizer in optimizers]
                _scatter_to_views(weights.read(f"optim.{name}.{key}"), layout.views(name, states))
        for optimizer in optimizers if steps[index] is not None else ():
            optimizer[index]["step"].fill_(steps[index])


def _scatter_to_views(tensor: Tensor, views: Sequence[Tensor]) -> None:
    """Copy the elements of `tensor`, in order, to `views`."""
    chunks = torch.split_with_sizes(tensor.reshape(-1), [view.numel() for view in views])
    for view, chunk in zip(views, chunks, strict=True):
        view.copy_(chunk)
