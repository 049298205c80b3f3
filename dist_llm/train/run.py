"""A run, from a resolved config to trained weights: build everything, loop, clean up."""

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

from dist_llm.checkpoint.compatible import check_resume, check_start, log_harmless
from dist_llm.checkpoint.folder import Folder
from dist_llm.checkpoint.state import Guarded
from dist_llm.checkpoint.store import CheckpointStore, find, of_run, progress_of
from dist_llm.config.derive import AXES, shape
from dist_llm.config.load import dump, refuse
from dist_llm.config.schema import Config
from dist_llm.data import history as histories
from dist_llm.data.history import HISTORY, History
from dist_llm.data.loader import build_loader
from dist_llm.data.plan import merged
from dist_llm.data.streams import Source, open_sources
from dist_llm.data.tokenizer_file import same_tokenizer
from dist_llm.engines.base import Engine
from dist_llm.engines.build import build_engine
from dist_llm.errors import CheckpointError, DataError, UserError, user_error_of
from dist_llm.launch.environment import check_accelerate, set_network
from dist_llm.launch.failures import add_last_words
from dist_llm.launch.group import device_of, keep_freed_memory, process_group
from dist_llm.launch.stop import StopSignals, forget_word, leave_word
from dist_llm.launch.watchdog import Watchdog, start_recording
from dist_llm.launch.world import World
from dist_llm.objectives.vocabulary import Vocabulary
from dist_llm.observe.console import start_logging, stop_logging
from dist_llm.text.tokenizer import TOKENIZER_FILE
from dist_llm.train.directories import open_directories
from dist_llm.train.guard import RewindError
from dist_llm.train.loop import SLOW, Trainer
from dist_llm.train.rate import plan_rate
from dist_llm.train.settings import read_vocabulary

log = logging.getLogger("dist_llm")

EXPORT_FILES = {TOKENIZER_FILE, "token_ids.json", "generation_config.json"}  # of a checkpoint, for its export


def train(config: Config, world: World) -> int:
    """Train as the resolved config says, from the newest checkpoint of run.dir if there is one.

    Returns 0, or the signal that made it save and stop before the end.

    Raises ConfigError or DataError before any process group starts where the input is wrong, or another run uses the
    directory.
    """
    set_network(config.run.network)
    device = device_of(world)
    keep_freed_memory(device)
    if config.engine == "accelerate":
        refuse(list(check_accelerate(config, device)))
    sources = open_sources(config)
    corpus = sources[0].corpus.directory
    vocabulary = read_vocabulary(config, corpus)
    directory = Path(config.run.dir)
    store = CheckpointStore(config.checkpoint.dir or directory / "checkpoints", config.checkpoint)
    seen = store.glance()
    start: Path | None = None
    if seen is not None:
        check_resume(seen, config)
    else:
        _refuse_moved(store, directory)
        if config.init_from:
            start = find(config.init_from, world.rank, world.size)
            check_start(start, config)
            _check_tokenizer(start, sources[0].corpus.manifest.tokenizer_sha256, corpus)
    _history(config, sources, seen)  # what is wrong with it is said before any process group starts
    finished = seen is not None and progress_of(seen).step >= config.run.steps
    with open_directories(config, store.directory, world, saves=not finished), _logging(directory, world):
        start_recording(device)
        alone, watchdog = config.engine != "native", Watchdog(world, config.run.hang_seconds)
        with watchdog, process_group(world, device, alone=alone):
            watchdog.introduce()
            found = store.newest()
            if found is not None:
                log_harmless(check_resume(found, config))  # not always the one that was seen first
            if world.main:
                forget_word(directory)
            engine = build_engine(config, device)
            layout = shape({axis: getattr(config.parallel, axis) for axis in AXES})
            log.info("ranks: %d (%s), engine: %s", world.size, layout, config.engine)
            parts = Parts(plan_rate(config, found), world, sources, vocabulary, store, engine, watchdog)
            told = parts.run(found or start)
            del parts, engine
        return told


@contextmanager
def _logging(directory: Path, world: World) -> Iterator[None]:
    """The log files of the ranks, with what ended the block. Raises UserError where a file cannot be written."""
    before, threading.excepthook = threading.excepthook, _log_thread_failure
    try:
        start_logging(directory / "logs", world)
        yield
    except UserError as error:
        log.error("rank %d on %s: %s", world.rank, world.host, error)  # no traceback: the user can mend it
        raise
    except OSError as error:
        if (mendable := user_error_of(error, f"a file in run.dir {directory}")) is None:
            log.exception("rank %d on %s failed", world.rank, world.host)
            raise
        log.error("rank %d on %s: %s", world.rank, world.host, mendable)
        raise mendable from error
    except Exception:
        log.exception("rank %d on %s failed", world.rank, world.host)
        raise
    finally:
        stop_logging()
        threading.excepthook = before


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """One line where the user can mend it: TensorBoard's thread hands its error on to the next call, too."""
    error = failure.exc_value
    mendable = user_error_of(error) if isinstance(error, OSError) else None
    if mendable is None:
        threading.__excepthook__(failure)
    else:
        log.error("thread %s: %s", failure.thread.name if failure.thread else "unknown", mendable)


