"""`dist-llm convert to-deepspeed` and `from-deepspeed` convert a checkpoint to one of DeepSpeed, and back."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.find_checkpoint import fetch_verified_checkpoint
from dist_llm.checkpoint.load_checkpoint import read_progress
from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.commands.conversion import (
    build_initial_progress,
    check_probe,
    console,
    read_probe,
    read_small_files,
    show_progress,
    write_checkpoint,
)
from dist_llm.config.load import load_saved_config
from dist_llm.config.schema import Config
from dist_llm.convert.deepspeed_read import open_deepspeed
from dist_llm.convert.deepspeed_write import write_deepspeed, write_universal
from dist_llm.convert.layerwise_probe import compute_probe_layerwise
from dist_llm.convert.native_shapes import list_native_shapes
from dist_llm.convert.weights import LazyWeights
from dist_llm.convert.write_weights import verify_written
from dist_llm.errors import CheckpointError
from dist_llm.models.build_model import build_model, build_param_specs
from dist_llm.optim.build_optimizer import build_optimizer
from dist_llm.optim.param_groups import is_frozen


def to_deepspeed(checkpoint: str, out: str, stage: int | None = None, world: int = 1, universal: bool = False) -> None:
    """Write a ZeRO directory of `stage` for `world` ranks, or a universal checkpoint.

    Raises CheckpointError unless exactly one of `stage` and `universal` is set, or if the written tensors differ.
    """
    if bool(stage) == universal:
        raise CheckpointError("give either --stage 1, 2 or 3 (and --world), or --universal")
    path = fetch_verified_checkpoint(checkpoint)
    config, step = load_saved_config(path), read_progress(CheckpointFolder(path)).step
    check_probe(read_probe(path), compute_probe_layerwise(NativeWeights(path), config.model), path)
    with show_progress(NativeWeights(path), "converting") as weights:
        if stage is None:
            directory = write_universal(Path(out), weights, step=step)
        else:
            groups = build_optimizer_groups(config)
            directory = write_deepspeed(
                Path(out),
                weights,
                stage=stage,
                world_size=world,
                param_groups=groups.names,
                group_settings=groups.settings,
                step=step,
                shared_params=groups.shared_params,
            )
    with show_progress(weights, "checking") as tracked:
        written = open_deepspeed(directory)
        shapes = {name: written.shapes[name] for name in tracked.shapes}
        verify_written(LazyWeights(shapes, written.read), tracked, torch.float32)
    console.print(f"wrote {directory}: {len(weights.shapes)} tensors")


def from_deepspeed(directory: str, out: str, like: str) -> None:
    """Convert a DeepSpeed directory with its optimizer state to a checkpoint, which gets the config of `like`.

    Raises CheckpointError if a tensor is missing, unknown, or of another shape.
    """
    reference = fetch_verified_checkpoint(like)
    config = load_saved_config(reference)
    groups = build_optimizer_groups(config)
    weights = open_deepspeed(Path(directory), groups.names)
    expected = {f"model.{name}": shape for name, shape in list_native_shapes(config.model).items()}
    for name, shape in expected.items():
        if weights.shapes.get(name) != shape:
            actual = f"has shape {list(weights.shapes[name])}" if name in weights.shapes else "is missing"
            raise CheckpointError(f"{directory}: {name} {actual}; --like {reference} has {list(shape)}")
    unexpected_names = {name for name in weights.shapes if name.startswith("model.")} - expected.keys()
    if unknown := sorted(unexpected_names - {f"model.{name}" for name in groups.shared_params}):
        raise CheckpointError(f"{directory}: {unknown[0]} is not a parameter of the model of --like {reference}")
    shapes = {name: shape for name, shape in weights.shapes.items() if name not in unexpected_names}
    write_checkpoint(
        Path(out), LazyWeights(shapes, weights.read), read_small_files(reference) | build_initial_progress()
    )


class OptimizerGroups(NamedTuple):
    """The parameter groups of the optimizer of a config."""

    names: list[list[str]]  # parameter names of each group
    settings: list[dict[str, Any]]  # other entries of each group, such as lr
    shared_params: dict[str, str]  # second name -> first name of parameters that the model has twice


def build_optimizer_groups(config: Config) -> OptimizerGroups:
    """Return the parameter groups that training with this config would have. Allocates no memory.

    Raises CheckpointError if optim.groups freezes parameters: they are in no group, so DeepSpeed would lack them.
    """
    with torch.device("meta"):
        model = build_model(config.model)
    name_of = {parameter: name for name, parameter in model.named_parameters()}
    if frozen := next((name for name in name_of.values() if is_frozen(config.optim, name)), None):
        raise CheckpointError(
            f"{frozen} is frozen by optim.groups, so it is in no parameter group, and checkpoints of DeepSpeed are "
            "written and read by group; convert to Hugging Face or torch.save instead, which have all weights"
        )
    optimizer = build_optimizer(config.optim, model.named_parameters(), build_param_specs(config.model))
    names = [[name_of[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    all_names = model.named_parameters(remove_duplicate=False)
    shared_params = {name: name_of[parameter] for name, parameter in all_names if name != name_of[parameter]}
    return OptimizerGroups(names, settings, shared_params)
