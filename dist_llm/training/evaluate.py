"""Compute the loss on held-out text.

At any world size, the same windows are scored, each once: all windows of a corpus, or the first `max_windows`. A window
is a run of consecutive tokens of a corpus, from which the objective builds one example. The trainer evaluates at
intervals; `dist-llm evaluate` evaluates a checkpoint.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dist_llm.data.corpus import Corpus
from dist_llm.data.streams import read_windows
from dist_llm.engines.base import Engine
from dist_llm.errors import DataError
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.build_objective import Objective


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: the (weighted) mean `loss` over `tokens` valid targets, in nats per token.

    `bits_per_byte` is None unless the objective predicts each token from the tokens before it, all targets have the
    loss weight 1 (prompts may have another), and the manifests count bytes of text. `breakdown` has the loss of
    each data source by name if there are several sources, and of each component of the objective if there are several.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None = None
    breakdown: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # exp overflows above 709


@dataclass(frozen=True)
class LossTotals:
    """The sum of the losses of some targets, the number by which it is divided, and the number of targets."""

    loss_sum: float
    denominator: float
    num_tokens: int


@dataclass(frozen=True)
class EvaluationSetup:
    """The held-out corpora by source name, and the settings that all evaluations of a run share."""

    corpora: Mapping[str, Corpus]
    objective: Objective
    micro_batch: int
    max_windows: int | None = None  # windows of each corpus and component of the objective; None: all
    prompt_loss_weight: float = 0.0

    def check(self) -> None:
        """Raise DataError if a corpus has too few tokens to score."""
        min_tokens = (
            2
            if self.objective.has_plain_windows
            else max(lengths.window_tokens for _, lengths in self.objective.components)
        )
        for corpus in self.corpora.values():
            if self.objective.layout.has_document_mask:
                corpus.check_document_bounds()
            if corpus.num_tokens < min_tokens:
                hint = ", or with a larger --heldout-fraction" if corpus.split == "heldout" else ""
                raise DataError(
                    f"{corpus.directory}: the objective needs {min_tokens} tokens of {corpus.split} text, but there "
                    f"are {corpus.num_tokens}; prepare more text{hint}"
                )


def evaluate(engine: Engine, setup: EvaluationSetup, heartbeat: Callable[[], None] = lambda: None) -> Evaluation:
    """Score the windows of each corpus with each component of the objective. Every rank must call this.

    Examples are built as in training, from the index of the window. `heartbeat` is called before each batch. The bytes
    in bits per byte are estimated: the number of targets times the mean bytes per token of the corpus. End-of-document
    tokens have no bytes, but their losses count.
    """
    component_names = [f"{index}_{spec.name}" for index, (spec, _) in enumerate(setup.objective.components)]
    totals = {  # by (source name, component name)
        (source, name): _score_corpus(engine, setup, corpus, component_index, heartbeat)
        for source, corpus in setup.corpora.items()
        for component_index, name in enumerate(component_names)
    }
    breakdown: dict[str, float] = {}
    for source in setup.corpora if len(setup.corpora) > 1 else ():
        breakdown[source] = _mean_loss([entry for (name, _), entry in totals.items() if name == source])
    for component in component_names if len(component_names) > 1 else ():
        breakdown[component] = _mean_loss([entry for (_, name), entry in totals.items() if name == component])
    text_bytes = 0.0
    for (source, _), entry in totals.items():
        corpus = setup.corpora[source]
        text_bytes += entry.num_tokens * corpus.manifest.count_text_bytes(corpus.split) / corpus.num_tokens
    predicts_all_text = all(spec.name == "causal" for spec, _ in setup.objective.components)
    has_prompts = any(corpus.manifest.prompts for corpus in setup.corpora.values())
    predicts_all_text &= setup.prompt_loss_weight == 1 or not has_prompts
    bits = None
    if predicts_all_text and text_bytes:
        bits = sum(entry.loss_sum for entry in totals.values()) / math.log(2) / text_bytes
    num_tokens = sum(entry.num_tokens for entry in totals.values())
    return Evaluation(_mean_loss(list(totals.values())), num_tokens, bits, breakdown)


def _mean_loss(totals: Sequence[LossTotals]) -> float:
    """Return the weighted mean of the losses of all targets."""
    return sum(entry.loss_sum for entry in totals) / (sum(entry.denominator for entry in totals) or 1)


def _score_corpus(
    engine: Engine, setup: EvaluationSetup, corpus: Corpus, component_index: int, heartbeat: Callable[[], None]
) -> LossTotals:
    """Score one corpus with one component of the objective, over all ranks."""
    losses: list[Tensor] = []
    num_valid_tokens, denominator = 0, 0.0
    for dp_batch in iter_heldout_batches(setup, corpus, component_index, *engine.dp_rank_and_size):
        heartbeat()
        batch = engine.to_local_batch(dp_batch)
        losses.append(engine.score(batch).sum())
        num_valid_tokens += batch.num_valid_tokens
        denominator += batch.loss_denominator
    return LossTotals(
        loss_sum=float(engine.all_reduce_over_loss_axes(torch.stack(losses).double().sum())),
        denominator=float(engine.all_reduce_over_loss_axes(denominator)),
        num_tokens=int(engine.all_reduce_over_loss_axes(num_valid_tokens)),
    )


def iter_heldout_batches(
    setup: EvaluationSetup, corpus: Corpus, component_index: int, dp_rank: int, dp_size: int
) -> Iterator[Batch]:
    """Yield the batches of one data-parallel rank, for one component of the objective.

    Plain causal text is scored to its last token, with the last window padded. Other objectives use only full windows.
    Every rank yields equally many batches, because a sharded model needs all ranks in each forward pass. A rank that
    has no windows left yields rows without valid tokens.
    """
    objective = setup.objective
    lengths = objective.components[component_index][1]
    if objective.has_plain_windows:
        num_windows = max(1, -(-(corpus.num_tokens - 1) // lengths.stride_tokens))
    else:
        num_windows = corpus.count_windows(lengths.window_tokens, lengths.stride_tokens)
    num_windows = min(setup.max_windows, num_windows) if setup.max_windows else num_windows
    windows_per_rank = -(-num_windows // dp_size)
    first_window, end_window = dp_rank * windows_per_rank, (dp_rank + 1) * windows_per_rank
    for batch_start in range(first_window, end_window, setup.micro_batch):
        window_ids = np.arange(batch_start, min(batch_start + setup.micro_batch, end_window))
        has_window = window_ids < num_windows
        if objective.has_plain_windows:
            yield _build_causal_batch(corpus, lengths.stride_tokens, window_ids, has_window)
        else:
            valid_ids = np.where(has_window, window_ids, 0)  # window 0 fills the rest; its targets are ignored below
            windows = read_windows(
                corpus,
                valid_ids * lengths.stride_tokens,
                lengths.window_tokens,
                prompt_loss_weight=setup.prompt_loss_weight,
                document_mask=objective.layout.has_document_mask,
            )
            batch = objective(windows, valid_ids, [component_index] * len(valid_ids))
            targets_BS = batch.targets_BS.masked_fill(~torch.from_numpy(has_window)[:, None], IGNORE_INDEX)
            batch = replace(batch, targets_BS=targets_BS, num_valid_tokens=int((targets_BS != IGNORE_INDEX).sum()))
            if batch.loss_weights_BS is not None:  # sum the weights again, without those of the ignored targets
                batch = batch.with_loss_weights(batch.loss_weights_BS)
            yield batch


def _build_causal_batch(corpus: Corpus, stride: int, window_ids: np.ndarray, has_window: np.ndarray) -> Batch:
    """Build next-token examples of `stride` targets. A row without a window has only ignored targets."""
    windows = np.full((len(window_ids), stride + 1), IGNORE_INDEX, dtype=np.int64)
    for row in np.flatnonzero(has_window).tolist():
        start = int(window_ids[row]) * stride
        num_tokens = min(stride + 1, corpus.num_tokens - start)
        windows[row, :num_tokens] = corpus.read(np.array([start]), num_tokens)[0]
    tokens = torch.from_numpy(windows)
    return Batch.build(tokens[:, :-1].clamp(min=0), tokens[:, 1:], CAUSAL)
