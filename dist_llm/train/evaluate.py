"""Loss on held-out text: each window exactly once, at any world size."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dist_llm.data.corpus import Corpus
from dist_llm.engines.base import Engine
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.models.visibility import CAUSAL
from dist_llm.objectives.batch import Batch


@dataclass(frozen=True)
class Evaluation:
    """Over `tokens` scored targets; `loss` in nats per token."""

    loss: float
    tokens: int
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluate(engine: Engine, corpus: Corpus, seq_len: int, micro_batch: int, limit: int = 0) -> Evaluation:
    """Score the corpus's first `limit` windows (0: all). Raises nothing for short text: windows are padded.

    Bits per byte are those of the text alone: separators are predicted, so their loss counts,
    but they add no bytes.
    """
    rank, ranks = engine.data_rank
    losses, count = [], 0
    for whole in heldout_batches(corpus, seq_len, micro_batch, rank, ranks, limit):
        batch = engine.cut(whole)
        losses.append(engine.score(batch))
        count += batch.scored
    loss = float(engine.total(torch.stack(losses).double().sum()))
    tokens = int(engine.total(count))
    bytes_per_token = corpus.manifest.text_bytes(corpus.split) / corpus.n_tokens
    return Evaluation(loss / tokens, tokens, loss / tokens / math.log(2) / bytes_per_token)


def heldout_batches(
    corpus: Corpus, seq_len: int, micro_batch: int, rank: int, ranks: int, limit: int = 0
) -> Iterator[Batch]:
    """This rank's share of the windows, the short last one padded with unscored targets.

    Every rank yields equally many batches, since a sharded model runs in step: a rank without
    windows left yields rows that score nothing.
    """
    n_windows = max(1, -(-(corpus.n_tokens - 1) // seq_len))
    n_windows = min(limit, n_windows) if limit else n_windows
    share = -(-n_windows // ranks)
    for first in range(rank * share, (rank + 1) * share, micro_batch):
        wanted = range(first, min(first + micro_batch, (rank + 1) * share))
        windows = np.full((len(wanted), seq_len + 1), IGNORE, dtype=np.int64)
        for row, window in zip(windows, wanted, strict=True):
            if window < n_windows:
                length = min(seq_len + 1, corpus.n_tokens - window * seq_len)
                row[:length] = corpus.read(np.array([window * seq_len]), length)[0]
        tokens = torch.from_numpy(windows)
        yield Batch.of(tokens[:, :-1].clamp(min=0), tokens[:, 1:], CAUSAL)
