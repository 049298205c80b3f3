"""A run, from a resolved config to trained weights: build everything, train, clean up."""

import json
import logging
import platform
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dist_llm.checkpoint.checkpoint_state import GuardState
from dist_llm.checkpoint.compatibility import check_init_from, check_resume, log_harmless_differences
from dist_llm.checkpoint.folder import Folder
from dist_llm.checkpoint.store import CheckpointStore, checkpoints_of_run, open_checkpoint, read_progress
from dist_llm.config.derive import AXES, shape
from dist_llm.config.engine_names import NATIVE
from dist_llm.config.load import dump
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
from dist_llm.launch.environment import set_network
from dist_llm.launch.failures import annotate_failure
from dist_llm.launch.flight_recorder import start_recording
from dist_llm.launch.group import keep_freed_memory, process_group, select_device
from dist_llm.launch.stop import StopSignals, clear_stop_marker, write_stop_marker
from dist_llm.launch.watchdog import Watchdog
from dist_llm.launch.world import World
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.observe.console import start_logging, stop_logging
from dist_llm.text.tokenizer import TOKENIZER_FILE
from dist_llm.training.directories import open_directories
from dist_llm.training.guard import RewindError
from dist_llm.training.rate import plan_rate
from dist_llm.training.settings import read_vocabulary
from dist_llm.training.trainer import SLOW_FACTOR, Trainer

log = logging.getLogger("dist_llm")

EXPORT_FILES = {TOKENIZER_FILE, "token_ids.json", "generation_config.json"}  # copied from a checkpoint, for its export


def train(config: Config, world: World) -> int:
    """Train with the resolved config, from the newest checkpoint of run.dir if there is one.

    Returns 0, or the signal after which the run was saved and stopped before its end.

    Raises ConfigError or DataError before any process group starts if the input is wrong, or if another run uses the
    directory.
    """
    set_network(config.run.network)
    device = select_device(world)
    keep_freed_memory(device)
    check_engine_config(config, device)
    sources = open_sources(config)
    corpus = sources[0].corpus.directory
    vocabulary = read_vocabulary(config, corpus)
    directory = Path(config.run.dir)
    store = CheckpointStore(config.checkpoint.dir or directory / "checkpoints", config.checkpoint)
    newest = store.peek_latest()
    start: Path | None = None
    if newest is not None:
        check_resume(newest, config)
    else:
        _refuse_moved(store, directory)
        if config.init_from:
            start = open_checkpoint(config.init_from, world.rank, world.size)
            check_init_from(start, config)
            _check_tokenizer(start, sources[0].corpus.manifest.tokenizer_sha256, corpus)
    _build_history(config, sources, newest)  # raises its errors before any process group starts
    finished = newest is not None and read_progress(newest).step >= config.run.steps
    with open_directories(config, store.directory, world, saves=not finished), _logging(directory, world):
        start_recording(device)
        even_if_single, watchdog = config.engine != NATIVE, Watchdog(world, config.run.hang_seconds)
        with watchdog, process_group(world, device, even_if_single=even_if_single):
            watchdog.register()
            verified = store.latest_verified()
            if verified is not None:
                log_harmless_differences(check_resume(verified, config))  # `newest` may be damaged
            if world.is_main:
                clear_stop_marker(directory)
            engine = build_engine(config, device)
            layout = shape({axis: getattr(config.parallel, axis) for axis in AXES})
            log.info("ranks: %d (%s), engine: %s", world.size, layout, config.engine)
            context = RunContext(plan_rate(config, verified), world, sources, vocabulary, store, engine, watchdog)
            stop_signal = context.run(verified or start)
            del context, engine
        return stop_signal


@contextmanager
def _logging(directory: Path, world: World) -> Iterator[None]:
    """Write the log files of the ranks, and log the exception that ends the block. A full disk raises UserError."""
    before, threading.excepthook = threading.excepthook, _log_thread_failure
    try:
        start_logging(directory / "logs", world)
        yield
    except UserError as error:
        log.error("rank %d on %s: %s", world.rank, world.host, error)  # no traceback: the message says how to fix it
        raise
    except OSError as error:
        if (user_error := to_user_error(error, f"a file in run.dir {directory}")) is None:
            log.exception("rank %d on %s failed", world.rank, world.host)
            raise
        log.error("rank %d on %s: %s", world.rank, world.host, user_error)
        raise user_error from error
    except Exception:
        log.exception("rank %d on %s failed", world.rank, world.host)
        raise
    finally:
        stop_logging()
        threading.excepthook = before


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Log one line for a user error. TensorBoard's writer thread also raises it in the next call."""
    error = failure.exc_value
    user_error = to_user_error(error) if isinstance(error, OSError) else None
    if user_error is None:
        threading.__excepthook__(failure)
    else:
        log.error("thread %s: %s", failure.thread.name if failure.thread else "unknown", user_error)


