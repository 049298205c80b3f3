"""Train a model from a resolved config: build all objects, run the trainer, rewind on request, clean up.

`train` is the body of `dist-llm train`.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_state import GuardState
from dist_llm.checkpoint.compatibility import compare_for_init, compare_for_resume, log_harmless_differences
from dist_llm.checkpoint.find_checkpoint import checkpoints_of_run, fetch_verified_checkpoint
from dist_llm.checkpoint.load_checkpoint import read_progress
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.derive import AXES, format_layout
from dist_llm.config.engine_names import NATIVE_ENGINE
from dist_llm.config.schema import Config
from dist_llm.data.data_history import (
    HISTORY_FILE,
    DataHistory,
    dump_history,
    extend_history,
    parse_history,
    segment_from_config,
)
from dist_llm.data.loader import build_loader
from dist_llm.data.plan import merge_ranges
from dist_llm.data.streams import DataSource, open_sources
from dist_llm.data.tokenizer_file import is_same_tokenizer
from dist_llm.engines.base import Engine
from dist_llm.engines.build_engine import build_engine, check_engine_config
from dist_llm.errors import CheckpointError, DataError, UserError, to_user_error
from dist_llm.launch.environment import set_network_variables
from dist_llm.launch.failures import annotate_failure
from dist_llm.launch.flight_recorder import start_recording
from dist_llm.launch.host_memory import keep_freed_memory
from dist_llm.launch.process_group import process_group, select_device
from dist_llm.launch.stop import StopSignals, clear_stop_marker, write_stop_marker
from dist_llm.launch.watchdog import Watchdog
from dist_llm.launch.world import World
from dist_llm.models.build_model import format_parameter_counts
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.observe.console import start_logging, stop_logging
from dist_llm.training.callback import LONG_ACTIVITY_TIMEOUT_FACTOR
from dist_llm.training.directories import open_directories
from dist_llm.training.extensions import NO_EXTENSIONS, Extensions
from dist_llm.training.guard import RewindRequest
from dist_llm.training.learning_rate_plan import plan_learning_rate
from dist_llm.training.run_files import build_run_files
from dist_llm.training.settings import read_vocabulary
from dist_llm.training.trainer import Trainer

log = logging.getLogger("dist_llm")


def train(config: Config, world: World, extensions: Extensions = NO_EXTENSIONS) -> int:
    """Train with the resolved config, from the latest checkpoint of run.dir if there is one.

    `extensions` are callbacks and evaluators of the user. Return 0, or the stop signal after which the run was saved
    before its end. Raises ConfigError or DataError before any process group starts if the input is wrong or another run
    uses the directory.
    """
    extensions.check()
    set_network_variables(config.run.network)
    device = select_device(world)
    if device.type == "cpu":
        keep_freed_memory()
    check_engine_config(config, device)
    sources = open_sources(config)
    corpus_dir = sources[0].corpus.directory
    vocabulary = read_vocabulary(config, corpus_dir)
    run_dir = Path(config.run.dir)
    store = CheckpointStore(config.checkpoint.dir or run_dir / "checkpoints", config.checkpoint)
    latest = store.find_latest_unverified()
    initial_weights: Path | None = None
    if latest is not None:
        compare_for_resume(latest, config)
    else:
        _check_checkpoints_not_moved(store, run_dir)
        if config.init_from:
            initial_weights = fetch_verified_checkpoint(config.init_from, world.rank, world.world_size)
            compare_for_init(initial_weights, config)
            _check_tokenizer(initial_weights, sources[0].corpus.manifest.tokenizer_sha256, corpus_dir)
    _build_history(config, sources, latest)  # raises its errors before any process group starts
    is_finished = latest is not None and read_progress(latest).step >= config.run.steps
    with open_directories(config, store.directory, world, saves_checkpoints=not is_finished), _logging(run_dir, world):
        start_recording(device)
        watchdog = Watchdog(world, config.run.hang_seconds)
        with watchdog, process_group(world, device, even_if_single=config.engine != NATIVE_ENGINE):
            watchdog.register()
            verified = store.find_latest_verified()
            if verified is not None:
                log_harmless_differences(compare_for_resume(verified, config))  # `latest` may have been damaged
            if world.is_main:
                clear_stop_marker(run_dir)
            engine = build_engine(config, device)
            layout = format_layout({axis: getattr(config.parallel, axis) for axis in AXES})
            layout += f", ep {config.parallel.ep}" if config.parallel.ep > 1 else ""
            log.info("ranks: %d (%s), engine: %s", world.world_size, layout, config.engine)
            if world.is_main:
                log.info("parameters: %s", format_parameter_counts(config.model))
            planned_config = plan_learning_rate(config, verified)
            context = RunContext(planned_config, world, sources, vocabulary, store, engine, watchdog, extensions)
            stop_signal = context.run(verified or initial_weights)
            del context, engine  # before the process group ends, see `process_group`
        return stop_signal


@contextmanager
def _logging(run_dir: Path, world: World) -> Iterator[None]:
    """Write the log file of this rank, and log the exception that ends the block.

    An OSError that the user can fix, such as a full disk, becomes a UserError.
    """
    previous_hook, threading.excepthook = threading.excepthook, _log_thread_failure
    try:
        start_logging(run_dir / "logs", world)
        yield
    except UserError as error:
        log.error("rank %d on %s: %s", world.rank, world.host, error)  # no traceback: the message says how to fix it
        raise
    except OSError as error:
        if (user_error := to_user_error(error, f"a file in run.dir {run_dir}")) is None:
            log.exception("rank %d on %s failed", world.rank, world.host)
            raise
        log.error("rank %d on %s: %s", world.rank, world.host, user_error)
        raise user_error from error
    except Exception:
        log.exception("rank %d on %s failed", world.rank, world.host)
        raise
    finally:
        stop_logging()
        threading.excepthook = previous_hook


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Log one line for an error that the user can fix; log any other exception with its traceback.

    The writer thread of TensorBoard raises its error again in the next call.
    """
    error = failure.exc_value
    user_error = to_user_error(error) if isinstance(error, OSError) else None
    if user_error is None:
        threading.__excepthook__(failure)
    else:
        log.error("thread %s: %s", failure.thread.name if failure.thread else "unknown", user_error)


