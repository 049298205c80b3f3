"""Any world size reads the same samples in the same order, with or without prefetch, from any step."""

import threading
from itertools import chain

import numpy as np
import pytest
import torch

from dist_llm.config.data_sections import DataConfig
from dist_llm.config.objective_sections import CausalSpec
from dist_llm.config.sequence_lengths import SequenceLengths
from dist_llm.data.loader import Loader
from dist_llm.data.order import Mixture, RandomOrder, ShuffledOrder
from dist_llm.data.plan import MixtureStage, SamplePlan
from dist_llm.data.streams import DataSource, WindowStream, build_order
from dist_llm.errors import DataError
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.build_objective import Objective
from dist_llm.objectives.examples import BatchLayout
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.parallel.context_parallel import shard_sequences

SEQ = 4
BATCH = 24  # divisible by all world sizes below
STEPS = 3
WORLDS = (1, 2, 3, 4, 8)
SIZE = SequenceLengths(SEQ + 1, SEQ, SEQ)
CAUSAL_ONLY = Objective(
    ((CausalSpec(), SIZE),), ObjectiveVocabulary(1000, 999), BatchLayout(True, False, False, False), SEQ, 0, 3
)


@pytest.fixture
def corpus(counting):
    return counting(SEQ * BATCH * STEPS + 1)  # exactly one epoch of STEPS steps


def make_data_config(**changes):
    return DataConfig(**{"path": "", "seq_len": SEQ, "global_batch": BATCH, "micro_batch": 1, "prefetch": 0, **changes})


def loader(corpus, rank=0, ranks=1, **changes):
    data = make_data_config(**changes)
    return Loader(make_plan(corpus, build_order(data, corpus, 3, SIZE)), CAUSAL_ONLY, data, rank, ranks, pin=False)


def make_plan(corpus, order):
    """Return a plan with one source and one objective."""
    mixture = Mixture(3, (1,))
    return SamplePlan(
        [DataSource("", corpus, (WindowStream(corpus, order, SEQ + 1),), mixture)], [MixtureStage(0, mixture, (0,))]
    )


def first_tokens_of_step(loader, number):
    """Return the first token of each sequence of the step."""
    return torch.cat([batch.inputs_BS[:, 0] for batch in loader.load_batches(number * BATCH)]).tolist()