@dataclass(frozen=True)
class RunContext:
    """The objects that a trainer is built from, at the start and after each rewind."""

    config: Config
    world: World
    sources: Sequence[DataSource]
    vocabulary: ObjectiveVocabulary
    store: CheckpointStore
    engine: Engine
    watchdog: Watchdog

    def run(self, start: Folder | Path | None) -> int:
        """Train from `start`, and rewind if the guard requests it. Returns the result of `train`."""
        world, watchdog, trainer = self.world, self.watchdog, self.build_trainer(start)
        try:
            with StopSignals() as signals:  # a signal during a rewind still counts
                while True:
                    try:
                        stop_signal = trainer.run(signals)
                        break
                    except RewindError as error:
                        trainer = self.rewind(trainer, error)
            if stop_signal and world.is_main:
                write_stop_marker(stop_signal, trainer.progress.step, Path(self.config.run.dir))
            return stop_signal
        except Exception as error:
            annotate_failure(error, world, watchdog.activity)
            log.error("%s", error.__notes__[-1])  # at once: other ranks do not wait for the checkpoint being written
            raise
        finally:
            watchdog.heartbeat("the end", SLOW_FACTOR)
            trainer.loader.close()
            self.store.wait()

    def build_trainer(self, start: Folder | Path | None, guard_state: GuardState | None = None) -> Trainer:
        """Build a trainer that starts from `start`. `guard_state`: anomalies that the checkpoint does not contain."""
        config, corpus = self.config, self.sources[0].corpus.directory
        history = _build_history(config, self.sources, start if isinstance(start, Folder) else None, guard_state)
        files = {**run_files(config, corpus, start), HISTORY_FILE: dump_history(history)}
        pin = self.engine.device.type == "cuda"
        plan = history[-1].build_plan(self.sources)
        loader = build_loader(config, plan, self.vocabulary, *self.engine.dp_rank_and_size, pin=pin)
        trainer = Trainer(config, self.world, self.engine, loader, self.store, start, files, guard_state, self.watchdog)
        if self.world.is_main:  # only after the weights were accepted
            for name, content in files.items():
                (Path(config.run.dir) / name).write_bytes(content)
        return trainer

    def rewind(self, trainer: Trainer, error: RewindError) -> Trainer:
        """Return a trainer that starts from the newest checkpoint and skips the samples of guard.skip_steps."""
        self.watchdog.heartbeat("the rewind", SLOW_FACTOR)
        trainer.loader.close()
        self.store.finish()
        checkpoint = self.store.latest_verified()
        assert checkpoint is not None, "a run that can rewind saves before its first step"
        progress, loader, guard_state = read_progress(checkpoint), trainer.loader, trainer.progress.guard
        num_steps = error.step - progress.step
        num_skipped = self.config.guard.skip_steps if error.skips_samples else 0
        first = loader.advance_steps(progress.samples, max(0, num_steps - num_skipped))
        end = loader.advance_steps(first, min(num_steps, num_skipped))
        left_out = [(first, end)] if end > first else []
        trainer = self.build_trainer(checkpoint, replace(guard_state, left_out=guard_state.left_out + left_out))
        event = f"{error}; rewound to step {progress.step}" + (
            f", samples {first} to {end - 1} are skipped" if left_out else ", to repeat the same samples"
        )
        trainer.recorder.emit([{"step": progress.step, "event": event}])
        return trainer


def _refuse_moved(store: CheckpointStore, run: Path) -> None:
    """Raise CheckpointError if checkpoint.dir has changed and the run has checkpoints only in the old directory."""
    previous = checkpoints_of_run(run)
    if previous.directory != store.directory and previous.list_committed():
        raise CheckpointError(
            f"checkpoint.dir: the run in {run} has its checkpoints in {previous.directory}, and none in "
            f"{store.directory}; move the step_* directories there, or set another run.dir"
        )


def _check_tokenizer(path: Path, tokenizer_sha256: str, corpus: Path) -> None:
    """Raise DataError if the weights were trained with another tokenizer than the corpus."""
    if not is_same_tokenizer(path, corpus, tokenizer_sha256):
        raise DataError(f"{corpus}: was prepared with another tokenizer than the one in init_from {path}")


def _build_history(
    config: Config, sources: Sequence[DataSource], checkpoint: Folder | None, guard_state: GuardState | None = None
) -> DataHistory:
    """Return the data segments of the run, past and future. Raises DataError if it cannot resume with this data."""
    segment = segment_from_config(config, sources)
    if checkpoint is None:
        return (segment,)
    previous = parse_history(checkpoint.read(HISTORY_FILE), f"{checkpoint}/{HISTORY_FILE}")
    progress = read_progress(checkpoint)
    left_out = (guard_state or progress.guard).left_out
    segment = segment.model_copy(update={"skip": merge_ranges((*segment.skip, *left_out))})
    position = progress.step, progress.samples, progress.tokens
    return extend_history(previous, segment, *position, config.data.on_change == "new_segment")


def run_files(config: Config, corpus: Path, start: Folder | Path | None = None) -> dict[str, bytes]:
    """Return the small files for the run directory and each checkpoint, {name: content}.

    EXPORT_FILES come from the checkpoint that the run starts from, if there is one: its tokenizer has the same ids as
    the corpus's, and may come with a chat template or other settings.
    """
    files = {
        "config.yaml": dump(config).encode(),
        "environment.json": json.dumps(environment(), indent=2).encode() + b"\n",
        TOKENIZER_FILE: (corpus / TOKENIZER_FILE).read_bytes(),
    }
    if start is not None:
        folder = Folder(start)
        files |= {name: folder.read(name) for name in sorted({*folder.list_names()} & EXPORT_FILES)}
    return files


def environment() -> dict[str, str]:
    """Return the software of this run: commit, Python version, package versions."""
    packages = ("dist-llm", "torch", "numpy", "pydantic", "tiktoken", "tokenizers")
    versions = {"git_commit": _git_commit(), "python": platform.python_version(), "machine": platform.platform()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if torch.cuda.is_available():
        versions["gpu"] = torch.cuda.get_device_name()
    return versions


def _git_commit() -> str:
    """Return the commit of this source tree, with `+` if it has changes; `unknown` outside git."""
    source_dir = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+"], cwd=source_dir, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return commit.stdout.strip() or "unknown"
