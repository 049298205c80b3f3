"""Evaluation scores each held-out target once, with equally many batches on each rank."""

import math

import pytest
import torch

from dist_llm.config.objective_sections import CausalSpec, MaskedSpec
from dist_llm.config.sequence_lengths import SequenceLengths
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.objectives.build_objective import Objective
from dist_llm.objectives.examples import BatchLayout
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.training.evaluate import HeldoutData, evaluate, iter_heldout_batches

SEQ = 8
PLAIN = Objective(
    ((CausalSpec(), SequenceLengths(SEQ + 1, SEQ, SEQ)),),
    ObjectiveVocabulary(99, 98),
    BatchLayout(True, False, False, False),
    SEQ,
    0,
    0,
)
# No window, one short, one full, a tail of 1 and of SEQ - 1, more ranks than windows.
TOKENS = (2, 5, SEQ + 1, 3 * SEQ + 1, 3 * SEQ + 2, 4 * SEQ, 7 * SEQ + 3)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_each_target_is_scored_once_with_equal_batches_per_rank(num_tokens, micro_batch, ranks, counting):
    corpus = counting(num_tokens, "heldout")
    batches_by_rank = [
        list(iter_heldout_batches(HeldoutData({"": corpus}, PLAIN, micro_batch), corpus, 0, rank, ranks))
        for rank in range(ranks)
    ]
    assert len({tuple(len(batch.inputs_BS) for batch in batches) for batches in batches_by_rank}) == 1, (
        "same batches, same rows"
    )
    scored = []
    for batch in (batch for batches in batches_by_rank for batch in batches):
        assert batch.inputs_BS.shape == batch.targets_BS.shape
        assert batch.inputs_BS.shape[1] == SEQ
        assert len(batch.inputs_BS) <= micro_batch
        assert batch.inputs_BS.min() >= 0
        counts = batch.targets_BS != IGNORE_INDEX
        assert batch.num_valid_tokens == counts.sum()
        assert torch.equal(batch.inputs_BS[counts] + 1, batch.targets_BS[counts]), "token i of the corpus is i"
        scored += batch.targets_BS[counts].tolist()
    assert sorted(scored) == list(range(1, num_tokens))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_each_window_of_a_masked_objective_is_scored_once(micro_batch, ranks, counting):
    """Including the windows of a partial last batch."""
    windows = 7
    corpus = counting(windows * SEQ, "heldout")
    components = ((MaskedSpec(mask_rate=0.9), SequenceLengths(SEQ, SEQ, SEQ + 1)),)
    masked = Objective(components, ObjectiveVocabulary(99, 98), BatchLayout(False, True, False, False), SEQ + 1, 0, 0)
    scored = []
    for rank in range(ranks):
        for batch in iter_heldout_batches(HeldoutData({"": corpus}, masked, micro_batch), corpus, 0, rank, ranks):
            rows = (batch.targets_BS != IGNORE_INDEX).any(1)
            scored += (batch.targets_BS[rows].amax(1) // SEQ).tolist()
    assert sorted(scored) == list(range(windows))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("limit", [1, 2, 3, 99])
def test_limit_scores_the_first_windows(limit, ranks, counting):
    corpus = counting(4 * SEQ + 1, "heldout")
    heldout = HeldoutData({"": corpus}, PLAIN, 2, limit)
    batches = [b for rank in range(ranks) for b in iter_heldout_batches(heldout, corpus, 0, rank, ranks)]
    scored = sorted(target for b in batches for target in b.targets_BS[b.targets_BS != IGNORE_INDEX].tolist())
    assert scored == list(range(1, min(limit, 4) * SEQ + 1))


class CountingEngine:
    """An engine whose loss of a target is its id."""

    dp_rank_and_size = (0, 1)

    def all_reduce_over_data(self, value):
        return torch.as_tensor(value)

    def to_local_batch(self, batch):
        return batch

    def score(self, batch):
        return batch.targets_BS[batch.targets_BS != IGNORE_INDEX].float().sum()


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_results_are_per_token_and_per_byte(micro_batch, counting):
    corpus = counting(11, "heldout")  # three documents of 5 "bytes" each: 15 bytes of text
    result = evaluate(CountingEngine(), HeldoutData({"": corpus}, PLAIN, micro_batch))
    assert (result.tokens, result.loss) == (10, sum(range(1, 11)) / 10)
    assert result.bits_per_byte == pytest.approx(5.5 / math.log(2) / (15 / 11))
    assert result.perplexity == pytest.approx(math.exp(5.5))
