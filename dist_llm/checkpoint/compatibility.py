"""Check that a run can resume from a checkpoint, or start from its weights.

The config must describe the same function (the same mapping from tokens to logits) as the checkpoint, unless
`init_allow` requests a difference. Configs are compared before any process group starts; parameters when they are read.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.config.compare import (
    REQUESTABLE,
    Difference,
    find_function_differences,
    find_other_differences,
    find_resume_differences,
)
from dist_llm.config.load import parse_saved_config
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.schema import Config
from dist_llm.config.upcycle import find_upcycling_problem
from dist_llm.errors import CheckpointError
from dist_llm.models.build_model import build_model
from dist_llm.param_spec import iter_weights

log = logging.getLogger("dist_llm")

NUM_LISTED = 5  # names of parameters that an error message lists


def read_config(folder: CheckpointFolder | Path) -> Config:
    """Return the resolved config of a checkpoint. Raises CheckpointError if it is not valid."""
    name = "config.yaml"
    try:
        text = CheckpointFolder(folder).read(name).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder}/{name}: is damaged: {error}; use another checkpoint") from None
    return parse_saved_config(text, f"{folder}/{name}")


def compare_for_resume(folder: CheckpointFolder, config: Config) -> list[Difference]:
    """Compare the config of a run with that of its checkpoint, and return the differences that a resume allows.

    The returned differences do not change the function of the model. Raises CheckpointError for other differences.
    """
    saved_config = read_config(folder)
    if differences := find_resume_differences(saved_config, config):
        requestable = [difference.key for difference in differences if difference.key in REQUESTABLE]
        can_request = len(requestable) == len(differences)
        changes_data = any(difference.key.startswith("data.") for difference in differences)
        raise CheckpointError(
            f"{folder}: the run cannot resume, because its config describes a different model from this checkpoint:"
            f"{_format_differences(differences)}\nSet these keys to the checkpoint's values; or start a new run "
            "with another run.dir"
            + (f", init_from={folder} and init_allow=[{','.join(requestable)}]" if can_request else "")
            + ("; or set data.on_change: new_segment" if changes_data else "")
        )
    return find_other_differences(saved_config, config)


def compare_for_init(path: Path, config: Config) -> list[Difference]:
    """Compare a config with that of the checkpoint in `path`, whose weights it starts from.

    Return the function differences that `init_allow` requests. Raises CheckpointError for others, and for dense layers
    that cannot become experts.
    """
    saved_config = read_config(path)
    differences = find_function_differences(saved_config, config)
    rejected = [difference for difference in differences if difference.key not in config.init_allow]
    if rejected:
        fixed_keys = [difference.key for difference in rejected if difference.key not in REQUESTABLE]
        allowed_keys = [
            *config.init_allow,
            *(difference.key for difference in rejected if difference.key in REQUESTABLE),
        ]
        hints = (
            [f"set {', '.join(fixed_keys)} to the checkpoint's values, which init_from cannot change"]
            if fixed_keys
            else []
        )
        hints += (
            [f"for a difference that is intended, set init_allow=[{','.join(allowed_keys)}]"] if allowed_keys else []
        )
        raise CheckpointError(
            f"init_from {path}: this config describes a different model from the checkpoint:"
            f"{_format_differences(rejected)}\nTo use the checkpoint's model, write "
            f"`model: {{from: {path}}}`; {'; '.join(hints)}"
        )
    if problem := find_upcycling_problem(saved_config.model, config.model):
        raise CheckpointError(f"init_from {path}: {problem}")
    return differences


def log_init_differences(path: Path, config: Config, requested: Sequence[Difference]) -> None:
    """Log the differences between config and checkpoint `path`, and the entries of `init_allow` that have no effect."""
    for difference in requested:
        log.info("init_allow: %s", difference)
    for key in config.init_allow:
        if key not in {difference.key for difference in requested}:
            log.info("init_allow: %s is the same in the checkpoint", key)
    log_harmless_differences(find_other_differences(read_config(path), config))


def log_harmless_differences(differences: Iterable[Difference]) -> None:
    """Log each difference that does not change the function of a trained model."""
    for difference in differences:
        log.info("%s; the model's function stays the same", difference)


class ParameterDifference(NamedTuple):
    """Names of parameters that only the model or only the checkpoint has. They begin with `model.`."""

    added: list[str]  # only the model has these
    dropped: list[str]  # only the checkpoint has these


def compare_parameters(
    folder: CheckpointFolder | Path, saved: Mapping[str, Sequence[int]], model: ModelConfig, *, allow_differences: bool
) -> ParameterDifference:
    """Compare the names in `saved`, the tensors of the checkpoint in `folder`, with the parameters of the full model.

    Raises CheckpointError if they differ, unless `allow_differences`.
    """
    with torch.device("meta"):
        model_names = {f"model.{name}" for name, _ in iter_weights(build_model(model))}
    checkpoint_names = {name for name in saved if name.startswith("model.")}
    added, dropped = sorted(model_names - checkpoint_names), sorted(checkpoint_names - model_names)
    if (added or dropped) and not allow_differences:
        missing = f"the checkpoint lacks {_format_names(added)}" if added else ""
        surplus = f"the checkpoint has {_format_names(dropped)}, which this config's model lacks" if dropped else ""
        raise CheckpointError(
            f"{folder}: {'; '.join(filter(None, (missing, surplus)))}; use the `model` section "
            "the checkpoint was made with"
        )
    return ParameterDifference(added, dropped)


def _format_names(names: Sequence[str]) -> str:
    listed = ", ".join(name.removeprefix("model.") for name in names[:NUM_LISTED])
    return f"{listed} and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else listed


def _format_differences(differences: Iterable[Difference]) -> str:
    return "".join(f"\n  {difference}" for difference in differences)
