"""Callbacks: objects whose methods the trainer calls at fixed points of the training loop.

Callbacks observe the run. They measure, check and log, and must not change weights, gradients or optimizer state.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.config.schema import Config
from dist_llm.data.loader import Loader
from dist_llm.engines.base import Engine
from dist_llm.launch.watchdog import Watchdog
from dist_llm.launch.world import World
from dist_llm.objectives.batch import Batch
from dist_llm.observe.metrics import MetricsRow
from dist_llm.training.metric_names import check_row

LONG_ACTIVITY_TIMEOUT_FACTOR = 30  # multiplies the watchdog timeout of a step, for an evaluation or a checkpoint


@dataclass
class TrainingState:
    """The state of a run on this rank. Callbacks and evaluators read it; only the trainer changes it.

    `progress.step` is the number of completed steps. `progress.samples` is the number of the next sample. `batches` are
    the microbatches of the current step on this data-parallel rank, on the host; empty between two steps.
    """

    config: Config
    world: World
    engine: Engine
    loader: Loader
    progress: Progress
    watchdog: Watchdog
    batches: Sequence[Batch] = ()

    def heartbeat(self, activity: str) -> None:
        """Tell the watchdog that this rank makes progress in `activity`, which may take longer than a step.

        Call this at intervals in a callback or evaluator that takes minutes.
        """
        self.watchdog.heartbeat(activity, LONG_ACTIVITY_TIMEOUT_FACTOR)


class Callback:
    """Observes a run. The methods do nothing by default; override the needed ones.

    Every rank calls each method, in the same order. So a method may use collectives, if it does so on all ranks. It
    must not change weights, gradients or optimizer state. It may run the model (`engine.score`) and use random numbers,
    because the engine sets the mode and the seeds of each step itself. An exception ends the run.
    """

    # The metrics in the rows that `on_metrics` returns. A name that ends with * stands for all names that begin so.
    metric_names: Sequence[str] = ()

    def on_start(self, state: TrainingState) -> None:
        """Called before the first step of this start, and again after each rewind, with a new state."""

    def before_step(self, state: TrainingState) -> None:
        """Called before each optimizer step. `state.batches` are its microbatches, `state.progress.samples` its first
        sample, and `state.progress.step` the steps before it.
        """

    def after_step(self, state: TrainingState) -> None:
        """Called after each optimizer step. `state.progress` includes the step."""

    def on_metrics(self, state: TrainingState, rows: Sequence[MetricsRow]) -> Sequence[MetricsRow]:
        """Called with each group of logged rows: the rows of all steps since the last call, or one evaluation row.

        This is after every `log.every` steps, before and after an evaluation, and before a checkpoint. Only the rows of
        steps have `loss`. Return further rows to log. A row without `step` gets the current step. A row may have an
        `event`: a text for the console and the log.
        """
        return ()

    def before_save(self, state: TrainingState) -> None:
        """Called before a checkpoint is saved. An exception prevents the save."""

    def close(self, state: TrainingState) -> None:
        """Called at the end of the run, also after an exception or a stop signal, and before a rewind.

        It is called exactly once for each `on_start`, even if that raised an exception. After an exception on some
        ranks only, other ranks may not call it, so it must not use collectives.
        """


class CallbackList:
    """Calls the methods of all callbacks in order, and `close` in reverse order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks

    @contextmanager
    def open(self, state: TrainingState) -> Iterator[None]:
        """Call `on_start` on entry, and `close` of all started callbacks on exit, also if some of them fail."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.close, state)
                callback.on_start(state)
            yield

    def before_step(self, state: TrainingState) -> None:
        for callback in self.callbacks:
            callback.before_step(state)

    def after_step(self, state: TrainingState) -> None:
        for callback in self.callbacks:
            callback.after_step(state)

    def on_metrics(self, state: TrainingState, rows: Sequence[MetricsRow]) -> list[MetricsRow]:
        """Return the rows of all callbacks. Raises UserError if a row has a metric that its callback does not name."""
        new_rows: list[MetricsRow] = []
        for callback in self.callbacks if rows else ():
            for row in callback.on_metrics(state, rows):
                check_row(callback, callback.metric_names, row, other_keys=("step", "event"))
                new_rows.append({"step": state.progress.step, **row})
        return new_rows

    def before_save(self, state: TrainingState) -> None:
        for callback in self.callbacks:
            callback.before_save(state)
