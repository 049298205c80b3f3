"""The loader reads the same samples in the same order with any number of ranks, with or without prefetch."""

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

SEQ_LEN = 4  # sequence length in tokens
GLOBAL_BATCH = 24  # sequences of a step; divisible by all DP_SIZES
EPOCH_STEPS = 3
DP_SIZES = (1, 2, 3, 4, 8)
SEED = 3
LENGTHS = SequenceLengths(window_tokens=SEQ_LEN + 1, stride_tokens=SEQ_LEN, input_tokens=SEQ_LEN)
CAUSAL_OBJECTIVE = Objective(
    ((CausalSpec(), LENGTHS),),
    ObjectiveVocabulary(num_tokenizer_ids=1000, eot=999),
    BatchLayout(causal=True, has_prefix=False, has_document_mask=False, has_encoder_padding=False),
    inputs_len=SEQ_LEN,
    encoder_len=0,
    seed=SEED,
)


@pytest.fixture
def corpus(make_counting_corpus):
    """A counting corpus of exactly one epoch."""
    return make_counting_corpus(SEQ_LEN * GLOBAL_BATCH * EPOCH_STEPS + 1)  # exactly one epoch


def make_data_config(**changes):
    """Return a `data` section with changed keys."""
    return DataConfig(
        **{"path": "", "seq_len": SEQ_LEN, "global_batch": GLOBAL_BATCH, "micro_batch": 1, "prefetch": 0, **changes}
    )


def make_loader(corpus, dp_rank=0, dp_size=1, **changes):
    """Make the loader of a causal objective. `changes` are keys of the config section `data`."""
    data = make_data_config(**changes)
    plan = make_plan(corpus, build_order(data, corpus, SEED, LENGTHS))
    return Loader(plan, CAUSAL_OBJECTIVE, data, dp_rank, dp_size, pin=False)


def make_plan(corpus, order):
    """Return a plan with one source and one objective."""
    mixture = Mixture(SEED, quotas=(1,))
    return SamplePlan(
        [
            DataSource(
                "",
                corpus=corpus,
                streams=(WindowStream(corpus=corpus, order=order, window_tokens=SEQ_LEN + 1),),
                component_mixture=mixture,
            )
        ],
        [MixtureStage(first_sample=0, mixture=mixture, num_consumed=(0,))],
    )


def read_first_tokens(loader, step):
    """Return the first token of each sequence of the step."""
    return torch.cat([batch.inputs_BS[:, 0] for batch in loader.load_batches(step * GLOBAL_BATCH)]).tolist()


@pytest.mark.parametrize("order", ["shuffle", "random"])
@pytest.mark.parametrize("dp_size", DP_SIZES)
def test_global_order_does_not_depend_on_the_number_of_ranks(dp_size, order, corpus):
    single_loader = make_loader(corpus, order=order)
    loaders = [make_loader(corpus, dp_rank, dp_size, order=order) for dp_rank in range(dp_size)]
    for step in range(2 * EPOCH_STEPS):
        starts_by_rank = [read_first_tokens(loader, step) for loader in loaders]
        assert {len(starts) for starts in starts_by_rank} == {GLOBAL_BATCH // dp_size}
        assert list(chain(*starts_by_rank)) == read_first_tokens(single_loader, step)


@pytest.mark.parametrize("dp_size", DP_SIZES)
def test_ranks_partition_an_epoch(dp_size, corpus):
    starts = []
    for dp_rank in range(dp_size):
        loader = make_loader(corpus, dp_rank, dp_size)
        for step in range(EPOCH_STEPS):
            starts += read_first_tokens(loader, step)
    assert sorted(starts) == list(range(0, SEQ_LEN * GLOBAL_BATCH * EPOCH_STEPS, SEQ_LEN))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 12])
