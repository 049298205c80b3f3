"""Read DeepSpeed checkpoints without DeepSpeed, in a single process: ZeRO 0 to 3 and universal checkpoints.

Files are memory-mapped, so a tensor is read on first access. Nothing that a file refers to is imported or run: a stub
replaces each class.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.convert.deepspeed_files import load_mapped
from dist_llm.convert.deepspeed_layout import PartitionLayout, contiguous_layout, per_param_layout
from dist_llm.errors import CheckpointError

RANK_FILE = re.compile(r"(?:(?:bf16_|fp16_)?zero_pp_rank_(\d+)_)?mp_rank_(\d+)_(model|optim)_states\.pt")
MAX_RANKS = 1 << 20  # a larger number in a file means damage
MAX_NAME_BYTES = 255  # of a directory name
TensorEntry = tuple[tuple[int, ...], Callable[[], Tensor]]  # (shape, function that reads the tensor)


@dataclass(frozen=True)
class DeepSpeedWeights:
    """The tensors of a DeepSpeed checkpoint under the names of our checkpoints.

    The names are model.NAME, optim.NAME.exp_avg, optim.NAME.step and so on. `shapes` lists all tensors.
    """

    shapes: dict[str, tuple[int, ...]]
    readers: Mapping[str, Callable[[], Tensor]]

    def read(self, name: str) -> Tensor:
        """Return a copy of one full tensor.

        Floating-point tensors become fp32, from master weights if there are any.
        """
        tensor = self.readers[name]()
        return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype)


def open_deepspeed(directory: Path, groups: Sequence[Sequence[str]] = ()) -> DeepSpeedWeights:
    """Open a checkpoint directory, or its parent directory with the file `latest` or `latest_universal`.

    ZeRO 0 stores moments by parameter index. They are read only if `groups` has the parameter names in the order of the
    optimizer. Frozen parameters, buffers and second names of shared parameters are also read as weights.

    Raises CheckpointError for missing or damaged files, and for tensor, pipeline and expert parallelism.
    """
    folder = _resolve_tag(directory)
    with _convert_format_errors(folder):
        entries = dict(_read_universal(folder) if (folder / "zero").is_dir() else _read_zero(folder, groups))
        return DeepSpeedWeights(
            {name: shape for name, (shape, _) in entries.items()},
            {name: partial(_read_tensor, folder, name, shape, read) for name, (shape, read) in entries.items()},
        )


@contextmanager
def _convert_format_errors(folder: Path) -> Iterator[None]:
    """Within the block, convert errors from unexpected content of the files to CheckpointError."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(
            f"{folder}: not in the format of DeepSpeed: {type(error).__name__}: {error}; copy its files again, or save "
            "with a supported version of DeepSpeed"
        ) from error


def _read_tensor(folder: Path, name: str, shape: tuple[int, ...], read: Callable[[], Tensor]) -> Tensor:
    with _convert_format_errors(folder):
        tensor = read().detach()
        if tensor.numel() != prod(shape):
            raise CheckpointError(f"{folder}: {name} has {tensor.numel()} elements, not the {prod(shape)} of {shape}")
        return tensor.reshape(shape)


def _resolve_tag(directory: Path) -> Path:
    for latest in ("latest", "latest_universal"):
        if (directory / latest).is_file():
            tag = (directory / latest).read_bytes().decode(errors="replace").strip()
            if "/" in tag or "\0" in tag or tag in ("", ".", "..") or len(tag.encode()) > MAX_NAME_BYTES:
                raise CheckpointError(f"{directory / latest}: does not name a directory beside it: {tag[:80]!r}")
            if not (directory / tag).is_dir():
                raise CheckpointError(f"{directory / latest}: names {tag[:80]}, which is missing; name one that exists")
            return directory / tag
    if (directory / "zero").is_dir() or any(directory.glob("*_states.pt")):
        return directory
    raise CheckpointError(
        f"{directory}: not a DeepSpeed checkpoint; give the directory with the file `latest`, or with *_model_states.pt"
    )


