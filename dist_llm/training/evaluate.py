"""Compute the loss on held-out text: each window exactly once, at any world size."""

import math
from collections.abc import Callable, Iterator, Mapping
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
    """The result over `tokens` scored targets; `loss` in nats per token.

    `bits_per_byte` is None unless every token of the text is predicted from those before it. `breakdown` has the losses
    of each source and each component of a mixture, by name, if there are several.
    """

    loss: float
    tokens: int
    bits_per_byte: float | None = None
    breakdown: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Heldout:
    """The held-out text and how to score it: everything that is equal in all evaluations."""

    corpora: Mapping[str, Corpus]
    objective: Objective
    micro_batch: int
    limit: int = 0  # windows of each corpus and component of the objective; 0: all
    score_prompts: bool = False

    def check(self) -> None:
        """Raise DataError if there is too little text to score."""
        needed = 2 if self.objective.is_causal_only else max(size.window for _, size in self.objective.components)
        for corpus in self.corpora.values():
            if self.objective.layout.has_document_mask:
                corpus.check_document_bounds()
            if corpus.num_tokens < needed:
                raise DataError(
                    f"{corpus.directory}: the objective needs {needed} tokens of {corpus.split} text, but there are "
                    f"{corpus.num_tokens}; prepare more, or with a larger --heldout-fraction"
                )


def evaluate(engine: Engine, heldout: Heldout, alive: Callable[[], None] = lambda: None) -> Evaluation:
    """Score each corpus's windows with each component. Examples are built as in training, from the window's number.

    Calls `alive` before each batch.

    Bits per byte count only the bytes of the text: the loss of predicted separators is included, but separators have no
    bytes.
    """
    members = [f"{number}_{spec.name}" for number, (spec, _) in enumerate(heldout.objective.components)]
    sums = {
        (source, name): _score(engine, heldout, corpus, member, alive)
        for source, corpus in heldout.corpora.items()
        for member, name in enumerate(members)
    }
    loss, tokens = (sum(column) for column in zip(*sums.values(), strict=True))
    breakdown: dict[str, float] = {}
    for source in heldout.corpora if len(heldout.corpora) > 1 else ():
        breakdown[source] = _mean([each for (of, _), each in sums.items() if of == source])
    for name in members if len(members) > 1 else ():
        breakdown[name] = _mean([each for (_, of), each in sums.items() if of == name])
    text_bytes = sum(
        count
        * heldout.corpora[source].manifest.count_text_bytes(heldout.corpora[source].split)
        / heldout.corpora[source].num_tokens
        for (source, _), (_, count) in sums.items()
    )
    predicts_all_text = all(spec.name == "causal" for spec, _ in heldout.objective.components)
    predicts_all_text &= heldout.score_prompts or not any(
        corpus.manifest.prompts for corpus in heldout.corpora.values()
    )
    bits = loss / math.log(2) / text_bytes if predicts_all_text and text_bytes else None
    return Evaluation(loss / max(tokens, 1), int(tokens), bits, breakdown)


def _mean(sums: list[tuple[float, int]]) -> float:
    return sum(loss for loss, _ in sums) / max(sum(count for _, count in sums), 1)


def _score(
    engine: Engine, heldout: Heldout, corpus: Corpus, member: int, alive: Callable[[], None]
) -> tuple[float, int]:
    """Return (sum of losses, number of valid tokens) of one component on one corpus, over all ranks."""
    losses: list[Tensor] = []
    count = 0
    for batch_of_data_rank in heldout_batches(heldout, corpus, member, *engine.dp_rank_and_size):
        alive()
        batch = engine.to_local_batch(batch_of_data_rank)
        losses.append(engine.score(batch).sum())
        count += batch.num_valid_tokens
    return float(engine.all_reduce_over_data(torch.stack(losses).double().sum())), int(
        engine.all_reduce_over_data(count)
    )


def heldout_batches(heldout: Heldout, corpus: Corpus, member: int, rank: int, ranks: int) -> Iterator[Batch]:
    """Yield this rank's share of the windows.

    Plain text is scored to its last token, with the last window padded; other objectives use only full windows. Every
    rank yields equally many batches, because a sharded model needs all ranks in each forward: a rank without windows
    yields rows without valid tokens.
    """
    objective = heldout.objective
    size = objective.components[member][1]
    if objective.is_causal_only:
        n_windows = max(1, -(-(corpus.num_tokens - 1) // size.stride))
    else:
        n_windows = corpus.count_windows(size.window, size.stride)
    n_windows = min(heldout.limit, n_windows) if heldout.limit else n_windows
    share = -(-n_windows // ranks)
    for first in range(rank * share, (rank + 1) * share, heldout.micro_batch):
        window_ids = np.arange(first, min(first + heldout.micro_batch, (rank + 1) * share))
        is_window = window_ids < n_windows
        if objective.is_causal_only:
            yield _plain(corpus, size.stride, window_ids, is_window)
        else:
            numbers = np.where(is_window, window_ids, 0)
            starts, documents = numbers * size.stride, objective.layout.has_document_mask
            windows = read_windows(corpus, starts, size.window, heldout.score_prompts, documents)
            batch = objective(windows, numbers, [member] * len(numbers))
            targets_BS = batch.targets_BS.masked_fill(~torch.from_numpy(is_window)[:, None], IGNORE_INDEX)
            yield replace(batch, targets_BS=targets_BS, num_valid_tokens=int((targets_BS != IGNORE_INDEX).sum()))


def _plain(corpus: Corpus, stride: int, window_ids: np.ndarray, is_window: np.ndarray) -> Batch:
    windows = np.full((len(window_ids), stride + 1), IGNORE_INDEX, dtype=np.int64)
    for row in np.flatnonzero(is_window).tolist():
        start = int(window_ids[row]) * stride
        length = min(stride + 1, corpus.num_tokens - start)
        windows[row, :length] = corpus.read(np.array([start]), length)[0]
    tokens = torch.from_numpy(windows)
    return Batch.build(tokens[:, :-1].clamp(min=0), tokens[:, 1:], CAUSAL)