def test_microbatches_keep_the_order_of_the_local_batch(micro_batch, corpus):
    local_batch = GLOBAL_BATCH // 2
    micro_loader = make_loader(corpus, dp_rank=1, dp_size=2, micro_batch=micro_batch)
    whole_loader = make_loader(corpus, dp_rank=1, dp_size=2, micro_batch=local_batch)
    batches = micro_loader.load_batches(0)
    assert [len(batch.inputs_BS) for batch in batches] == [micro_batch] * (local_batch // micro_batch)
    assert read_first_tokens(micro_loader, step=1) == read_first_tokens(whole_loader, step=1)


def test_targets_are_the_next_tokens(corpus):
    (host_batch,) = make_loader(corpus, micro_batch=GLOBAL_BATCH).load_batches(0)
    assert host_batch.inputs_BS.numpy().dtype == corpus.dtype, "ids change their dtype before the copy to the device"
    batch = host_batch.to(torch.device("cpu"))
    assert batch.inputs_BS.dtype == batch.targets_BS.dtype == torch.int64
    assert batch.inputs_BS.shape == (GLOBAL_BATCH, SEQ_LEN)
    assert torch.equal(batch.targets_BS, batch.inputs_BS + 1)  # token i of the corpus is i
    assert torch.equal(batch.inputs_BS[:, 1:], batch.targets_BS[:, :-1])
    assert (batch.mask, batch.num_valid_tokens) == (CAUSAL, GLOBAL_BATCH * SEQ_LEN)


def test_an_id_with_the_bits_of_ignore_index_is_a_valid_target():
    ids = np.full((2, SEQ_LEN + 1), IGNORE_INDEX, np.int16).view("<u2")  # -100 as int16 is 65436 as uint16
    batch = CAUSAL_OBJECTIVE(ids, np.arange(2))
    shards = [shard_sequences(batch, cp_rank, cp_size=2) for cp_rank in range(2)]
    assert sum(shard.num_valid_tokens for shard in shards) == batch.num_valid_tokens == 2 * SEQ_LEN


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_prefetch_does_not_change_batches(prefetch, corpus):
    prefetching_loader, plain_loader = make_loader(corpus, prefetch=prefetch), make_loader(corpus)
    try:
        for step in (0, 1, 2, 7, 8, 3):  # in order, after a jump, and backwards
            assert read_first_tokens(prefetching_loader, step) == read_first_tokens(plain_loader, step)
    finally:
        prefetching_loader.close()


@pytest.mark.parametrize("order", ["shuffle", "random"])
def test_a_step_may_start_at_any_sample(order, corpus, monkeypatch):
    """The loader locates the samples of several steps at a time. For a step outside them it locates samples again."""
    monkeypatch.setattr("dist_llm.data.loader.LOOKUP_SAMPLES", 2 * GLOBAL_BATCH)
    single_loader = make_loader(corpus, order=order, micro_batch=GLOBAL_BATCH)
    for first_sample in (0, GLOBAL_BATCH, 2 * GLOBAL_BATCH, 3, GLOBAL_BATCH + 3, GLOBAL_BATCH, 10**9, 0):
        samples = np.arange(first_sample, first_sample + GLOBAL_BATCH)
        expected = corpus.read(single_loader.streams[0].order.locate_windows(samples), SEQ_LEN)
        assert np.array_equal(single_loader.load_batches(first_sample)[0].inputs_BS, expected)


def test_prefetch_builds_each_step_once(corpus, monkeypatch):
    first_samples = []
    loader = make_loader(corpus, dp_rank=1, dp_size=2, prefetch=2)
    build_batches = loader._build_batches

    def record_and_build(first_sample):
        first_samples.append(first_sample)
        return build_batches(first_sample)

    monkeypatch.setattr(loader, "_build_batches", record_and_build)
    for step in range(5):
        read_first_tokens(loader, step)
    loader.close()
    assert first_samples[:5] == [step * GLOBAL_BATCH for step in range(5)]
    assert len(set(first_samples)) == len(first_samples) <= 5 + 2  # steps read, and steps prefetched


def test_close_stops_the_prefetch_thread(corpus):
    loader = make_loader(corpus, prefetch=2)
    read_first_tokens(loader, step=0)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    loader.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())


@pytest.mark.parametrize("step", [1, EPOCH_STEPS, 10**9])
def test_resume_reads_only_the_next_step(step, corpus, monkeypatch):
    windows_per_read = []
    read = corpus.read

    def record_and_read(starts, num_tokens):
        windows_per_read.append(len(starts))
        return read(starts, num_tokens)

    monkeypatch.setattr(corpus, "read", record_and_read)
    first_tokens = read_first_tokens(make_loader(corpus), step)
    assert windows_per_read == [GLOBAL_BATCH]
    uninterrupted = make_loader(corpus)
    if step < 10:  # few enough steps to read them all
        assert first_tokens == [read_first_tokens(uninterrupted, num_steps) for num_steps in range(step + 1)][-1]