@dataclass(frozen=True)
class Parts:
    """What a trainer is made of, again and again where a run goes back."""

    config: Config
    world: World
    sources: Sequence[Source]
    vocabulary: Vocabulary
    store: CheckpointStore
    engine: Engine
    watchdog: Watchdog

    def run(self, start: Folder | Path | None) -> int:
        """Train from there, going back as often as the guard says. Returns as `train` does."""
        world, watchdog, trainer = self.world, self.watchdog, self.trainer(start)
        try:
            with StopSignals() as signals:  # what is noted while the run goes back still holds
                while True:
                    try:
                        told = trainer.run(signals)
                        break
                    except RewindError as bad:
                        trainer = self.rewound(trainer, bad)
            if told and world.main:
                leave_word(told, trainer.progress.step, Path(self.config.run.dir))
            return told
        except Exception as error:
            add_last_words(error, world, watchdog.what)
            log.error("%s", error.__notes__[-1])  # now: what is being written may take longer than others wait
            raise
        finally:
            watchdog.beat("the end", SLOW)
            trainer.loader.close()
            self.store.wait()

    def trainer(self, start: Folder | Path | None, guarded: Guarded | None = None) -> Trainer:
        """One that begins there. `guarded`: what is known of bad steps, more than the checkpoint knows."""
        config, corpus = self.config, self.sources[0].corpus.directory
        history = _history(config, self.sources, start if isinstance(start, Folder) else None, guarded)
        files = {**run_files(config, corpus, start), HISTORY: histories.dump(history)}
        pin = self.engine.device.type == "cuda"
        plan = history[-1].plan(self.sources)
        loader = build_loader(config, plan, self.vocabulary, *self.engine.data_rank, pin=pin)
        trainer = Trainer(config, self.world, self.engine, loader, self.store, start, files, guarded, self.watchdog)
        if self.world.main:  # not before the weights are accepted
            for name, content in files.items():
                (Path(config.run.dir) / name).write_bytes(content)
        return trainer

    def rewound(self, trainer: Trainer, bad: RewindError) -> Trainer:
        """One that begins at the newest checkpoint, and leaves out the samples that the policy says."""
        self.watchdog.beat("going back", SLOW)
        trainer.loader.close()
        self.store.finish()
        found = self.store.newest()
        assert found is not None, "a run that may go back saves before its first step"
        at, loader, guarded = progress_of(found), trainer.loader, trainer.progress.guard
        back = bad.step - at.step
        skipped = self.config.guard.skip_steps if bad.by_samples else 0
        first = loader.after_steps(at.samples, max(0, back - skipped))
        end = loader.after_steps(first, min(back, skipped))
        left_out = [(first, end)] if end > first else []
        trainer = self.trainer(found, replace(guarded, left_out=guarded.left_out + left_out))
        event = f"{bad}; went back from there to step {at.step}" + (
            f", samples {first} to {end - 1} are left out" if left_out else ", to read the same samples again"
        )
        trainer.recorder.emit([{"step": at.step, "event": event}])
        return trainer


def _refuse_moved(store: CheckpointStore, run: Path) -> None:
    """Raises CheckpointError where the run has checkpoints, but elsewhere: it would begin anew over what it left."""
    before = of_run(run)
    if before.directory != store.directory and before.committed():
        raise CheckpointError(
            f"checkpoint.dir: the run in {run} has its checkpoints in {before.directory}, and none in "
            f"{store.directory}; move the step_* directories there, or set another run.dir"
        )


def _check_tokenizer(path: Path, tokenizer_sha256: str, corpus: Path) -> None:
    """Raises DataError where a run cannot begin with these weights."""
    if not same_tokenizer(path, corpus, tokenizer_sha256):
        raise DataError(f"{corpus}: was prepared with another tokenizer than the one in init_from {path}")


def _history(
    config: Config, sources: Sequence[Source], checkpoint: Folder | None, guarded: Guarded | None = None
) -> History:
    """What the run has read, and will. Raises DataError where it cannot go on with the data of the config."""
    wanted = histories.asked(config, sources)
    if checkpoint is None:
        return (wanted,)
    before = histories.parse(checkpoint.read(HISTORY), f"{checkpoint}/{HISTORY}")
    progress = progress_of(checkpoint)
    left_out = (guarded or progress.guard).left_out
    wanted = wanted.model_copy(update={"skip": merged((*wanted.skip, *left_out))})
    at = progress.step, progress.samples, progress.tokens
    return histories.resume(before, wanted, *at, config.data.on_change == "new_segment")


def run_files(config: Config, corpus: Path, start: Folder | Path | None = None) -> dict[str, bytes]:
    """The small files kept in the run directory and in each checkpoint.

    Those of EXPORT_FILES come from the checkpoint that the run starts from, if there is one: its tokenizer gives the
    same ids as the corpus's, and may come with a chat template or other settings.
    """
    files = {
        "config.yaml": dump(config).encode(),
        "environment.json": json.dumps(environment(), indent=2).encode() + b"\n",
        TOKENIZER_FILE: (corpus / TOKENIZER_FILE).read_bytes(),
    }
    if start is not None:
        folder = Folder(start)
        files |= {name: folder.read(name) for name in sorted({*folder.names()} & EXPORT_FILES)}
    return files


def environment() -> dict[str, str]:
    """What produced this run: commit, interpreter, packages."""
    packages = ("dist-llm", "torch", "numpy", "pydantic", "tiktoken", "tokenizers")
    facts = {"git_commit": _git_commit(), "python": platform.python_version(), "machine": platform.platform()}
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _git_commit() -> str:
    """The commit of this source tree, with `+` where it was changed; `unknown` outside git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+"], cwd=here, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return commit.stdout.strip() or "unknown"
