"""The loop: batches in, steps out, with evaluation, checkpoints and metrics on their beats."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import Signals

from dist_llm.checkpoint.boxes import placed
from dist_llm.checkpoint.folder import Folder
from dist_llm.checkpoint.probe import PROBE
from dist_llm.checkpoint.state import Guarded, Progress
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.lengths import inputs_len, sample_tokens
from dist_llm.config.schema import Config, LossConfig
from dist_llm.data.corpus import Corpus
from dist_llm.data.loader import Loader
from dist_llm.data.repetition import find_repetitions
from dist_llm.engines.base import Engine
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.errors import DataError
from dist_llm.generate import Sampling, ask, text
from dist_llm.launch.stop import StopSignals
from dist_llm.launch.watchdog import Watchdog
from dist_llm.launch.world import World
from dist_llm.objectives.build import Objective
from dist_llm.observe.console import ProgressLine
from dist_llm.observe.flops import CONVENTION, flops_per_sample, peak_flops
from dist_llm.observe.metrics import Measured, MetricsFile, Recorder, Row
from dist_llm.observe.tensorboard import TensorBoard
from dist_llm.optim.schedule import learning_rate
from dist_llm.parallel.digest import differing
from dist_llm.text.tokenizer import Tokenizer
from dist_llm.train.audit import Audit
from dist_llm.train.evaluate import Heldout, evaluate
from dist_llm.train.garbage import Garbage
from dist_llm.train.guard import Guard
from dist_llm.train.replay import replay
from dist_llm.train.resume import EarlierSteps, load_run, start_from_weights
from dist_llm.train.step import terms_of, train_step
from dist_llm.train.stragglers import Stragglers

log = logging.getLogger("dist_llm")

SLOW = 30  # times longer than a step may what has no steps of its own stand still


class Trainer:
    """One rank's side of a run: from its checkpoint, or another's at a path. `files` go into each that it saves.

    `guarded`: what is known of bad steps by a run that goes back to that checkpoint.
    `watchdog` is opened and closed by whoever hands it in: a rank may hang before the first step, and after the last.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        engine: Engine,
        loader: Loader,
        store: CheckpointStore,
        start: Folder | Path | None,
        files: Mapping[str, bytes],
        guarded: Guarded | None = None,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.config, self.world, self.engine, self.loader = config, world, engine, loader
        self.watchdog = watchdog or Watchdog(world, 0.0)
        self.store, self.files = store, files
        self.directory = Path(config.run.dir)
        self.progress = self._resume(start)
        if guarded is not None:
            self.progress.guard = replace(guarded, losses=self.progress.guard.losses)
        self.stragglers = Stragglers(world, engine, config.log.stragglers_seconds)
        self.guard = Guard(config.guard, self.progress.guard, engine, self.directory)
        self.sample_tokens = sample_tokens(config)
        samples = (config.run.steps - self.progress.step) * config.data.global_batch
        self.repetitions = find_repetitions(
            loader.plan, self.progress.samples, loader.plan.after(self.progress.samples, samples)
        )
        self.heldout = self._heldout(loader.objective)
        self.audit = Audit(engine, loader, config.data.audit_every)
        parallel = config.parallel
        self.samples = parallel.pp == parallel.tp == parallel.cp == 1
        self.samples &= config.model.architecture != "encoder"
        if config.eval.sample_prompt and not self.samples:
            log.info("eval.sample_prompt: no samples from an encoder, or while training under pp, tp or cp")
        self.sinks = ExitStack()
        resumed = isinstance(start, Folder) and guarded is None and world.main
        self.earlier = EarlierSteps.read(self.directory, self.progress.step, config) if resumed else EarlierSteps({})
        self.recorder = self._recorder()

    def run(self, signals: StopSignals) -> int:
        """Train to run.steps; evaluate and save on their beats and at the end.

        Returns 0, or the signal that made it save and stop before. Raises RewindError where it is to go back.
        """
        config, told = self.config, signals.told
        first = self.progress.step
        self.recorder.restart_clock(self.progress.tokens)
        with self.sinks, self.stragglers, Garbage() as garbage:  # closed at the end, whatever it is
            if self.progress.step == 0 and self.guard.rewinds:
                self.save()  # something to go back to
            while self.progress.step < config.run.steps and not told:
                self.watchdog.beat(f"step {self.progress.step + 1}")
                signals.share()
                self.step()
                self.store.poll()
                step = self.progress.step
                if told := signals.agreed():
                    log.info("%s: saving, then this run ends; a second signal ends it at once", Signals(told).name)
                last = step == config.run.steps
                if step % config.log.every == 0 or last:
                    self.flush()
                    garbage.collect()
                evaluates = last or (config.eval.every and step % config.eval.every == 0 and not told)
                saves = last or told or (config.checkpoint.every and step % config.checkpoint.every == 0)
                if evaluates:
                    self.evaluate()
                if saves:
                    self.watchdog.beat(f"the checkpoint of step {step}", SLOW)
                    self.save()
                if evaluates or saves:
                    garbage.collect(everything=True)
            self.watchdog.beat("writing the last checkpoint", SLOW)
            self.store.finish()
        if told:
            log.info("stopped by %s after step %d, saved; start again to go on", Signals(told).name, self.progress.step)
            return told
        if first >= config.run.steps:
            log.info(
                "nothing to do: the run has taken %d steps, and run.steps is %d; raise it to go on",
                first,
                config.run.steps,
            )
        log.info("done: %d steps, checkpoint in %s", self.progress.step, self.store.directory)
        log.info("watch the curves: tensorboard --logdir %s", self.directory / "tensorboard")
        return 0

    def step(self) -> None:
        """One optimizer step on the next global batch."""
        config, progress = self.config, self.progress
        begin = time.perf_counter()
        batches = self.loader.batches(progress.samples)
        wait = time.perf_counter() - begin
        lr = learning_rate(config.optim, config.schedule, progress.step + 1)
        self.audit.add(progress.samples, batches)
        if (every := config.guard.replay_every) and (progress.step + 1) % every == 0:
            lines = replay(self.engine, self.loader, progress.samples, progress.step, config.precision)
            self.guard.corrupt(progress.step + 1, lines)
        accept = partial(self.guard.accept, progress.step + 1) if self.guard.skips else None
        sources, regularised = len(self.loader.plan.sources), config.loss != LossConfig()
        report = train_step(self.engine, batches, lr, progress.step, sources, accept, regularised)
        progress.step += 1
        progress.heldout_loss = None
        progress.samples = self.loader.after(progress.samples)
        progress.tokens += config.data.global_batch * self.sample_tokens
        while self.repetitions and self.repetitions[0].sample <= progress.samples:
            log.info("%s", self.repetitions.pop(0))
        of_step = progress.step, report.loss, report.grad_norm, report.scored, lr, progress.tokens, wait
        self.recorder.add(Measured(*of_step, report.by_source, terms_of(report, config.loss)))
        if (every := config.guard.digest_every) and progress.step % every == 0:
            self.compare()

    def compare(self) -> None:
        """Raises DivergedError or RewindError, on all ranks, where copies of weights differ."""
        if copies := self.engine.copies:
            self.guard.corrupt(self.progress.step, differing(copies, self.world.host))

    def flush(self) -> None:
        """Write the metrics so far. Raises DivergedError or RewindError, on all ranks, where a step was bad."""
        rows = self.recorder.flush()
        if notes := self.guard.look(rows) + self.stragglers.report(rows) + self.earlier.compare(rows):
            self.recorder.emit(notes)

    def evaluate(self) -> None:
        """Held-out loss and a sample, into every sink."""
        if self.heldout is None:
            return
        self.flush()
        result = evaluate(self.engine, self.heldout, lambda: self.watchdog.beat("an evaluation", SLOW))
        self.progress.heldout_loss = result.loss
        row: Row = {
            "step": self.progress.step,
            "heldout_loss": result.loss,
            "heldout_perplexity": result.perplexity,
        }
        if result.bits_per_byte is not None:
            row["heldout_bits_per_byte"] = result.bits_per_byte
        row |= {f"heldout_loss_{name}": loss for name, loss in result.parts.items()}
        if self.config.eval.sample_prompt and self.samples:
            row["sample"] = self.sample()
        self.recorder.emit([row])
        self.recorder.restart_clock(self.progress.tokens)

    def sample(self) -> str:
        """Text from the model as it is. Every rank runs it: the model may be sharded."""
        config = self.config
        tokenizer = Tokenizer.load(self.loader.plan.sources[0].corpus.directory)
        sampling = Sampling(config.eval.sample_tokens, temperature=0.8, top_p=0.95, seed=config.run.seed)
        (model,) = self.engine.parts
        model.eval()
        asked = ask(config, tokenizer, config.eval.sample_prompt)
        pieces = text(model, tokenizer, asked, sampling, config.model.max_seq_len, stop=False)
        return config.eval.sample_prompt + "".join(pieces)

    def save(self) -> None:
        """Begin a checkpoint of this step. Metrics up to it are on disk before it is."""
        self.flush()
        self.audit.check()
        if self.config.guard.digest_every:
            self.compare()
        held = (part for each in self.engine.state.weights().values() for _, part in placed(each))
        self.guard.weigh(self.progress.step, all(bool(part.isfinite().all()) for part in held))
        self.progress.loss_scale = self.engine.loss_scale
        self.progress.source_tokens = self.recorder.source_tokens
        files = {**self.files, PROBE: measure_probe(self.engine, self.config).dump()}
        self.store.save(self.engine.state, self.progress, files)
        self.recorder.restart_clock(self.progress.tokens)

    def _resume(self, start: Folder | Path | None) -> Progress:
        if start is None:
            return Progress()
        if isinstance(start, Path):
            start_from_weights(start, self.engine, self.config)
            return Progress()
        progress = load_run(start, self.engine, self.config)
        log.info("resumed from %s", start)
        return progress

    def _heldout(self, objective: Objective) -> Heldout | None:
        """Of the sources that have enough text for it."""
        data, corpora = self.config.data, {}
        for source in self.loader.plan.sources:
            corpus = Corpus(source.corpus.directory, "heldout", data.verify, data.cache)
            try:
                Heldout({source.name: corpus}, objective, data.micro_batch).check()
            except DataError as error:
                log.info("evaluation is left out: %s", error)
            else:
                corpora[source.name] = corpus
        limit = self.config.eval.windows
        return Heldout(corpora, objective, data.micro_batch, limit, data.score_prompts) if corpora else None

    def _recorder(self) -> Recorder:
        config, step = self.config, self.progress.step
        device = self.engine.device
        peak, source = peak_flops(device, config.precision)
        if config.log.peak_tflops:
            peak, source = config.log.peak_tflops * 1e12, "log.peak_tflops"
        per_token = (
            flops_per_sample(config.model, inputs_len(config), self.loader.objective.source) / self.sample_tokens
        )
        log.info("MFU: %s; %.3f TFLOP/s per device, %s", CONVENTION, peak / 1e12, source)
        sinks: list[MetricsFile | TensorBoard | ProgressLine] = []
        if self.world.main:
            sinks.append(MetricsFile(self.directory / "metrics.jsonl", step))
            if config.log.tensorboard:
                sinks.append(TensorBoard(self.directory / "tensorboard", step))
            sinks.append(ProgressLine(config.run.steps, step))
        for sink in sinks:
            self.sinks.callback(sink.close)
        names = [source.name for source in self.loader.plan.sources if source.name]
        tokens = {name: self.progress.source_tokens.get(name, 0) for name in names}
        return Recorder(sinks, per_token, peak * self.world.size, device, tokens if len(tokens) > 1 else None)