def _read_zero(folder: Path, groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, TensorEntry]]:
    model_files, optim_files = _find_rank_files(folder, "model"), _find_rank_files(folder, "optim")
    if 0 not in model_files:
        raise CheckpointError(f"{folder}: has no model states of rank 0; copy them from the directory of the run")
    model = load_mapped(model_files[0])
    if not isinstance(model, dict) or not isinstance(model.get("module"), dict):
        raise CheckpointError(f"{model_files[0]}: has no `module`; checkpoints of pipelines are not supported")
    if model.get("param_shapes") is None:
        yield from _read_unpartitioned(model_files[0], model, groups)
        return
    world_size = model["dp_world_size"]
    _check_all_ranks(folder, "optim", optim_files, world_size)
    optim_states = [load_mapped(optim_files[rank])["optimizer_state_dict"] for rank in range(world_size)]
    is_stage_3 = "fp32_flat_groups" in optim_states[0]
    if is_stage_3:
        _check_all_ranks(folder, "model", model_files, world_size)
    masters = dict(_read_optimizer_weights(optim_files, model["param_shapes"], optim_states))
    yield from masters.items()
    fragments = (
        [load_mapped(model_files[rank]).get("frozen_param_fragments") or {} for rank in range(world_size)]
        if is_stage_3
        else []
    )
    yield from _read_other_weights(model, masters, fragments).items()


def _read_optimizer_weights(
    files: Mapping[int, Path], groups: Sequence[Mapping[str, Sequence[int]]], optim_states: Sequence[Any]
) -> Iterator[tuple[str, TensorEntry]]:
    """Yield fp32 weights and moments from the optimizer states of all ranks.

    `groups` has {parameter name: shape} of each parameter group. `files` are the paths of `optim_states`, by rank.
    """
    is_stage_3 = "fp32_flat_groups" in optim_states[0]
    flats_key, base_key = (
        ("fp32_flat_groups", "optimizer_state_dict")
        if is_stage_3
        else ("single_partition_of_fp32_groups", "base_optimizer_state")
    )
    if len(optim_states[0][flats_key]) != len(groups):
        raise CheckpointError(
            f"{files[0]}: does not have the {len(groups)} groups of its model states; copy both of one step"
        )
    num_partitions = optim_states[0]["partition_count"]
    for group_index, group in enumerate(groups):
        shapes = {name: tuple(shape) for name, shape in group.items()}
        if (num_partitions[group_index] if isinstance(num_partitions, list) else num_partitions) != len(optim_states):
            raise CheckpointError(
                f"{files[0]}: group {group_index} is on other ranks than the rest (expert parallelism?): not supported"
            )
        gaps = () if is_stage_3 else optim_states[0].get("param_alignment_paddings", {group_index: ()})[group_index]
        layout = (
            per_param_layout(shapes, len(optim_states))
            if is_stage_3
            else contiguous_layout(shapes, len(optim_states), gaps)
        )
        states = [_group_state(rank_state[base_key], group_index) for rank_state in optim_states]
        keys = {key for key, value in states[0].items() if isinstance(value, Tensor) and value.ndim}
        flats = {key: [state[key] for state in states] for key in sorted(keys)}
        weights = [rank_state[flats_key][group_index] for rank_state in optim_states]
        for description, tensors in {"weights": weights, **flats}.items():
            _check_flat_sizes(files, f"{description} of group {group_index}", tensors, layout)
        scalars = {key: states[0][key] for key in states[0].keys() - keys}
        for name, shape in shapes.items():
            yield f"model.{name}", (shape, partial(_concatenate, layout.views(name, weights)))
            for key, tensors in flats.items():
                yield f"optim.{name}.{key}", (shape, partial(_concatenate, layout.views(name, tensors)))
            for key, value in scalars.items():
                yield f"optim.{name}.{key}", ((), partial(torch.tensor, float(value)))


