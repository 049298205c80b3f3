"""Resume from a checkpoint, or start from its weights, and check that they compute the same as when they were saved.

A resumed run also repeats steps that a kill discarded. Their losses are compared with their rows in metrics.jsonl if
the config is that of the start which wrote the rows.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_llm.checkpoint import store as checkpoints
from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.compatibility import check_init_from, check_parameters, log_init_differences, read_config
from dist_llm.checkpoint.init_from import init_from_checkpoint
from dist_llm.checkpoint.probe import PROBE, TOLERANCES, compare_probes, parse_probe
from dist_llm.config.compare import PART_KEYS
from dist_llm.config.load import parse_saved
from dist_llm.config.schema import Config
from dist_llm.engines.base import Engine
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.errors import CheckpointError, UserError
from dist_llm.observe.metrics import read_rows

log = logging.getLogger("dist_llm")

NUM_STEPS = 10  # compared after a kill; later ones amplify rounding
# Sections and keys that decide the losses of the next steps.
DECIDING = ("model", "objective", "loss", "optim", "schedule", "precision", "fp8")
DECIDING_DATA = ("seq_len", "global_batch", "order", "windows", "score_prompts", "document_mask", "skip", "stages")


def load_run(folder: CheckpointFolder, engine: Engine, config: Config) -> Progress:
    """Read weights and optimizer state. Raises CheckpointError if they differ from the saved ones."""
    check_parameters(folder, checkpoints.read_shapes(folder), config.model, requested=False)
    progress = checkpoints.load_checkpoint(folder, engine.state)
    if engine.loss_scale is not None and progress.loss_scale is not None:
        engine.loss_scale = progress.loss_scale
    check_probe(folder, engine, config)
    return progress


def start_from_weights(path: Path, engine: Engine, config: Config) -> None:
    """Load another run's weights. Raises CheckpointError if they do not fit, or differ from the saved ones."""
    requested = check_init_from(path, config)
    log_init_differences(path, config, requested)
    changes_parts = any(each.key in PART_KEYS for each in requested)
    added, dropped = check_parameters(path, checkpoints.read_shapes(path), config.model, changes_parts)
    for what, names in (("that keep their initial values", added), ("of the checkpoint are not used", dropped)):
        if names:
            log.info("init_allow: parameters %s: %s", what, ", ".join(names))
    known = min(read_config(path).model.vocab_size, config.model.vocab_size)
    init_from_checkpoint(path, engine.state, config.init_optimizer == "keep", known, added)
    log.info("starting from %s, %d ids of it known", path, known)
    if changed := [each.key for each in requested if each.key != "objective"]:
        log.info("%s: the probe is not compared, because init_allow changes %s", path, ", ".join(changed))
    else:
        check_probe(CheckpointFolder(path), engine, config)


def check_probe(folder: CheckpointFolder, engine: Engine, config: Config) -> None:
    """Compare the probe of the loaded weights with the checkpoint's. Call it on all ranks.

    Raises CheckpointError if they differ by more than rounding, unless checkpoint.probe is warn.
    """
    probe = parse_probe(folder.read(PROBE), f"{folder}/{PROBE}") if PROBE in folder.list_names() else None
    if probe is None:
        log.info("%s: has no probe that this version can compare; the weights are used unchecked", folder)
        return
    try:
        log.info("%s: %s", folder, compare_probes(probe, measure_probe(engine, config), str(folder)))
    except CheckpointError as error:
        if config.checkpoint.probe == "refuse":
            raise CheckpointError(
                f"{error}. Start again, on another machine if possible: the hardware may be faulty. If it fails again, "
                "move this checkpoint away to resume from the previous one; or set checkpoint.probe: warn to accept it"
            ) from None
        log.warning("%s", error)


class EarlierSteps:
    """The losses of discarded steps of an earlier start of the run: {step: loss}."""

    def __init__(self, losses: Mapping[int, float], tolerance: float = 0.0) -> None:
        self.losses, self.tolerance = dict(losses), tolerance
        self.num_compared = 0

    @staticmethod
    def read(directory: Path, step: int, config: Config) -> "EarlierSteps":
        """Read the rows after `step` in metrics.jsonl, which is truncated next. Return no rows if the config changed
        since."""
        losses: dict[int, float] = {}
        try:
            for _, row in read_rows(directory / "metrics.jsonl"):
                loss = row.get("loss")
                if isinstance(loss, float) and math.isfinite(loss) and step < row["step"] <= step + NUM_STEPS:
                    losses[row["step"]] = loss
            if not losses:
                return EarlierSteps({})
            before = parse_saved((directory / "config.yaml").read_text(encoding="utf-8"), str(directory))
        except (OSError, UnicodeDecodeError, UserError) as error:
            log.info("resumed steps are not compared with those before: %s", error)
            return EarlierSteps({})
        if changed := _changes(before, config):
            log.info("resumed steps are not compared with those before: %s changed", ", ".join(changed))
            return EarlierSteps({})
        return EarlierSteps(losses, TOLERANCES["fp8" if config.fp8 else config.precision][0])

    def compare(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return events, to print and write, for steps whose losses differ from those of the earlier start."""
        events = []
        for row in rows:
            before = self.losses.pop(row.get("step", 0), None)
            if before is None or "loss" not in row:
                continue
            self.num_compared += 1
            if not abs(row["loss"] - before) <= self.tolerance * max(1.0, abs(before)):
                event = (
                    f"step {row['step']} had a loss of {before:.9g} before the run was resumed, and now has "
                    f"{row['loss']:.9g}; rounding explains at most {self.tolerance * max(1.0, abs(before)):.2g}: "
                    "the weights, the optimizer state or the data differ from the first time"
                )
                log.warning("%s", event)
                events.append({"step": row["step"], "event": event})
        if self.num_compared and not self.losses:
            if not events:
                log.info("%d steps that were taken before have the same losses again", self.num_compared)
            self.num_compared = 0
        return events


def _changes(before: Config, now: Config) -> list[str]:
    """Return the changed keys and sections among those that decide the losses."""
    changes = [name for name in DECIDING if getattr(before, name) != getattr(now, name)]
    changes += [f"data.{name}" for name in DECIDING_DATA if getattr(before.data, name) != getattr(now.data, name)]
    if before.run.seed != now.run.seed:
        changes.append("run.seed")
    weights = [[(each.name, each.weight, each.epochs) for each in config.data.sources] for config in (before, now)]
    return changes + (["data.sources"] if weights[0] != weights[1] else [])
