"""Evaluators: objects that compute metrics of the current weights every `eval.every` steps and after the last step."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dist_llm.config.schema import Config
from dist_llm.data.corpus import Corpus
from dist_llm.data.loader import Loader
from dist_llm.errors import DataError
from dist_llm.generation import Sampling, encode_prompt, generate_text
from dist_llm.observe.metrics import MetricsRow
from dist_llm.text.tokenizer import Tokenizer
from dist_llm.training.callback import TrainingState
from dist_llm.training.evaluate import EvaluationSetup, evaluate

log = logging.getLogger("dist_llm")


class Evaluator(Protocol):
    """Computes metrics of the current weights. The metrics of all evaluators form one row of metrics.jsonl."""

    @property
    def metric_names(self) -> Sequence[str]:
        """The names in the rows of `evaluate`. A name that ends with * stands for all names that begin so."""
        ...

    def evaluate(self, state: TrainingState) -> MetricsRow:
        """Return {metric name: number}, the same on all ranks; rank 0 writes it. Every rank must call this.

        It may use collectives and random numbers, and must not change weights, gradients or optimizer state.
        `state.engine.score` runs the model on any layout. An evaluation of minutes calls `state.heartbeat`.
        """
        ...


class HeldoutLossEvaluator:
    """The loss on the held-out text of the run, in total, per data source and per component of the objective."""

    metric_names = ("heldout_loss", "heldout_perplexity", "heldout_bits_per_byte", "heldout_loss_*")

    def __init__(self, setup: EvaluationSetup) -> None:
        self.setup = setup

    def evaluate(self, state: TrainingState) -> MetricsRow:
        result = evaluate(state.engine, self.setup, lambda: state.heartbeat("an evaluation"))
        row: MetricsRow = {"heldout_loss": result.loss, "heldout_perplexity": result.perplexity}
        if result.bits_per_byte is not None:
            row["heldout_bits_per_byte"] = result.bits_per_byte
        return row | {f"heldout_loss_{name}": loss for name, loss in result.breakdown.items()}


class TextSampleEvaluator:
    """A text that the model generates from eval.sample_prompt. Every rank generates, because FSDP shards the model."""

    metric_names = ("sample",)

    def __init__(self, config: Config, tokenizer_dir: Path) -> None:
        self.config, self.tokenizer_dir = config, tokenizer_dir

    def evaluate(self, state: TrainingState) -> MetricsRow:
        config, prompt = self.config, self.config.eval.sample_prompt
        tokenizer = Tokenizer.load(self.tokenizer_dir)
        sampling = Sampling(max_tokens=config.eval.sample_tokens, temperature=0.8, top_p=0.95, seed=config.run.seed)
        (model,) = state.engine.model_parts
        model.eval()
        request = encode_prompt(config, tokenizer, prompt)
        chunks = generate_text(model, tokenizer, request, sampling, config.model.max_seq_len, stop=False)
        return {"sample": prompt + "".join(chunks)}


def build_evaluators(config: Config, loader: Loader) -> list[Evaluator]:
    """Build the evaluators that the config selects. Without held-out text there are none."""
    setup = _build_heldout_setup(config, loader)
    parallel = config.parallel
    can_generate = parallel.pp == parallel.tp == parallel.cp == 1 and config.model.architecture != "encoder"
    if config.eval.sample_prompt and not can_generate:
        log.info("eval.sample_prompt has no effect: an encoder, and a model under pp, tp or cp, cannot sample")
    evaluators: list[Evaluator] = []
    if setup is not None:
        evaluators.append(HeldoutLossEvaluator(setup))
        if config.eval.sample_prompt and can_generate:
            evaluators.append(TextSampleEvaluator(config, loader.plan.sources[0].corpus.directory))
    return evaluators


def _build_heldout_setup(config: Config, loader: Loader) -> EvaluationSetup | None:
    """Open the held-out text of each data source with enough tokens. Return None if there is no such source."""
    data, corpora = config.data, {}
    for source in loader.plan.sources:
        corpus = Corpus(source.corpus.directory, "heldout", data.verify, data.cache)
        try:
            EvaluationSetup({source.name: corpus}, loader.objective, data.micro_batch).check()
        except DataError as error:
            log.info("no evaluation: %s", error)
        else:
            corpora[source.name] = corpus
    if not corpora:
        return None
    return EvaluationSetup(
        corpora,
        loader.objective,
        data.micro_batch,
        max_windows=config.eval.windows,
        prompt_loss_weight=data.prompt_loss_weight,
    )
