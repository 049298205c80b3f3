"""Any world size reads the same samples in the same order, ahead or not, from any step."""

import threading
from itertools import chain

import numpy as np
import pytest
import torch

from dist_llm.config.lengths import Lengths
from dist_llm.config.schema import DataConfig, ObjectiveSpec
from dist_llm.data.loader import Loader
from dist_llm.data.order import Mixture, Random, Shuffle
from dist_llm.data.plan import MixtureStage, SamplePlan
from dist_llm.data.streams import DataSource, WindowStream, build_order
from dist_llm.errors import DataError
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.build_objective import Objective
from dist_llm.objectives.examples import BatchLayout
from dist_llm.objectives.objective_vocabulary import Vocabulary
from dist_llm.parallel.context_parallel import shard_sequences

SEQ = 4
BATCH = 24  # divides by every world size below
STEPS = 3
WORLDS = (1, 2, 3, 4, 8)
SIZE = Lengths(SEQ + 1, SEQ, SEQ)
CAUSAL_ONLY = Objective(
    ((ObjectiveSpec(), SIZE),), Vocabulary(1000, 999), BatchLayout(True, False, False, False), SEQ, 0, 3
)


@pytest.fixture
def corpus(counting):
    return counting(SEQ * BATCH * STEPS + 1)  # exactly one epoch of STEPS steps


def settings(**changes):
    return DataConfig(**{"path": "", "seq_len": SEQ, "global_batch": BATCH, "micro_batch": 1, "prefetch": 0, **changes})


def loader(corpus, rank=0, ranks=1, **changes):
    data = settings(**changes)
    return Loader(plan_of(corpus, build_order(data, corpus, 3, SIZE)), CAUSAL_ONLY, data, rank, ranks, pin=False)


def plan_of(corpus, order):
    """One source, one objective."""
    one = Mixture(3, (1,))
    return SamplePlan(
        [DataSource("", corpus, (WindowStream(corpus, order, SEQ + 1),), one)], [MixtureStage(0, one, (0,))]
    )


def step(loader, number):
    """First tokens of each of the step's sequences."""
    return torch.cat([batch.inputs_BS[:, 0] for batch in loader.load_batches(number * BATCH)]).tolist()


