"""Whether a run may go on from a checkpoint, or start from its weights: the same function, or the change is requested.

Configs are compared without a process group and before anything is written. Parameters are compared when they are read.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from dist_llm.checkpoint.folder import Folder
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


def read_config(folder: Folder | Path) -> Config:
    """The resolved config in a checkpoint. Raises CheckpointError where it is not valid."""
    name = "config.yaml"
    try:
        text = Folder(folder).read(name).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{folder}/{name}: is damaged: {error}; use another checkpoint") from None
    return parse_saved(text, f"{folder}/{name}")


def check_resume(folder: Folder, config: Config) -> list[Difference]:
    """The differences that do not change the function, to be logged. Raises CheckpointError where others exist."""
    before = read_config(folder)
    if odd := resume_differences(before, config):
        requestable = [each.key for each in odd if each.key in REQUESTABLE]
        raise CheckpointError(
            f"{folder}: the run cannot go on, because its config describes another model than this checkpoint:"
            f"{_format_differences(odd)}\nSet these keys to the checkpoint's values; or start a new run with another "
            "run.dir"
            + (f", init_from={folder} and init_allow=[{','.join(requestable)}]" if len(requestable) == len(odd) else "")
            + ("; or set data.on_change: new_segment" if any(each.key.startswith("data.") for each in odd) else "")
        )
    return other_differences(before, config)


def check_init_from(path: Path, config: Config) -> list[Difference]:
    """The differences in the function that `init_allow` requests. Raises CheckpointError where others exist."""
    found = function_differences(read_config(path), config)
    odd = [each for each in found if each.key not in config.init_allow]
    if odd:
        fixed = [each.key for each in odd if each.key not in REQUESTABLE]
        allow = [*config.init_allow, *(each.key for each in odd if each.key in REQUESTABLE)]
        hints = [f"set {', '.join(fixed)} to the checkpoint's values, which init_from cannot change"] if fixed else []
        hints += [f"for a difference that is intended, set init_allow=[{','.join(allow)}]"] if allow else []
        raise CheckpointError(
            f"init_from {path}: this config describes another model than the checkpoint:{_format_differences(odd)}\n"
            f"To use the checkpoint's model, write `model: {{from: {path}}}`; {'; '.join(hints)}"
        )
    return found


def log_init_differences(path: Path, config: Config, requested: Sequence[Difference]) -> None:
    """One line for each difference that a start from other weights accepts, and for each request without effect."""
    for each in requested:
        log.info("init_allow: %s", each)
    for key in config.init_allow:
        if key not in {each.key for each in requested}:
            log.info("init_allow: %s is the same in the checkpoint", key)
    log_harmless_differences(other_differences(read_config(path), config))


def log_harmless_differences(differences: Iterable[Difference]) -> None:
    """One line for each difference that does not change the function of a trained model."""
    for each in differences:
        log.info("%s; the model's function stays the same", each)


def check_parameters(
    folder: Folder | Path, saved: Mapping[str, Sequence[int]], model: ModelConfig, requested: bool
) -> tuple[list[str], list[str]]:
    """(parameters of the whole model that the checkpoint lacks, those of the checkpoint that the model lacks).

    Raises CheckpointError where there are some and no change was `requested`.
    """
    with torch.device("meta"):
        wanted = {f"model.{name}" for name, _ in build_model(model).named_parameters()}
    there = {name for name in saved if name.startswith("model.")}
    added, dropped = sorted(wanted - there), sorted(there - wanted)
    if (added or dropped) and not requested:
        lack = f"the checkpoint lacks {_format_names(added)}" if added else ""
        left = f"the checkpoint has {_format_names(dropped)}, which this config's model lacks" if dropped else ""
        raise CheckpointError(
            f"{folder}: {'; '.join(filter(None, (lack, left)))}; use the `model` section the checkpoint was made with"
        )
    return added, dropped


def _format_names(names: Sequence[str]) -> str:
    shown = ", ".join(name.removeprefix("model.") for name in names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _format_differences(differences: Iterable[Difference]) -> str:
    return "".join(f"\n  {each}" for each in differences)
