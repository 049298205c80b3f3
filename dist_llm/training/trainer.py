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
from dist_llm.checkpoint.checkpoint_state import GuardState, Progress
from dist_llm.checkpoint.flat_shard import local_chunks
from dist_llm.checkpoint.probe import PROBE_FILE
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.schema import Config, LossConfig
from dist_llm.config.sequence_lengths import compute_inputs_len, count_sample_tokens
from dist_llm.data.corpus import Corpus
from dist_llm.data.loader import Loader
from dist_llm.data.repetition import find_repetitions
from dist_llm.engines.base import Engine
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.errors import DataError
from dist_llm.generation import Sampling, encode_prompt, generate_text
from dist_llm.launch.stop import StopSignals
from dist_llm.launch.watchdog import Watchdog
from dist_llm.launch.world import World
from dist_llm.objectives.build_objective import Objective
from dist_llm.observe.console import ConsoleSink
from dist_llm.observe.flops import CONVENTION, count_flops_per_sample, find_peak_flops
from dist_llm.observe.metrics import MetricsFile, MetricsRecorder, MetricsRow, StepMetrics
from dist_llm.observe.tensorboard import TensorBoard
from dist_llm.optim.schedule import learning_rate
from dist_llm.parallel.replica_check import find_mismatches
from dist_llm.text.tokenizer import Tokenizer
from dist_llm.training.evaluate import EvaluationSetup, evaluate
from dist_llm.training.gc_control import GCControl
from dist_llm.training.guard import Guard
from dist_llm.training.replay import replay_step
from dist_llm.training.resume import EarlierSteps, load_run, start_from_weights
from dist_llm.training.sample_audit import SampleAudit
from dist_llm.training.step import name_loss_terms, train_step
from dist_llm.training.stragglers import StragglerMonitor

log = logging.getLogger("dist_llm")