@pytest.mark.parametrize("order", ["shuffle", "random"])
@pytest.mark.parametrize("ranks", WORLDS)
def test_the_global_order_does_not_depend_on_the_world(ranks, order, corpus):
    alone = loader(corpus, order=order)
    parts = [loader(corpus, rank, ranks, order=order) for rank in range(ranks)]
    for number in range(2 * STEPS):
        shares = [step(part, number) for part in parts]
        assert {len(share) for share in shares} == {BATCH // ranks}
        assert list(chain(*shares)) == step(alone, number)


@pytest.mark.parametrize("ranks", WORLDS)
def test_an_epoch_is_disjoint_and_complete_over_the_ranks(ranks, corpus):
    shares = [
        [start for number in range(STEPS) for start in step(part, number)]
        for part in (loader(corpus, rank, ranks) for rank in range(ranks))
    ]
    assert sorted(chain(*shares)) == list(range(0, SEQ * BATCH * STEPS, SEQ))


@pytest.mark.parametrize("micro", [1, 2, 3, 12])
def test_microbatches_cut_the_share_and_keep_its_order(micro, corpus):
    cut, whole = loader(corpus, 1, 2, micro_batch=micro), loader(corpus, 1, 2, micro_batch=12)
    batches = cut.load_batches(0)
    assert [len(batch.inputs_BS) for batch in batches] == [micro] * (12 // micro)
    assert step(cut, 1) == step(whole, 1)


def test_a_batch_is_inputs_and_the_tokens_that_follow(corpus):
    (narrow,) = loader(corpus, micro_batch=BATCH).load_batches(0)
    assert narrow.inputs_BS.numpy().dtype == corpus.dtype, "the corpus's type is all that is copied to a device"
    batch = narrow.to(torch.device("cpu"))
    assert batch.inputs_BS.dtype == batch.targets_BS.dtype == torch.int64
    assert batch.inputs_BS.shape == (BATCH, SEQ)
    assert torch.equal(batch.targets_BS, batch.inputs_BS + 1), "the corpus counts"
    assert torch.equal(batch.inputs_BS[:, 1:], batch.targets_BS[:, :-1])
    assert (batch.mask, batch.num_valid_tokens) == (CAUSAL, BATCH * SEQ)


def test_the_id_whose_bits_are_those_of_ignore_is_scored_when_a_sequence_is_cut():
    ids = np.full((2, SEQ + 1), IGNORE, np.int16).view("<u2")  # 65436
    batch = CAUSAL_ONLY(ids, np.arange(2))
    parts = [shard_sequences(batch, rank, 2) for rank in range(2)]
    assert sum(part.num_valid_tokens for part in parts) == batch.num_valid_tokens == 2 * SEQ


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_reading_ahead_changes_nothing(prefetch, corpus):
    ahead, plain = loader(corpus, prefetch=prefetch), loader(corpus)
    try:
        for number in (0, 1, 2, 7, 8, 3):  # in order, after a jump, and back
            assert step(ahead, number) == step(plain, number)
    finally:
        ahead.close()


@pytest.mark.parametrize("order", ["shuffle", "random"])
def test_any_sample_may_be_the_first(order, corpus, monkeypatch):
    """Starts are found for many steps at once: a step off their beat, before them or past them is found anew."""
    monkeypatch.setattr("dist_llm.data.loader.LOOKUP_SAMPLES", 2 * BATCH)
    one = loader(corpus, order=order, micro_batch=BATCH)
    for first in (0, BATCH, 2 * BATCH, 3, BATCH + 3, BATCH, 10**9, 0):
        want = corpus.read(one.streams[0].order.locate(np.arange(first, first + BATCH)), SEQ)
        assert np.array_equal(one.load_batches(first)[0].inputs_BS, want)


def test_each_step_is_made_once_though_made_ahead(corpus, monkeypatch):
    made = []
    ahead = loader(corpus, rank=1, ranks=2, prefetch=2)
    make = ahead._build_batches
    monkeypatch.setattr(ahead, "_build_batches", lambda first: made.append(first) or make(first))
    for number in range(5):
        step(ahead, number)
    ahead.close()
    assert made[:5] == [number * BATCH for number in range(5)]
    assert len(set(made)) == len(made) <= 7


def test_the_thread_ends_with_the_loader(corpus):
    ahead = loader(corpus, prefetch=2)
    step(ahead, 0)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    ahead.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


@pytest.mark.parametrize("number", [1, STEPS, 10**9])
def test_a_resume_is_one_number_and_reads_nothing_else(number, corpus, monkeypatch):
    reads = []
    read = corpus.read
    monkeypatch.setattr(corpus, "read", lambda starts, length: reads.append(len(starts)) or read(starts, length))
    resumed = step(loader(corpus), number)
    assert reads == [BATCH]
    whole = loader(corpus)
    if number < 10:
        assert resumed == [step(whole, n) for n in range(number + 1)][-1]


def test_an_error_ahead_comes_with_its_own_step(make_corpus):
    from dist_llm.data.corpus import Corpus

    directory, _ = make_corpus([SEQ * BATCH * STEPS + 1])
    path = directory / "train-00000.bin"
    ids = np.fromfile(path, "<u2")
    data = settings(prefetch=2)
    corpus = Corpus(directory)
    order = build_order(data, corpus, 3, SIZE)
    ids[order.locate(np.array([2 * BATCH]))] = 999  # an input of step 2 only, or a target of its neighbour
    ids.tofile(path)
    ahead = Loader(plan_of(corpus, order), CAUSAL_ONLY, data, 0, 1, pin=False)
    try:
        with pytest.raises(DataError, match="is 999"):
            list(map(ahead.load_batches, range(0, 3 * BATCH, BATCH)))
    finally:
        ahead.close()


def test_the_order_that_is_asked_for(corpus):
    n_windows = BATCH * STEPS
    assert build_order(settings(order="shuffle"), corpus, 3, SIZE) == Shuffle(3, n_windows, SEQ)
    assert build_order(settings(order="random"), corpus, 3, SIZE) == Random(3, n_windows * SEQ + 1 - SEQ)


def test_random_offsets_reach_both_ends(counting):
    corpus = counting(SEQ + 3)
    order = build_order(settings(order="random"), corpus, 0, SIZE)
    rows = corpus.read(order.locate(np.arange(200)), SEQ + 1)
    assert (rows.min(), rows.max()) == (0, SEQ + 2)


@pytest.mark.parametrize("tokens", [0, 1, SEQ])
@pytest.mark.parametrize("order", ["shuffle", "random"])
def test_a_corpus_too_short_for_a_window_is_refused(tokens, order, counting):
    corpus = counting(tokens)
    way_out = r"lower seq_len \(to make it \d+ or fewer\) or prepare more text" if tokens > 1 else "prepare more text"
    message = f"{tokens} train tokens make no window of 5, which data.seq_len 4 needs; {way_out}$"
    with pytest.raises(DataError, match=message):
        build_order(settings(order=order), corpus, 0, SIZE)


def test_the_shortest_corpus_has_one_window(counting):
    corpus = counting(SEQ + 1)
    for order in ("shuffle", "random"):
        assert build_order(settings(order=order), corpus, 0, SIZE).locate(np.arange(4)).tolist() == [0] * 4


def test_what_another_rank_reads_is_known_without_moving_on(corpus):
    mine, other = (loader(corpus, rank, 3, prefetch=1) for rank in (0, 2))
    before = mine.load_batches(0)
    theirs = torch.cat([batch.inputs_BS for batch in mine.load_batches_of_rank(2, BATCH)])
    assert torch.equal(theirs, torch.cat([batch.inputs_BS for batch in other.load_batches(BATCH)]))
    assert torch.equal(before[0].inputs_BS, mine.load_batches(0)[0].inputs_BS)
    assert mine.advance_steps(5, 2) == 5 + 2 * BATCH
    mine.close(), other.close()