def _group_state(optimizer: Any, group_index: int) -> dict[str, Any]:
    """Return the optimizer state of a group, {key: flat moment}.

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
    model: Any, masters: Mapping[str, TensorEntry], fragments: Sequence[Any]
) -> dict[str, TensorEntry]:
    """Return weights that are not in the optimizer state: frozen parameters, buffers, names of shared parameters.

    In stage 3, `fragments` are the shards of frozen parameters, by rank. In other stages, `module` has the full
    tensors.
    """
    entries: dict[str, TensorEntry] = {}
    for name, shape in (model.get("frozen_param_shapes") or {}).items() if fragments else ():
        layout = per_param_layout({name: tuple(shape)}, len(fragments))
        views = layout.views(name, [fragment[name] for fragment in fragments])
        entries[f"model.{name}"] = tuple(shape), partial(_concatenate, views)
    for second_name, first_name in (model.get("shared_params") or {}).items():
        if f"model.{first_name}" in masters:
            entries[f"model.{second_name}"] = masters[f"model.{first_name}"]
    names = model["buffer_names"] if fragments else model["module"]
    for name, tensor in ((name, model["module"].get(name)) for name in names):
        if isinstance(tensor, Tensor) and f"model.{name}" not in masters.keys() | entries.keys():
            entries[f"model.{name}"] = tuple(tensor.shape), tensor.clone
    return entries


def _read_unpartitioned(path: Path, model: Any, groups: Sequence[Sequence[str]]) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the tensors of ZeRO 0: weights by name, and moments by parameter index in the optimizer."""
    optimizer = model.get("optimizer") or {"state": {}}
    if "state" not in optimizer:
        raise CheckpointError(
            f"{path}: the fp32 weights of bf16 and fp16 at stage 0 are stored in a form that is not supported; "
            "save at stage 1, or as a universal checkpoint"
        )
    for name, tensor in model["module"].items():
        if isinstance(tensor, Tensor):
            yield f"model.{name}", (tuple(tensor.shape), tensor.clone)
    names = [name for group in groups for name in group]
    if names and optimizer["state"] and len(names) != sum(len(group["params"]) for group in optimizer["param_groups"]):
        raise CheckpointError(
            f"{path}: its optimizer does not have the {len(names)} parameters of `groups`; give its groups"
        )
    for param_index, name in enumerate(names):
        for key, value in optimizer["state"].get(param_index, {}).items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(float(value))
            if tensor.ndim and tensor.shape != model["module"][name].shape:
                raise CheckpointError(
                    f"{path}: {key} number {param_index} does not have the shape of {name}; give `groups` in order"
                )
            yield f"optim.{name}.{key}", (tuple(tensor.shape), tensor.clone)


def _read_universal(folder: Path) -> Iterator[tuple[str, TensorEntry]]:
    """Yield the tensors of zero/NAME/KEY.pt.

    From stage 3 the tensors are flat, and only zero/optimizer_state.pt has the step.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    shared_params: dict[str, str] = {}  # second name -> first name
    for path in sorted(folder.glob("*_model_states.pt"))[:1]:
        model = load_mapped(path)
        for group in model.get("param_shapes") or []:
            shapes |= {name: tuple(shape) for name, shape in group.items()}
        shared_params = model.get("shared_params") or {}
    optimizer_file = folder / "zero" / "optimizer_state.pt"
    common_state = load_mapped(optimizer_file) if optimizer_file.exists() else {}
    step = common_state.get("optimizer_state_dict", {}).get("state", {}).get(0, {}).get("step")
    names = sorted(path.name for path in (folder / "zero").iterdir() if path.is_dir())
    for name in names:
        files = {path.stem: path for path in sorted((folder / "zero" / name).glob("*.pt"))}
        tensor = _load_param(files.get("fp32", folder / "zero" / name / "fp32.pt"))
        shape = shapes.get(name, tuple(tensor.shape))
        for key, path in files.items():
            tensor = _load_param(path)
            if tensor.numel() != (1 if key == "step" else prod(shape)):
                raise CheckpointError(f"{path}: has {tensor.numel()} elements, not the {prod(shape)} of {list(shape)}")
            full_name = f"model.{name}" if key == "fp32" else f"optim.{name}.{key}"
            yield full_name, (() if key == "step" else shape, partial(_load_param, path, copy=True))
        if "exp_avg" in files and "step" not in files and step is not None:
            yield f"optim.{name}.step", ((), partial(torch.tensor, float(step)))
    for second_name, first_name in shared_params.items():
        if first_name in names and second_name not in names:
            yield (
                f"model.{second_name}",
                (shapes[first_name], partial(_load_param, folder / "zero" / first_name / "fp32.pt", copy=True)),
            )


def _load_param(path: Path, copy: bool = False) -> Tensor:
    """Load the tensor of one file of a universal checkpoint."""
    content = load_mapped(path)
    content = content["param"] if isinstance(content, dict) else content
    tensor = content if isinstance(content, Tensor) else torch.tensor(float(content))
    return tensor.clone() if copy else tensor


def _concatenate(chunks: Sequence[Tensor]) -> Tensor:
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


def _check_flat_sizes(
    files: Mapping[int, Path], description: str, flats: Sequence[Tensor], layout: PartitionLayout
) -> None:
    for rank, flat in enumerate(flats):
        if flat.numel() not in (layout.unpadded_sizes[rank], layout.sizes[rank]):
            raise CheckpointError(
                f"{files[rank]}: {description} have {flat.numel()} elements, not {layout.sizes[rank]} "
                f"({layout.unpadded_sizes[rank]} without padding); the file is damaged or of another run: copy it again"
            )