@dataclass(frozen=True)
class RunContext:
    """The objects from which a trainer is built, at the start and after each rewind."""

    config: Config
    world: World
    sources: Sequence[DataSource]
    vocabulary: ObjectiveVocabulary
    store: CheckpointStore
    engine: Engine
    watchdog: Watchdog
    extensions: Extensions

    def run(self, start: CheckpointFolder | Path | None) -> int:
        """Train from `start`, and rewind if the guard requests it. Return the result of `train`."""
        world, watchdog, trainer = self.world, self.watchdog, self.build_trainer(start)
        try:
            with StopSignals() as signals:  # a signal during a rewind still counts
                while True:
                    try:
                        stop_signal = trainer.run(signals)
                        break
                    except RewindRequest as request:
                        trainer = self.rewind(trainer, request)
            if stop_signal and world.is_main:
                write_stop_marker(stop_signal, trainer.progress.step, Path(self.config.run.dir))
            return stop_signal
        except Exception as error:
            annotate_failure(error, world, watchdog.activity)
            log.error("%s", error.__notes__[-1])  # before `wait` below, which may take minutes
            raise
        finally:
            watchdog.heartbeat("the end", LONG_ACTIVITY_TIMEOUT_FACTOR)
            trainer.loader.close()
            self.store.wait()

    def build_trainer(self, start: CheckpointFolder | Path | None, guard_state: GuardState | None = None) -> Trainer:
        """Build a trainer that starts from `start`. `guard_state` has the anomalies since that checkpoint."""
        config, corpus_dir = self.config, self.sources[0].corpus.directory
        history = _build_history(
            config, self.sources, start if isinstance(start, CheckpointFolder) else None, guard_state
        )
        files = {**build_run_files(config, corpus_dir, start), HISTORY_FILE: dump_history(history)}
        plan = history[-1].build_plan(self.sources)
        pin_memory = self.engine.device.type == "cuda"
        loader = build_loader(config, plan, self.vocabulary, *self.engine.dp_rank_and_size, pin=pin_memory)
        trainer = Trainer(
            config,
            self.world,
            self.engine,
            loader,
            self.store,
            start,
            files,
            guard_state,
            self.watchdog,
            self.extensions,
        )
        if self.world.is_main:  # the trainer has accepted the weights
            for name, content in files.items():
                (Path(config.run.dir) / name).write_bytes(content)
        return trainer

    def rewind(self, trainer: Trainer, request: RewindRequest) -> Trainer:
        """Return a trainer that starts from the latest checkpoint and leaves out the samples of the bad steps.

        These are the samples of the last guard.skip_steps steps, unless the anomaly is a difference between ranks.
        """
        self.watchdog.heartbeat("the rewind", LONG_ACTIVITY_TIMEOUT_FACTOR)
        trainer.loader.close()
        self.store.finish()
        checkpoint = self.store.find_latest_verified()
        assert checkpoint is not None, "the run has no checkpoint to rewind to, although it saves before its first step"
        progress, loader, guard_state = read_progress(checkpoint), trainer.loader, trainer.progress.guard
        num_steps = request.step - progress.step
        num_skipped = self.config.guard.skip_steps if request.skips_samples else 0
        first_sample = loader.advance_steps(progress.samples, max(0, num_steps - num_skipped))
        end_sample = loader.advance_steps(first_sample, min(num_steps, num_skipped))
        new_ranges = [(first_sample, end_sample)] if end_sample > first_sample else []
        skipped_ranges = guard_state.skipped_ranges + new_ranges
        trainer = self.build_trainer(checkpoint, replace(guard_state, skipped_ranges=skipped_ranges))
        event = f"{request}; rewound to step {progress.step}" + (
            f", samples {first_sample} to {end_sample - 1} are skipped"
            if new_ranges
            else ", to repeat the same samples"
        )
        trainer.recorder.emit([{"step": progress.step, "event": event}])
        return trainer