LONG_ACTIVITY_TIMEOUT_FACTOR = 30  # multiplies the watchdog timeout of a step, for an evaluation or a checkpoint


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
    ) -> None:
        self.config, self.world, self.engine, self.loader = config, world, engine, loader
        self.watchdog = watchdog or Watchdog(world, 0.0)
        self.store, self.files = store, files
        self.run_dir = Path(config.run.dir)
        self.progress = self._resume(start)
        if guard_state is not None:
            self.progress.guard = replace(guard_state, losses=self.progress.guard.losses)
        self.stragglers = StragglerMonitor(world, engine, config.log.stragglers_seconds)
        self.guard = Guard(config.guard, self.progress.guard, engine, self.run_dir)
        self.tokens_per_sample = count_sample_tokens(config)
        num_samples = (config.run.steps - self.progress.step) * config.data.global_batch
        end_sample = loader.plan.advance(self.progress.samples, num_samples)
        self.repetitions = find_repetitions(loader.plan, self.progress.samples, end_sample)
        self.evaluation_setup = self._build_evaluation_setup(loader.objective)
        self.sample_audit = SampleAudit(engine, loader, config.data.audit_every)
        parallel = config.parallel
        self.can_generate = parallel.pp == parallel.tp == parallel.cp == 1 and config.model.architecture != "encoder"
        if config.eval.sample_prompt and not self.can_generate:
            log.info("eval.sample_prompt has no effect: an encoder, and a model under pp, tp or cp, cannot sample")
        self.open_sinks = ExitStack()
        if isinstance(start, CheckpointFolder) and guard_state is None and world.is_main:
            self.earlier_steps = EarlierSteps.read(self.run_dir, self.progress.step, config)
        else:
            self.earlier_steps = EarlierSteps({})
        self.recorder = self._build_recorder()

    def run(self, signals: StopSignals) -> int:
        """Train to run.steps. Evaluate and save at the intervals of the config, and at the end.

        Return 0, or the stop signal after which the run was saved. Raises RewindRequest if the run has to rewind.
        """
        config, stop_signal = self.config, signals.agreed_signal()
        first_step = self.progress.step
        self.recorder.restart_clock(self.progress.tokens)
        with self.open_sinks, self.stragglers, GCControl() as gc_control:
            if self.progress.step == 0 and self.guard.can_rewind:
                self.save()  # a checkpoint to rewind to
            while self.progress.step < config.run.steps and not stop_signal:
                self.watchdog.heartbeat(f"step {self.progress.step + 1}")
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
                    gc_control.collect()
                should_evaluate = is_last or (config.eval.every and step % config.eval.every == 0 and not stop_signal)
                should_save = (
                    is_last or stop_signal or (config.checkpoint.every and step % config.checkpoint.every == 0)
                )
                if should_evaluate:
                    self.evaluate()
                if should_save:
                    self.watchdog.heartbeat(f"the checkpoint of step {step}", LONG_ACTIVITY_TIMEOUT_FACTOR)
                    self.save()
                if should_evaluate or should_save:
                    gc_control.collect(full=True)
            self.watchdog.heartbeat("writing the last checkpoint", LONG_ACTIVITY_TIMEOUT_FACTOR)
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
        self.sample_audit.add(progress.samples, batches)
        if (interval := config.guard.replay_every) and (progress.step + 1) % interval == 0:
            differences = replay_step(self.engine, self.loader, progress.samples, progress.step, config.precision)
            self.guard.handle_divergence(progress.step + 1, differences)
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
        while self.repetitions and self.repetitions[0].sample <= progress.samples:
            log.info("%s", self.repetitions.pop(0))
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
        if (interval := config.guard.digest_every) and progress.step % interval == 0:
            self.check_replicas()

    def check_replicas(self) -> None:
        """Compare replicas of the weights. Raises DivergedError or RewindRequest on all ranks if they differ."""
        if replica_groups := self.engine.replica_groups:
            self.guard.handle_divergence(self.progress.step, find_mismatches(replica_groups, self.world.host))

    def flush_metrics(self) -> None:
        """Write the metrics so far. Raises DivergedError or RewindRequest on all ranks if a step has an anomaly."""
        rows = self.recorder.flush()
        events = self.guard.check_metrics(rows) + self.stragglers.gather_report(rows) + self.earlier_steps.compare(rows)
        if events:
            self.recorder.emit(events)

    def evaluate(self) -> None:
        """Log the held-out loss and a generated sample."""
        if self.evaluation_setup is None:
            return
        self.flush_metrics()

        def heartbeat() -> None:
            self.watchdog.heartbeat("an evaluation", LONG_ACTIVITY_TIMEOUT_FACTOR)

        result = evaluate(self.engine, self.evaluation_setup, heartbeat)
        self.progress.heldout_loss = result.loss
        row: MetricsRow = {
            "step": self.progress.step,
            "heldout_loss": result.loss,
            "heldout_perplexity": result.perplexity,
        }
        if result.bits_per_byte is not None:
            row["heldout_bits_per_byte"] = result.bits_per_byte
        row |= {f"heldout_loss_{name}": loss for name, loss in result.breakdown.items()}
        if self.config.eval.sample_prompt and self.can_generate:
            row["sample"] = self.generate_sample()
        self.recorder.emit([row])
        self.recorder.restart_clock(self.progress.tokens)

    def generate_sample(self) -> str:
        """Generate text from the current weights. Every rank must call this, because the model may be sharded."""
        config = self.config
        tokenizer = Tokenizer.load(self.loader.plan.sources[0].corpus.directory)
        sampling = Sampling(max_tokens=config.eval.sample_tokens, temperature=0.8, top_p=0.95, seed=config.run.seed)
        (model,) = self.engine.model_parts
        model.eval()
        request = encode_prompt(config, tokenizer, config.eval.sample_prompt)
        chunks = generate_text(model, tokenizer, request, sampling, config.model.max_seq_len, stop=False)
        return config.eval.sample_prompt + "".join(chunks)

    def save(self) -> None:
        """Write the metrics, check the weights, and start to write a checkpoint of this step."""
        self.flush_metrics()
        self.sample_audit.check()
        if self.config.guard.digest_every:
            self.check_replicas()
        chunks = (chunk for weight in self.engine.state.weights().values() for _, chunk in local_chunks(weight))
        finite = all(bool(chunk.isfinite().all()) for chunk in chunks)
        self.guard.check_weights_finite(self.progress.step, finite)
        self.progress.loss_scale = self.engine.loss_scale
        self.progress.source_tokens = self.recorder.source_tokens
        files = {**self.files, PROBE_FILE: measure_probe(self.engine, self.config).dump()}
        self.store.save(self.engine.state, self.progress, files)
        self.recorder.restart_clock(self.progress.tokens)

    def _resume(self, start: CheckpointFolder | Path | None) -> Progress:
        if start is None:
            return Progress()
        if isinstance(start, Path):
            start_from_weights(start, self.engine, self.config)
            return Progress()
        progress = load_run(start, self.engine, self.config)
        log.info("resumed from %s", start)
        return progress

    def _build_evaluation_setup(self, objective: Objective) -> EvaluationSetup | None:
        """Open the held-out text of each data source with enough tokens. Return None if there is no such source."""
        data, corpora = self.config.data, {}
        for source in self.loader.plan.sources:
            corpus = Corpus(source.corpus.directory, "heldout", data.verify, data.cache)
            try:
                EvaluationSetup({source.name: corpus}, objective, data.micro_batch).check()
            except DataError as error:
                log.info("no evaluation: %s", error)
            else:
                corpora[source.name] = corpus
        if not corpora:
            return None
        return EvaluationSetup(
            corpora,
            objective,
            data.micro_batch,
            max_windows=self.config.eval.windows,
            prompt_loss_weight=data.prompt_loss_weight,
        )

    def _build_recorder(self) -> MetricsRecorder:
        config, step = self.config, self.progress.step
        device = self.engine.device
        peak, peak_origin = find_peak_flops(device, config.precision)
        if config.log.peak_tflops:
            peak, peak_origin = config.log.peak_tflops * 1e12, "log.peak_tflops"
        sample_flops = count_flops_per_sample(
            config.model, compute_inputs_len(config), self.loader.objective.encoder_len
        )
        log.info("MFU: %s; %.3f TFLOP/s per device, %s", CONVENTION, peak / 1e12, peak_origin)
        sinks: list[MetricsFile | TensorBoard | ConsoleSink] = []
        if self.world.is_main:
            sinks.append(MetricsFile(self.run_dir / "metrics.jsonl", step))
            if config.log.tensorboard:
                sinks.append(TensorBoard(self.run_dir / "tensorboard", step))
            sinks.append(ConsoleSink(config.run.steps, step))
        for sink in sinks:
            self.open_sinks.callback(sink.close)
        source_names = [source.name for source in self.loader.plan.sources if source.name]
        source_tokens = {name: self.progress.source_tokens.get(name, 0) for name in source_names}
        return MetricsRecorder(
            sinks,
            flops_per_token=sample_flops / self.tokens_per_sample,
            peak_flops=peak * self.world.world_size,
            device=device,
            source_tokens=source_tokens if len(source_tokens) > 1 else None,
        )
