"""Load a checkpoint to resume a run or to initialize another one, and check that the loaded weights are the saved ones.

The probe (a fixed batch) must give the result that was saved with the checkpoint. A killed run also repeats the steps
after its last checkpoint. Their losses must equal those in metrics.jsonl, unless the config has changed since.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.compatibility import compare_for_init, compare_parameters, log_init_differences, read_config
from dist_llm.checkpoint.init_from import init_from_checkpoint
from dist_llm.checkpoint.load_checkpoint import load_checkpoint, read_shapes
from dist_llm.checkpoint.probe import PROBE_FILE, TOLERANCES, compare_probes, parse_probe
from dist_llm.config.compare import PARAMETER_KEYS
from dist_llm.config.load import parse_saved_config
from dist_llm.config.schema import Config
from dist_llm.config.upcycle import keeps_function
from dist_llm.engines.base import Engine
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.errors import CheckpointError, UserError
from dist_llm.models.build_model import build_param_specs
from dist_llm.observe.metrics import MetricsRow, read_rows
from dist_llm.param_spec import list_vocab_params
from dist_llm.training.callback import Callback, TrainingState

log = logging.getLogger("dist_llm")

NUM_COMPARED_STEPS = 10  # repeated steps whose losses are compared; later steps amplify rounding
# Sections of the config, and keys of its section `data`, that determine the losses of the next steps.
LOSS_SECTIONS = ("model", "objective", "loss", "optim", "schedule", "precision", "fp8")
LOSS_DATA_KEYS = (
    *("seq_len", "global_batch", "order", "windows", "prompt_loss_weight", "document_mask", "skip", "stages"),
)


def start_run(start: CheckpointFolder | Path | None, engine: Engine, config: Config) -> Progress:
    """Resume from a checkpoint (CheckpointFolder), load initial weights (Path), or keep the initial values (None)."""
    if isinstance(start, CheckpointFolder):
        progress = load_run(start, engine, config)
        log.info("resumed from %s", start)
        return progress
    if start is not None:
        start_from_weights(start, engine, config)
    return Progress()


def load_run(folder: CheckpointFolder, engine: Engine, config: Config) -> Progress:
    """Read weights and optimizer state. Raises CheckpointError if the weights differ from the saved ones."""
    compare_parameters(folder, read_shapes(folder), config.model, allow_differences=False)
    progress = load_checkpoint(folder, engine.state)
    if engine.loss_scale is not None and progress.loss_scale is not None:
        engine.loss_scale = progress.loss_scale
    check_probe(folder, engine, config, "move this checkpoint away to resume from the previous one")
    return progress


def start_from_weights(path: Path, engine: Engine, config: Config) -> None:
    """Load the weights of another run. Raises CheckpointError if they do not fit or differ from the saved ones."""
    requested = compare_for_init(path, config)
    log_init_differences(path, config, requested)
    changes_parts = any(difference.key in PARAMETER_KEYS for difference in requested)
    added, dropped = compare_parameters(path, read_shapes(path), config.model, allow_differences=changes_parts)
    dense_sources = _find_dense_sources(added, dropped)
    added = [name for name in added if name not in dense_sources]
    dropped = [name for name in dropped if name not in dense_sources.values()]
    for description, names in (
        ("that keep their initial values", added),
        ("of the checkpoint are not used", dropped),
        ("of experts that are copies of a dense layer", list(dense_sources)),
    ):
        if names:
            log.info("init_allow: parameters %s: %s", description, ", ".join(names))
    num_known_ids = min(read_config(path).model.vocab_size, config.model.vocab_size)
    vocab_params = list_vocab_params(build_param_specs(config.model))
    keeps_optimizer = config.init_optimizer == "keep"
    init_from_checkpoint(
        path,
        engine.state,
        with_moments=keeps_optimizer,
        num_known_ids=num_known_ids,
        vocab_params=vocab_params,
        added=added,
        dense_sources=dense_sources,
    )
    log.info("starting from %s, which knows %d of the token ids", path, num_known_ids)
    same_function = {"objective"}
    if keeps_function(read_config(path).model, config.model):
        same_function.add("model.feedforward")
    if changed := [difference.key for difference in requested if difference.key not in same_function]:
        log.info("%s: the probe is not compared, because init_allow changes %s", path, ", ".join(changed))
    else:
        check_probe(CheckpointFolder(path), engine, config, "set init_from to another checkpoint")


def _find_dense_sources(added: Sequence[str], dropped: Sequence[str]) -> dict[str, str]:
    """Return {parameter of all experts of a layer: parameter of the dense layer in the checkpoint}."""
    sources = {name: name.replace(".experts.", ".") for name in added if ".feedforward.experts." in name}
    return {name: source for name, source in sources.items() if source in dropped}


def check_probe(folder: CheckpointFolder, engine: Engine, config: Config, alternative: str) -> None:
    """Compare the probe of the loaded weights with the probe in the checkpoint. Every rank must call this.

    `alternative` says what a user can do if the hardware is not the cause.
    Raises CheckpointError if the two differ by more than rounding, unless checkpoint.probe is warn.
    """
    probe = (
        parse_probe(folder.read(PROBE_FILE), f"{folder}/{PROBE_FILE}") if PROBE_FILE in folder.list_names() else None
    )
    if probe is None:
        log.info("%s: has no probe that this version can compare; the weights are used unchecked", folder)
        return
    try:
        log.info("%s: %s", folder, compare_probes(probe, measure_probe(engine, config), str(folder)))
    except CheckpointError as error:
        if config.checkpoint.probe == "refuse":
            raise CheckpointError(
                f"{error}. Start again, on another machine if possible: the hardware may be faulty. If it fails again, "
                f"{alternative}; or set checkpoint.probe: warn to accept it"
            ) from None
        log.warning("%s", error)


class EarlierSteps(Callback):
    """The losses {step: loss} of steps that an earlier start of the run took after the checkpoint.

    The resumed run repeats these steps, and `compare` reports losses that differ.
    """

    def __init__(self, losses: Mapping[int, float], tolerance: float = 0.0) -> None:
        self.losses, self.tolerance = dict(losses), tolerance
        self.num_compared = 0

    @staticmethod
    def read(directory: Path, step: int, config: Config) -> "EarlierSteps":
        """Read the losses after `step` from metrics.jsonl. Return none if the config has changed since.

        Call this before `MetricsFile` removes these rows from the file.
        """
        losses: dict[int, float] = {}
        try:
            for _, row in read_rows(directory / "metrics.jsonl"):
                loss = row.get("loss")
                if isinstance(loss, float) and math.isfinite(loss) and step < row["step"] <= step + NUM_COMPARED_STEPS:
                    losses[row["step"]] = loss
            if not losses:
                return EarlierSteps({})
            saved_config = parse_saved_config((directory / "config.yaml").read_text(encoding="utf-8"), str(directory))
        except (OSError, UnicodeDecodeError, UserError) as error:
            log.info("the losses of repeated steps are not compared with the earlier ones: %s", error)
            return EarlierSteps({})
        if changed := _find_loss_changes(saved_config, config):
            log.info(
                "the losses of repeated steps are not compared with the earlier ones: %s changed", ", ".join(changed)
            )
            return EarlierSteps({})
        return EarlierSteps(losses, TOLERANCES["fp8" if config.fp8 else config.precision].loss)

    def on_metrics(self, state: TrainingState, rows: Sequence[MetricsRow]) -> Sequence[MetricsRow]:
        return self.compare(rows)

    def compare(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return event rows for steps whose losses differ from the losses of the earlier start."""
        events = []
        for row in rows:
            earlier_loss = self.losses.pop(row.get("step", 0), None)
            if earlier_loss is None or "loss" not in row:
                continue
            self.num_compared += 1
            max_difference = self.tolerance * max(1.0, abs(earlier_loss))
            if not abs(row["loss"] - earlier_loss) <= max_difference:
                event = (
                    f"step {row['step']} had a loss of {earlier_loss:.9g} before the run was resumed, and now has "
                    f"{row['loss']:.9g}; rounding explains at most {max_difference:.2g}: "
                    "the weights, the optimizer state or the data differ from the first time"
                )
                log.warning("%s", event)
                events.append({"step": row["step"], "event": event})
        if self.num_compared and not self.losses:
            if not events:
                log.info("%d repeated steps have the same losses as before the restart", self.num_compared)
            self.num_compared = 0
        return events


def _find_loss_changes(before: Config, now: Config) -> list[str]:
    """Return the changed keys and sections among those that determine the losses."""
    changes = [name for name in LOSS_SECTIONS if getattr(before, name) != getattr(now, name)]
    changes += [f"data.{name}" for name in LOSS_DATA_KEYS if getattr(before.data, name) != getattr(now.data, name)]
    if before.run.seed != now.run.seed:
        changes.append("run.seed")
    if _source_weights(before) != _source_weights(now):
        changes.append("data.sources")
    return changes


def _source_weights(config: Config) -> list[tuple[object, ...]]:
    return [(source.name, source.weight, source.epochs) for source in config.data.sources]