@pytest.mark.parametrize("order", ["shuffle", "random"])
@pytest.mark.parametrize("ranks", WORLDS)
def test_global_order_does_not_depend_on_the_world_size(ranks, order, corpus):
    alone = loader(corpus, order=order)
    loaders = [loader(corpus, rank, ranks, order=order) for rank in range(ranks)]
    for number in range(2 * STEPS):
        starts_by_rank = [first_tokens_of_step(rank_loader, number) for rank_loader in loaders]
        assert {len(starts) for starts in starts_by_rank} == {BATCH // ranks}
        assert list(chain(*starts_by_rank)) == first_tokens_of_step(alone, number)


@pytest.mark.parametrize("ranks", WORLDS)
def test_ranks_partition_an_epoch(ranks, corpus):
    starts_by_rank = [
        [start for number in range(STEPS) for start in first_tokens_of_step(rank_loader, number)]
        for rank_loader in (loader(corpus, rank, ranks) for rank in range(ranks))
    ]
    assert sorted(chain(*starts_by_rank)) == list(range(0, SEQ * BATCH * STEPS, SEQ))


@pytest.mark.parametrize("micro", [1, 2, 3, 12])
def test_microbatches_keep_the_order_of_the_local_batch(micro, corpus):
    cut, single = loader(corpus, 1, 2, micro_batch=micro), loader(corpus, 1, 2, micro_batch=12)
    batches = cut.load_batches(0)
    assert [len(batch.inputs_BS) for batch in batches] == [micro] * (12 // micro)
    assert first_tokens_of_step(cut, 1) == first_tokens_of_step(single, 1)


def test_targets_are_the_next_tokens(corpus):
    (narrow,) = loader(corpus, micro_batch=BATCH).load_batches(0)
    assert narrow.inputs_BS.numpy().dtype == corpus.dtype, "batches are copied to a device in the corpus's dtype"
    batch = narrow.to(torch.device("cpu"))
    assert batch.inputs_BS.dtype == batch.targets_BS.dtype == torch.int64
    assert batch.inputs_BS.shape == (BATCH, SEQ)
    assert torch.equal(batch.targets_BS, batch.inputs_BS + 1), "token i of the corpus is i"
    assert torch.equal(batch.inputs_BS[:, 1:], batch.targets_BS[:, :-1])
    assert (batch.mask, batch.num_valid_tokens) == (CAUSAL, BATCH * SEQ)


def test_largest_uint32_ids_are_not_ignored_targets():
    ids = np.full((2, SEQ + 1), IGNORE_INDEX, np.int16).view("<u2")  # 65436
    batch = CAUSAL_ONLY(ids, np.arange(2))
    shards = [shard_sequences(batch, rank, 2) for rank in range(2)]
    assert sum(shard.num_valid_tokens for shard in shards) == batch.num_valid_tokens == 2 * SEQ


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_prefetch_does_not_change_batches(prefetch, corpus):
    ahead, plain = loader(corpus, prefetch=prefetch), loader(corpus)
    try:
        for number in (0, 1, 2, 7, 8, 3):  # in order, after a jump, and backwards
            assert first_tokens_of_step(ahead, number) == first_tokens_of_step(plain, number)
    finally:
        ahead.close()


@pytest.mark.parametrize("order", ["shuffle", "random"])
def test_a_step_may_start_at_any_sample(order, corpus, monkeypatch):
    """Samples are located for several steps at a time: a step outside them is located again."""
    monkeypatch.setattr("dist_llm.data.loader.LOOKUP_SAMPLES", 2 * BATCH)
    single_loader = loader(corpus, order=order, micro_batch=BATCH)
    for first in (0, BATCH, 2 * BATCH, 3, BATCH + 3, BATCH, 10**9, 0):
        expected = corpus.read(single_loader.streams[0].order.locate_windows(np.arange(first, first + BATCH)), SEQ)
        assert np.array_equal(single_loader.load_batches(first)[0].inputs_BS, expected)


def test_prefetch_builds_each_step_once(corpus, monkeypatch):
    first_samples = []
    ahead = loader(corpus, rank=1, ranks=2, prefetch=2)
    build_batches = ahead._build_batches
    monkeypatch.setattr(ahead, "_build_batches", lambda first: first_samples.append(first) or build_batches(first))
    for number in range(5):
        first_tokens_of_step(ahead, number)
    ahead.close()
    assert first_samples[:5] == [number * BATCH for number in range(5)]
    assert len(set(first_samples)) == len(first_samples) <= 7


def test_close_stops_the_prefetch_thread(corpus):
    ahead = loader(corpus, prefetch=2)
    first_tokens_of_step(ahead, 0)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    ahead.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


@pytest.mark.parametrize("number", [1, STEPS, 10**9])
def test_resume_reads_only_the_next_step(number, corpus, monkeypatch):
    reads = []
    read = corpus.read
    monkeypatch.setattr(corpus, "read", lambda starts, length: reads.append(len(starts)) or read(starts, length))
    first_tokens = first_tokens_of_step(loader(corpus), number)
    assert reads == [BATCH]
    uninterrupted = loader(corpus)
    if number < 10:
        assert first_tokens == [first_tokens_of_step(uninterrupted, n) for n in range(number + 1)][-1]


def test_a_prefetch_error_is_raised_at_its_step(make_corpus):
    from dist_llm.data.corpus import Corpus

    directory, _ = make_corpus([SEQ * BATCH * STEPS + 1])
    path = directory / "train-00000.bin"
    ids = np.fromfile(path, "<u2")
    data = make_data_config(prefetch=2)
    corpus = Corpus(directory)
    order = build_order(data, corpus, 3, SIZE)
    ids[order.locate_windows(np.array([2 * BATCH]))] = 999  # an input of step 2 only, or a target of its neighbour
    ids.tofile(path)
    ahead = Loader(make_plan(corpus, order), CAUSAL_ONLY, data, 0, 1, pin=False)
    try:
        with pytest.raises(DataError, match="is 999"):
            list(map(ahead.load_batches, range(0, 3 * BATCH, BATCH)))
    finally:
        ahead.close()


def test_build_order_follows_the_config(corpus):
    num_windows = BATCH * STEPS
    assert build_order(make_data_config(order="shuffle"), corpus, 3, SIZE) == ShuffledOrder(3, num_windows, SEQ)
    assert build_order(make_data_config(order="random"), corpus, 3, SIZE) == RandomOrder(3, num_windows * SEQ + 1 - SEQ)


def test_random_order_reaches_both_ends(counting):
    corpus = counting(SEQ + 3)
    order = build_order(make_data_config(order="random"), corpus, 0, SIZE)
    rows = corpus.read(order.locate_windows(np.arange(200)), SEQ + 1)
    assert (rows.min(), rows.max()) == (0, SEQ + 2)


@pytest.mark.parametrize("tokens", [0, 1, SEQ])
@pytest.mark.parametrize("order", ["shuffle", "random"])
def test_a_corpus_shorter_than_a_window_is_rejected(tokens, order, counting):
    corpus = counting(tokens)
    hint = r"lower seq_len \(to make it \d+ or fewer\) or prepare more text" if tokens > 1 else "prepare more text"
    message = f"{tokens} train tokens are too few for a window of 5, which data.seq_len 4 needs; {hint}$"
    with pytest.raises(DataError, match=message):
        build_order(make_data_config(order=order), corpus, 0, SIZE)


def test_the_shortest_corpus_has_one_window(counting):
    corpus = counting(SEQ + 1)
    for order in ("shuffle", "random"):
        assert (
            build_order(make_data_config(order=order), corpus, 0, SIZE).locate_windows(np.arange(4)).tolist() == [0] * 4
        )


def test_load_batches_of_rank_does_not_advance_the_loader(corpus):
    local, other = (loader(corpus, rank, 3, prefetch=1) for rank in (0, 2))
    before = local.load_batches(0)
    remote_inputs = torch.cat([batch.inputs_BS for batch in local.load_batches_of_rank(2, BATCH)])
    assert torch.equal(remote_inputs, torch.cat([batch.inputs_BS for batch in other.load_batches(BATCH)]))
    assert torch.equal(before[0].inputs_BS, local.load_batches(0)[0].inputs_BS)
    assert local.advance_steps(5, 2) == 5 + 2 * BATCH
    local.close(), other.close()
