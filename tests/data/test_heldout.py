"""Evaluation scores each held-out target once. Each rank gets equally many batches."""

import math

import pytest
import torch

from dist_llm.config.objective_sections import CausalSpec, MaskedSpec
from dist_llm.config.sequence_lengths import SequenceLengths
from dist_llm.engines.base import DataParallelRank
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.objectives.build_objective import Objective
from dist_llm.objectives.examples import BatchLayout
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.training.evaluate import EvaluationSetup, evaluate, iter_heldout_batches

SEQ_LEN = 8
VOCABULARY = ObjectiveVocabulary(num_tokenizer_ids=99, eot=98)
CAUSAL_OBJECTIVE = Objective(
    ((CausalSpec(), SequenceLengths(window_tokens=SEQ_LEN + 1, stride_tokens=SEQ_LEN, input_tokens=SEQ_LEN)),),
    VOCABULARY,
    BatchLayout(causal=True, has_prefix=False, has_document_mask=False, has_encoder_padding=False),
    inputs_len=SEQ_LEN,
    encoder_len=0,
    seed=0,
)
# Sizes of a corpus in tokens. Each target is the next token, so n windows need n * SEQ_LEN + 1 tokens.
CORPUS_SIZES = (
    2,  # a window with one target
    5,  # a short window
    SEQ_LEN + 1,  # one full window
    3 * SEQ_LEN + 1,  # three full windows
    3 * SEQ_LEN + 2,  # a last window with one target
    4 * SEQ_LEN,  # a last window that lacks one target
    7 * SEQ_LEN + 3,  # more windows than ranks
)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_tokens", CORPUS_SIZES)
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_each_target_is_scored_once_with_equal_batches_per_rank(num_tokens, micro_batch, dp_size, make_counting_corpus):
    corpus = make_counting_corpus(num_tokens, "heldout")
    setup = EvaluationSetup({"": corpus}, CAUSAL_OBJECTIVE, micro_batch)
    batches_by_rank = [
        list(iter_heldout_batches(setup, corpus, component_index=0, dp_rank=dp_rank, dp_size=dp_size))
        for dp_rank in range(dp_size)
    ]
    distinct_batch_sizes = {tuple(len(batch.inputs_BS) for batch in batches) for batches in batches_by_rank}
    assert len(distinct_batch_sizes) == 1, "ranks have different batch sizes"
    scored_targets = []
    for batch in (batch for batches in batches_by_rank for batch in batches):
        assert batch.inputs_BS.shape == batch.targets_BS.shape
        assert batch.inputs_BS.shape[1] == SEQ_LEN
        assert len(batch.inputs_BS) <= micro_batch
        assert batch.inputs_BS.min() >= 0
        is_valid_BS = batch.targets_BS != IGNORE_INDEX
        assert batch.num_valid_tokens == is_valid_BS.sum()
        # Token i of the corpus is i.
        assert torch.equal(batch.inputs_BS[is_valid_BS] + 1, batch.targets_BS[is_valid_BS])
        scored_targets += batch.targets_BS[is_valid_BS].tolist()
    assert sorted(scored_targets) == list(range(1, num_tokens))


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_each_window_of_a_masked_objective_is_scored_once(micro_batch, dp_size, make_counting_corpus):
    """The last batch may be partial. Its windows are scored once too."""
    num_windows = 7
    corpus = make_counting_corpus(num_windows * SEQ_LEN, "heldout")
    masked_objective = Objective(
        (
            (
                MaskedSpec(mask_rate=0.9),
                SequenceLengths(window_tokens=SEQ_LEN, stride_tokens=SEQ_LEN, input_tokens=SEQ_LEN + 1),
            ),
        ),
        VOCABULARY,
        BatchLayout(causal=False, has_prefix=False, has_document_mask=False, has_encoder_padding=False),
        inputs_len=SEQ_LEN + 1,
        encoder_len=0,
        seed=0,
    )
    setup = EvaluationSetup({"": corpus}, masked_objective, micro_batch)
    scored_windows = []
    for dp_rank in range(dp_size):
        for batch in iter_heldout_batches(setup, corpus, component_index=0, dp_rank=dp_rank, dp_size=dp_size):
            has_target_B = (batch.targets_BS != IGNORE_INDEX).any(1)
            scored_windows += (batch.targets_BS[has_target_B].amax(1) // SEQ_LEN).tolist()
    assert sorted(scored_windows) == list(range(num_windows))


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("max_windows", [1, 2, 3, 99])
def test_max_windows_scores_the_first_windows(max_windows, dp_size, make_counting_corpus):
    corpus = make_counting_corpus(4 * SEQ_LEN + 1, "heldout")
    setup = EvaluationSetup({"": corpus}, CAUSAL_OBJECTIVE, micro_batch=2, max_windows=max_windows)
    scored_targets = []
    for dp_rank in range(dp_size):
        for batch in iter_heldout_batches(setup, corpus, component_index=0, dp_rank=dp_rank, dp_size=dp_size):
            scored_targets += batch.targets_BS[batch.targets_BS != IGNORE_INDEX].tolist()
    assert sorted(scored_targets) == list(range(1, min(max_windows, 4) * SEQ_LEN + 1))


class TargetSumEngine:
    """An engine on one rank. The loss of a target is its token id."""

    dp_rank_and_size = DataParallelRank(rank=0, size=1)

    def all_reduce_over_dp_and_cp(self, value):
        return torch.as_tensor(value)

    def to_local_batch(self, batch):
        return batch

    def score(self, batch):
        return batch.targets_BS[batch.targets_BS != IGNORE_INDEX].float().sum()


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_results_are_per_token_and_per_byte(micro_batch, make_counting_corpus):
    corpus = make_counting_corpus(11, "heldout")  # three documents; the manifest gives each 5 bytes of text
    result = evaluate(TargetSumEngine(), EvaluationSetup({"": corpus}, CAUSAL_OBJECTIVE, micro_batch))
    assert (result.tokens, result.loss) == (10, sum(range(1, 11)) / 10)
    # The mean loss is 5.5 nats per token. The corpus has 15 bytes per 11 tokens.
    assert result.bits_per_byte == pytest.approx(5.5 / math.log(2) / (15 / 11))
    assert result.perplexity == pytest.approx(math.exp(5.5))
