"""Check that a run can resume from a checkpoint, or start from its weights: same function, or the change is requested.

Configs are compared before any process group starts and before anything is written. Parameters are compared when they
are read.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.config.compare import (
    REQUESTABLE,
    Difference,
    function_differences,
    other_differences,
    resume_differences,
)
from dist_llm.config.load import parse_saved
from dist_llm.config.schema import Config, ModelConfig
from dist_llm.errors import CheckpointError
from dist_llm.models.build_model import build_model

log = logging.getLogger("dist_llm")


def read_config(folder: CheckpointFolder | Path) -> Config:
    """Return the resolved config of a checkpoint. Raises CheckpointError if it is not valid."""
    name = "config.yaml"
    try:
        text = CheckpointFolder(folder).read(name).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder}/{name}: is damaged: {error}; use another checkpoint") from None
    return parse_saved(text, f"{folder}/{name}")


def check_resume(folder: CheckpointFolder, config: Config) -> list[Difference]:
    """Return the differences that do not change the function, to be logged. Raises CheckpointError for other
    differences."""
    before = read_config(folder)
    if differences := resume_differences(before, config):
        requestable = [difference.key for difference in differences if difference.key in REQUESTABLE]
        can_request = len(requestable) == len(differences)
        changes_data = any(difference.key.startswith("data.") for difference in differences)
        raise CheckpointError(
            f"{folder}: the run cannot resume, because its config describes another model than this checkpoint:"
            f"{_format_differences(differences)}\nSet these keys to the checkpoint's values; or start a new run "
            "with another run.dir"
            + (f", init_from={folder} and init_allow=[{','.join(requestable)}]" if can_request else "")
            + ("; or set data.on_change: new_segment" if changes_data else "")
        )
    return other_differences(before, config)


def check_init_from(path: Path, config: Config) -> list[Difference]:
    """Return the function differences that `init_allow` requests. Raises CheckpointError for other function
    differences."""
    differences = function_differences(read_config(path), config)
    refused = [difference for difference in differences if difference.key not in config.init_allow]
    if refused:
        fixed = [difference.key for difference in refused if difference.key not in REQUESTABLE]
        allow = [*config.init_allow, *(difference.key for difference in refused if difference.key in REQUESTABLE)]
        hints = [f"set {', '.join(fixed)} to the checkpoint's values, which init_from cannot change"] if fixed else []
        hints += [f"for a difference that is intended, set init_allow=[{','.join(allow)}]"] if allow else []
        raise CheckpointError(
            f"init_from {path}: this config describes another model than the checkpoint:"
            f"{_format_differences(refused)}\nTo use the checkpoint's model, write "
            f"`model: {{from: {path}}}`; {'; '.join(hints)}"
        )
    return differences


def log_init_differences(path: Path, config: Config, requested: Sequence[Difference]) -> None:
    """Log each difference that an init_from accepts, and each entry of `init_allow` that has no effect."""
    for difference in requested:
        log.info("init_allow: %s", difference)
    for key in config.init_allow:
        if key not in {difference.key for difference in requested}:
            log.info("init_allow: %s is the same in the checkpoint", key)
    log_harmless_differences(other_differences(read_config(path), config))


def log_harmless_differences(differences: Iterable[Difference]) -> None:
    """Log each difference that does not change the function of a trained model."""
    for difference in differences:
        log.info("%s; the model's function stays the same", difference)


def check_parameters(
    folder: CheckpointFolder | Path, saved: Mapping[str, Sequence[int]], model: ModelConfig, requested: bool
) -> tuple[list[str], list[str]]:
    """Return (parameters that only the full model has, parameters that only the checkpoint has).

    Raises CheckpointError if there are any and `requested` is false.
    """
    with torch.device("meta"):
        in_model = {f"model.{name}" for name, _ in build_model(model).named_parameters()}
    in_checkpoint = {name for name in saved if name.startswith("model.")}
    added, dropped = sorted(in_model - in_checkpoint), sorted(in_checkpoint - in_model)
    if (added or dropped) and not requested:
        missing = f"the checkpoint lacks {_format_names(added)}" if added else ""
        extra = f"the checkpoint has {_format_names(dropped)}, which this config's model lacks" if dropped else ""
        raise CheckpointError(
            f"{folder}: {'; '.join(filter(None, (missing, extra)))}; use the `model` section "
            "the checkpoint was made with"
        )
    return added, dropped


def _format_names(names: Sequence[str]) -> str:
    shown = ", ".join(name.removeprefix("model.") for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _format_differences(differences: Iterable[Difference]) -> str:
    return "".join(f"\n  {difference}" for difference in differences)