def _check_checkpoints_not_moved(store: CheckpointStore, run_dir: Path) -> None:
    """Raise CheckpointError if checkpoint.dir has changed and the run has checkpoints only in the old directory."""
    previous_store = checkpoints_of_run(run_dir)
    if previous_store.directory != store.directory and previous_store.list_committed():
        raise CheckpointError(
            f"checkpoint.dir: the run in {run_dir} has its checkpoints in {previous_store.directory}, and none in "
            f"{store.directory}; move the step_* directories there, or set another run.dir"
        )


def _check_tokenizer(path: Path, tokenizer_sha256: str, corpus_dir: Path) -> None:
    """Raise DataError if the weights in `path` were trained with a different tokenizer from that of the corpus."""
    if not is_same_tokenizer(path, corpus_dir, tokenizer_sha256):
        raise DataError(f"{corpus_dir}: was prepared with a different tokenizer from the one in init_from {path}")


def _build_history(
    config: Config,
    sources: Sequence[DataSource],
    checkpoint: CheckpointFolder | None,
    guard_state: GuardState | None = None,
) -> DataHistory:
    """Return the data segments of the run: those of the checkpoint, and the one that this config describes.

    A segment is a range of steps with the same data settings. Raises DataError if the run cannot resume with this data.
    """
    segment = segment_from_config(config, sources)
    if checkpoint is None:
        return (segment,)
    saved_history = parse_history(checkpoint.read(HISTORY_FILE), f"{checkpoint}/{HISTORY_FILE}")
    progress = read_progress(checkpoint)
    skipped_ranges = (guard_state or progress.guard).skipped_ranges
    segment = segment.model_copy(update={"skip": merge_ranges((*segment.skip, *skipped_ranges))})
    may_change = config.data.on_change == "new_segment"
    return extend_history(
        saved_history,
        segment,
        step=progress.step,
        samples=progress.samples,
        tokens=progress.tokens,
        new_segment=may_change,
    )
