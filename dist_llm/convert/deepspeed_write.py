"""Write checkpoints that DeepSpeed loads, without DeepSpeed, in a single process: ZeRO 1 to 3 and universal
checkpoints.

Files are first written with empty tensors, then filled through a memory map, one parameter at a time. So memory holds
one tensor at a time. Everything is written to a temporary directory and renamed; `latest` is written last.
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

VERSION = "0.19.8"  # the DeepSpeed version that defines this layout
SUB_GROUP_SIZE = 1_000_000_000  # DeepSpeed's default


def write_deepspeed(
    directory: Path,
    weights: Weights,
    stage: int,
    world: int,
    *,
    groups: Sequence[Sequence[str]],
    settings: Sequence[Mapping[str, Any]],
    step: int,
    shared: Mapping[str, str] | None = None,
    sub_group_size: int = SUB_GROUP_SIZE,
    tag: str = "",
) -> Path:
    """Write a directory `tag` (global_step<step>) that an engine of this ZeRO stage loads on `world` ranks.

    `groups` and `settings` describe the optimizer: the names of each group's parameters in order, and the other entries
    of torch's `param_groups` (lr, betas, ...), which the loading engine adopts. `shared` is {second name: first name}
    of parameters that the model has twice. Moments are written if `weights` has them; without moments the engine starts
    with new ones. At stage 3 an fp16 engine continues with a loss scale of 1: use a universal checkpoint there. Stage 3
    must be loaded with the same `sub_group_size`.

    Raises CheckpointError for another stage, for parameters that are in no group or in two, for moments of only some
    parameters, for different step counts, and if `tag` exists.
    """
    if stage not in (1, 2, 3):
        raise CheckpointError(f"stage {stage}: only ZeRO 1, 2 and 3 can be written; write a universal checkpoint")
    shared = shared or {}
    _check_groups(weights, groups, settings, shared)
    shapes: list[Shapes] = [{name: weights.shapes[f"model.{name}"] for name in group} for group in groups]
    group_of_flat = list(range(len(groups)))  # the optimizer's group of each flat tensor
    if stage == 3:
        sub_groups = [
            (group, part) for group in group_of_flat for part in split_sub_groups(shapes[group], world, sub_group_size)
        ]
        group_of_flat, shapes = [group for group, _ in sub_groups], [part for _, part in sub_groups]
    layouts = [per_param_layout(group, world) if stage == 3 else contiguous_layout(group, world) for group in shapes]
    moments = _moment_keys(weights, [name for group in groups for name in group])
    steps = [_common_step(weights, group) for group in shapes]
    flat_groups = [
        {**rest, "params": [number for number, owner in enumerate(group_of_flat) if owner == group]}
        for group, rest in enumerate(settings)
    ]
    tag = tag or f"global_step{step}"
    with write_tagged_directory(directory, tag, "latest") as aside:
        prefixes = [f"zero_pp_rank_{rank}_" for rank in range(world)]
        for prefix in prefixes if stage == 3 else [""]:
            write_placeholders(
                _build_model_states(shapes, world, stage, step, shared), aside / f"{prefix}mp_rank_00_model_states.pt"
            )
        for rank, prefix in enumerate(prefixes):
            content = _build_optim_states(layouts, flat_groups, moments, steps, stage, rank)
            write_placeholders(content, aside / f"{prefix}mp_rank_00_optim_states.pt")
        optims = [open_writable(aside / f"{prefix}mp_rank_00_optim_states.pt") for prefix in prefixes]
        _fill_tensors(weights, layouts, [content["optimizer_state_dict"] for content in optims], moments, steps)
        if stage < 3:
            for name, tensor in open_writable(aside / "mp_rank_00_model_states.pt")["module"].items():
                tensor.copy_(weights.read(f"model.{shared.get(name, name)}"))
    return directory / tag


def write_universal(directory: Path, weights: Weights, *, step: int, tag: str = "") -> Path:
    """Write a directory `tag` (global_step<step>) for {"checkpoint": {"load_universal": true}}, any stage and world
    size.

    It contains no optimizer settings, so those of the loading engine apply. Without moments in `weights` it loads at
    stages 1 and 2 only: DeepSpeed's stage 3 requires them. At stage 3, loading it gives all groups of torch's
    optimizers the same tensor `step`, which each group then increments: clone it in each state, or use write_deepspeed.

    Raises CheckpointError for moments of only some parameters, and if `tag` exists.
    """
    shapes = {name[6:]: shape for name, shape in weights.shapes.items() if name.startswith("model.")}
    moments, steps = _moment_keys(weights, list(shapes)), _common_step(weights, shapes)
    tag = tag or f"global_step{step}"
    with write_tagged_directory(directory, tag, "latest_universal") as aside:
        for name in shapes:
            folder = aside / "zero" / name
            folder.mkdir(parents=True)
            for key, full in {"fp32": f"model.{name}", **{key: f"optim.{name}.{key}" for key in moments}}.items():
                torch.save({"param": weights.read(full).float().contiguous(), "cat_dim": 0}, folder / f"{key}.pt")
            if steps is not None:
                torch.save(torch.tensor(steps), folder / "step.pt")
        # An engine copies its groups' settings from this list, one by one. The settings are empty, but the list
        # must have as many entries as the engine has groups.
        no_settings = [{"params": [number]} for number in range(len(shapes))]
        state = {} if steps is None else {0: {"step": torch.tensor(steps)}}
        optimizer = {"state": state, "param_groups": no_settings}
        common = {"optimizer_state_dict": optimizer, "param_groups": no_settings, "ds_version": VERSION}
        torch.save(common, aside / "zero" / "optimizer_state.pt")
        model = _build_model_states([shapes], 1, 3, step, {})
        for prefix in ("", "zero_pp_rank_0_"):  # the names that stages 1 and 2, and stage 3, read
            torch.save(model, aside / f"{prefix}mp_rank_00_model_states.pt")
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
    known = {name[6:] for name in weights.shapes if name.startswith("model.")} - shared.keys()
    if wrong := sorted(known.symmetric_difference(names)):
        raise CheckpointError(
            f"{wrong[0]} is {'in no group' if wrong[0] in known else 'not in the weights'}; groups must have each "
            "parameter once (frozen parameters and buffers cannot be written; remove them)"
        )


def _moment_keys(weights: Weights, names: Sequence[str]) -> list[str]:
    """Return the keys of the moments that each parameter has: exp_avg, exp_avg_sq; an empty list without moments."""
    keys: dict[str, set[str]] = {name: set() for name in names}
    for full in weights.shapes:
        name, _, key = full.removeprefix("optim.").rpartition(".")
        if full.startswith("optim.") and name in keys:
            keys[name].add(key)
    all_keys = set().union(*keys.values())
    if lacking := [name for name in names if keys[name] != all_keys]:
        raise CheckpointError(f"{lacking[0]} lacks moments that others have; remove all moments, or none")
    return sorted(all_keys - {"step"})


def _common_step(weights: Weights, names: Iterator[str] | Mapping[str, Any]) -> float | None:
    """Return the number of updates of these parameters; None if it is not stored."""
    steps = {float(weights.read(full)) for name in names if (full := f"optim.{name}.step") in weights.shapes}
    if len(steps) > 1:
        raise CheckpointError(
            f"parameters have taken {sorted(steps)} steps, but DeepSpeed stores one number; remove all moments"
        )
    return steps.pop() if steps else None


def _build_model_states(
    shapes: Sequence[Shapes], world: int, stage: int, step: int, shared: Mapping[str, str]
) -> dict[str, Any]:
    """Build the content of a model file. `module` is empty at stage 3: the engine reads weights from the optimizer
    files."""
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
        "dp_world_size": world,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": VERSION,
    }


def _build_optim_states(
    layouts: Sequence[PartitionLayout],
    param_groups: Sequence[Mapping[str, Any]],
    moments: Sequence[str],
    steps: Sequence[float | None],
    stage: int,
    rank: int,
) -> dict[str, Any]:
    """Build the content of a rank's optimizer file. Tensors have their sizes; their values are written later."""
    world = len(layouts[0].sizes)
    state = {
        number: {
            **({} if steps[number] is None else {"step": torch.empty(())}),
            **{key: torch.empty(layout.sizes[rank]) for key in moments},
        }
        for number, layout in enumerate(layouts)
    }
    optimizer = {"state": {k: v for k, v in state.items() if v}, "param_groups": list(param_groups)}
    flats = [torch.empty(layout.unpadded_sizes[rank]) for layout in layouts]
    if stage == 3:
        content = {
            "zero_stage": stage,
            "loss_scaler": LossScaler(),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": world,
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
            "partition_count": [world] * len(layouts),
            "ds_version": VERSION,
            "param_slice_mappings": [_fragment_addresses(layout, rank) for layout in layouts],
        }
    return {
        "optimizer_state_dict": content,
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": VERSION,
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
    ranks: Sequence[Any],
    moments: Sequence[str],
    steps: Sequence[float | None],
) -> None:
    """Copy each tensor into the ranks' memory-mapped files."""
    stage_3 = "fp32_flat_groups" in ranks[0]
    for number, layout in enumerate(layouts):
        flats = [rank["fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"][number] for rank in ranks]
        optimizers = [rank["optimizer_state_dict" if stage_3 else "base_optimizer_state"]["state"] for rank in ranks]
        for name in layout.slices:
            _scatter_to_views(weights.read(f"model.{name}"), layout.views(name, flats))
            for key in moments:
                states = [optimizer[number][key] for optimizer in optimizers]
                _scatter_to_views(weights.read(f"optim.{name}.{key}"), layout.views(name, states))
        for optimizer in optimizers if steps[number] is not None else ():
            optimizer[number]["step"].fill_(steps[number])


def _scatter_to_views(tensor: Tensor, views: Sequence[Tensor]) -> None:
    chunks = torch.split_with_sizes(tensor.reshape(-1), [view.numel() for view in views])
    for view, chunk in zip(views, chunks, strict=True):
        view.copy_(chunk)