def test_an_error_of_the_prefetch_thread_is_raised(make_corpus):
    from dist_llm.data.corpus import Corpus

    directory, _ = make_corpus([SEQ_LEN * GLOBAL_BATCH * EPOCH_STEPS + 1])
    path = directory / "train-00000.bin"
    ids = np.fromfile(path, "<u2")
    data = make_data_config(prefetch=2)
    corpus = Corpus(directory)
    order = build_order(data, corpus, SEED, LENGTHS)
    # The corpus has 300 ids. The bad id is an input of step 2, and maybe a target of the preceding window.
    ids[order.locate_windows(np.array([2 * GLOBAL_BATCH]))] = 999
    ids.tofile(path)
    loader = Loader(make_plan(corpus, order), CAUSAL_OBJECTIVE, data, dp_rank=0, dp_size=1, pin=False)
    try:
        with pytest.raises(DataError, match="is 999"):
            list(map(loader.load_batches, range(0, 3 * GLOBAL_BATCH, GLOBAL_BATCH)))
    finally:
        loader.close()


def test_build_order_follows_the_config(corpus):
    num_windows = GLOBAL_BATCH * EPOCH_STEPS
    assert build_order(make_data_config(order="shuffle"), corpus, SEED, LENGTHS) == ShuffledOrder(
        SEED, num_windows, stride=SEQ_LEN
    )
    random_order = build_order(make_data_config(order="random"), corpus, SEED, LENGTHS)
    assert random_order == RandomOrder(SEED, num_offsets=num_windows * SEQ_LEN + 1 - SEQ_LEN)


def test_random_order_reaches_both_ends_of_the_corpus(make_counting_corpus):
    corpus = make_counting_corpus(SEQ_LEN + 3)
    order = build_order(make_data_config(order="random"), corpus, seed=0, lengths=LENGTHS)
    windows = corpus.read(order.locate_windows(np.arange(200)), SEQ_LEN + 1)
    assert (windows.min(), windows.max()) == (0, SEQ_LEN + 2)


@pytest.mark.parametrize("num_tokens", [0, 1, SEQ_LEN])
@pytest.mark.parametrize("order", ["shuffle", "random"])
def test_a_corpus_shorter_than_a_window_is_rejected(num_tokens, order, make_counting_corpus):
    corpus = make_counting_corpus(num_tokens)
    hint = r"lower seq_len \(to make it \d+ or fewer\) or prepare more text" if num_tokens > 1 else "prepare more text"
    message = f"{num_tokens} train tokens are too few for a window of 5, which data.seq_len 4 needs; {hint}$"
    with pytest.raises(DataError, match=message):
        build_order(make_data_config(order=order), corpus, seed=0, lengths=LENGTHS)


def test_the_shortest_corpus_has_one_window(make_counting_corpus):
    corpus = make_counting_corpus(SEQ_LEN + 1)
    for order in ("shuffle", "random"):
        built_order = build_order(make_data_config(order=order), corpus, seed=0, lengths=LENGTHS)
        assert built_order.locate_windows(np.arange(4)).tolist() == [0] * 4


def test_load_batches_of_rank_does_not_advance_the_loader(corpus):
    loader_0, loader_2 = (make_loader(corpus, dp_rank, dp_size=3, prefetch=1) for dp_rank in (0, 2))
    before = loader_0.load_batches(0)
    inputs_of_rank_2 = torch.cat([batch.inputs_BS for batch in loader_0.load_batches_of_rank(2, GLOBAL_BATCH)])
    assert torch.equal(inputs_of_rank_2, torch.cat([batch.inputs_BS for batch in loader_2.load_batches(GLOBAL_BATCH)]))
    assert torch.equal(before[0].inputs_BS, loader_0.load_batches(0)[0].inputs_BS)
    loader_0.close(), loader_2.close()


def test_advance_steps_adds_whole_batches(corpus):
    assert make_loader(corpus).advance_steps(first_sample=5, num_steps=2) == 5 + 2 * GLOBAL_BATCH
