"""The training loop: optimizer steps, with metrics, evaluation and checkpoints at their intervals."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import Signals

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_state import GuardState
from dist_llm.checkpoint.probe import PROBE_FILE
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import Config, LossConfig
from dist_llm.config.sequence_lengths import count_sample_tokens
from dist_llm.data.loader import Loader
from dist_llm.engines.base import Engine
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.launch.stop import StopSignals
from dist_llm.launch.watchdog import Watchdog
from dist_llm.launch.world import World
from dist_llm.observe.metrics import MetricsRow, StepMetrics
from dist_llm.optim.schedule import learning_rate
from dist_llm.training.build_callbacks import build_callbacks
from dist_llm.training.build_recorder import build_recorder
from dist_llm.training.callback import CallbackList, TrainingState
from dist_llm.training.evaluator import build_evaluators
from dist_llm.training.extensions import NO_EXTENSIONS, Extensions
from dist_llm.training.guard import Guard
from dist_llm.training.metric_names import check_row
from dist_llm.training.resume import EarlierSteps, start_run
from dist_llm.training.step import name_loss_terms, train_step

log = logging.getLogger("dist_llm")


class Trainer:
    """Trains the model of `engine` on this rank.

    `start` is a checkpoint to resume (CheckpointFolder), a checkpoint with initial weights (Path), or None. The small
    `files` are stored in each checkpoint. After a rewind, `guard_state` has the anomalies since the checkpoint. The
    caller opens and closes `watchdog`, because a rank can also hang before the first step and after the last.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        engine: Engine,
        loader: Loader,
        store: CheckpointStore,
        start: CheckpointFolder | Path | None,
        files: Mapping[str, bytes],
        guard_state: GuardState | None = None,
        watchdog: Watchdog | None = None,
        extensions: Extensions = NO_EXTENSIONS,
    ) -> None:
        self.config, self.world, self.engine, self.loader = config, world, engine, loader
        self.store, self.files = store, files
        self.run_dir = Path(config.run.dir)
        self.progress = start_run(start, engine, config)
        if guard_state is not None:
            self.progress.guard = replace(guard_state, losses=self.progress.guard.losses)
        self.state = TrainingState(config, world, engine, loader, self.progress, watchdog or Watchdog(world, 0.0))
        self.guard = Guard(config.guard, self.progress.guard, engine, self.run_dir)
        self.tokens_per_sample = count_sample_tokens(config)
        self.evaluators = [*build_evaluators(config, loader), *extensions.evaluators]
        earlier_steps = EarlierSteps({})
        if isinstance(start, CheckpointFolder) and guard_state is None and world.is_main:
            earlier_steps = EarlierSteps.read(self.run_dir, self.progress.step, config)
        self.callbacks = CallbackList([*build_callbacks(self.state, self.guard, earlier_steps), *extensions.callbacks])
        self.open_sinks = ExitStack()
        self.recorder = build_recorder(self.state, self.open_sinks)

    def run(self, signals: StopSignals) -> int:
        """Train to run.steps. Evaluate and save at the intervals of the config, and at the end.

        Return 0, or the stop signal after which the run was saved. Raises RewindRequest if the run has to rewind.
        """
        config, stop_signal = self.config, signals.agreed_signal()
        first_step = self.progress.step
        self.recorder.restart_clock(self.progress.tokens)
        with self.open_sinks, self.callbacks.open(self.state):
            if self.progress.step == 0 and self.guard.can_rewind:
                self.save()  # a checkpoint to rewind to
            while self.progress.step < config.run.steps and not stop_signal:
                self.state.watchdog.heartbeat(f"step {self.progress.step + 1}")
                signals.start_sync()
                self.take_step()
                self.store.poll()
                step = self.progress.step
                if stop_signal := signals.agreed_signal():
                    log.info(
                        "%s: saving a checkpoint, then stopping; a second signal stops at once",
                        Signals(stop_signal).name,
                    )
                is_last = step == config.run.steps
                if step % config.log.every == 0 or is_last:
                    self.flush_metrics()
                should_evaluate = is_last or (config.eval.every and step % config.eval.every == 0 and not stop_signal)
                should_save = (
                    is_last or stop_signal or (config.checkpoint.every and step % config.checkpoint.every == 0)
                )
                if should_evaluate:
                    self.evaluate()
                if should_save:
                    self.state.heartbeat(f"the checkpoint of step {step}")
                    self.save()
            self.state.heartbeat("writing the last checkpoint")
            self.store.finish()
        if stop_signal:
            signal_name = Signals(stop_signal).name
            log.info("stopped by %s after step %d, saved; start again to continue", signal_name, self.progress.step)
            return stop_signal
        if first_step >= config.run.steps:
            log.info(
                "nothing to do: the run has taken %d steps, and run.steps is %d; raise it to continue",
                *(first_step, config.run.steps),
            )
        log.info("done: %d steps, checkpoint in %s", self.progress.step, self.store.directory)
        log.info("watch the curves: tensorboard --logdir %s", self.run_dir / "tensorboard")
        return 0

    def take_step(self) -> None:
        """Take one optimizer step on the next global batch."""
        config, progress = self.config, self.progress
        load_start = time.perf_counter()
        batches = self.loader.load_batches(progress.samples)
        data_wait_seconds = time.perf_counter() - load_start
        lr = learning_rate(config.optim, config.schedule, progress.step + 1)
        self.state.batches = batches
        self.callbacks.before_step(self.state)
        should_apply = partial(self.guard.should_apply, progress.step + 1) if self.guard.can_skip else None
        report = train_step(
            self.engine,
            batches,
            lr,
            step=progress.step,
            num_sources=len(self.loader.plan.sources),
            should_apply=should_apply,
            with_loss_terms=config.loss != LossConfig(),
        )
        progress.step += 1
        progress.heldout_loss = None
        progress.samples = self.loader.advance(progress.samples)
        progress.tokens += config.data.global_batch * self.tokens_per_sample
        step_metrics = StepMetrics(
            step=progress.step,
            loss=report.loss,
            grad_norm=report.grad_norm,
            loss_denominator=report.loss_denominator,
            lr=lr,
            tokens=progress.tokens,
            data_wait_seconds=data_wait_seconds,
            by_source=report.by_source,
            loss_terms=name_loss_terms(report, config.loss),
            router_stats=report.router_stats,
        )
        self.recorder.add(step_metrics)
        self.callbacks.after_step(self.state)
        self.state.batches = ()

    def flush_metrics(self) -> None:
        """Write the metrics so far. Raises DivergedError or RewindRequest on all ranks if a step has an anomaly."""
        rows = self.recorder.flush()
        events = self.guard.check_metrics(rows)
        if new_rows := [*events, *self.callbacks.on_metrics(self.state, rows)]:
            self.recorder.emit(new_rows)

    def evaluate(self) -> None:
        """Log the metrics of all evaluators in one row."""
        if not self.evaluators:
            return
        self.flush_metrics()
        row: MetricsRow = {"step": self.progress.step}
        for evaluator in self.evaluators:
            self.state.heartbeat("an evaluation")
            metrics = evaluator.evaluate(self.state)
            check_row(evaluator, evaluator.metric_names, metrics)
            row |= metrics
        self.progress.heldout_loss = row.get("heldout_loss")
        self.recorder.emit([row])
        if new_rows := self.callbacks.on_metrics(self.state, [row]):
            self.recorder.emit(new_rows)
        self.recorder.restart_clock(self.progress.tokens)

    def save(self) -> None:
        """Write the metrics, let the callbacks check the run, and start to write a checkpoint of this step."""
        self.flush_metrics()
        self.callbacks.before_save(self.state)
        self.progress.loss_scale = self.engine.loss_scale
        self.progress.source_tokens = self.recorder.source_tokens
        files = {**self.files, PROBE_FILE: measure_probe(self.engine, self.config).dump()}
        self.store.save(self.engine.state, self.progress, files)
        self.recorder.restart_clock(self.progress.tokens)
