"""Windows that do not cross document boundaries: kind `document` (one document) and kind `packed` (several).

Each token is a target once, except the first token of a document. Packing does not change a loss.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.config.derive import resolve_config
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.config.sequence_lengths import SequenceLengths
from dist_llm.data.corpus import Corpus
from dist_llm.data.data_history import build_fresh_plan
from dist_llm.data.loader import build_loader
from dist_llm.data.packed_windows import PackedWindows, pack_best_fit
from dist_llm.data.shard import CorpusManifest, ShardWriter
from dist_llm.data.streams import has_prompt_weights
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.build_model import build_model
from dist_llm.objectives.build_objective import build_objective
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.training.evaluate import EvaluationSetup, iter_heldout_batches

SEQ_LEN, EOT = 8, 99  # sequence length in tokens, id of the end of a document
# Sizes of the documents in tokens.
DOCUMENT_SIZES = (2, 3, 9, 10, 17, 5, 2, 30, 4, 8, 1, 6)
LENGTHS = SequenceLengths(window_tokens=SEQ_LEN + 1, stride_tokens=SEQ_LEN, input_tokens=SEQ_LEN)


def write_corpus(directory, sizes=DOCUMENT_SIZES, prompts=None):
    """Write documents of these sizes that end with EOT. The other ids count up, modulo EOT.

    `prompts` has the prompt length of each document in tokens; None: a corpus without prompts.
    """
    writer = ShardWriter(directory, "train", "uint16", max_tokens=40, has_prompts=prompts is not None)
    next_token = 0
    for index, size in enumerate(sizes):
        ids = np.append((np.arange(size - 1) + next_token) % EOT, EOT)
        next_token += size - 1
        prompt_lengths = None if prompts is None else np.array([prompts[index]])
        writer.extend(ids, np.array([size]), np.array([size - 1]), prompt_lengths)
    shards = {"train": writer.close(), "heldout": ()}
    CorpusManifest(
        "uint16", vocab_size=100, tokenizer_sha256="none", source=("count",), shards=shards, prompts=prompts is not None
    ).save(directory)
    return Corpus(directory)


def make_config(corpus, global_batch=1, **data):
    """Return a resolved config of a tiny model; `data` are keys of that section."""
    sections = {
        "run": {"dir": "x", "steps": 1},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2},
        "data": {
            "path": str(corpus.directory),
            "seq_len": SEQ_LEN,
            "global_batch": global_batch,
            "prefetch": 0,
            **data,
        },
    }
    return resolve_config(UnresolvedConfig.model_validate(sections), world_size=1, tokenizer_size=100)


def load_epoch(corpus, **data):
    """Return all windows of one epoch as one batch."""
    plan = build_fresh_plan(make_config(corpus=corpus, **data))
    stream = plan.streams[0]
    num_windows = stream.packed_windows.num_windows if stream.packed_windows else stream.order.num_windows
    config = make_config(corpus=corpus, global_batch=num_windows, **data)
    loader = build_loader(config, plan, ObjectiveVocabulary(100, EOT), dp_rank=0, dp_size=1, pin=False)
    (batch,) = loader.load_batches(0)
    return batch


@pytest.mark.parametrize("windows", ["document", "packed"])
def test_each_token_after_the_first_of_its_document_is_a_target_once(windows, tmp_path):
    corpus = write_corpus(tmp_path)
    batch = load_epoch(corpus, windows=windows)
    assert batch.inputs_BS.shape[1] == SEQ_LEN
    expected = [token for document in read_documents(corpus) for token in document[1:]]
    assert sorted(batch.targets_BS[batch.targets_BS != IGNORE_INDEX].tolist()) == sorted(expected)
    assert batch.num_valid_tokens == len(expected) == sum(DOCUMENT_SIZES) - len(DOCUMENT_SIZES)


def read_documents(corpus):
    """Return the token ids of each document."""
    documents = []
    for shard_index, shard in enumerate(corpus.shards):
        shard_end = int(corpus.shard_ends[shard_index])
        starts = corpus.get_document_offsets(shard_index).astype(int) + shard_end - shard.tokens
        for start, end in pairwise([*starts, shard_end]):
            documents.append(corpus.read(np.array([start]), end - start)[0].tolist())
    return documents


def test_packing_does_not_change_the_loss(tmp_path):
    """The loss of a token does not depend on the other documents in its window."""
    corpus = write_corpus(tmp_path)
    unpacked, packed = load_epoch(corpus, windows="document"), load_epoch(corpus, windows="packed")
    assert len(packed.inputs_BS) < len(unpacked.inputs_BS)
    model = build_model(make_config(corpus=corpus).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    unpacked_loss, packed_loss = (
        model(batch.inputs_BS, **batch.forward_arguments()).sum() for batch in (unpacked, packed)
    )
    torch.testing.assert_close(unpacked_loss, packed_loss, rtol=1e-5, atol=0)
    maskless_loss = model(packed.inputs_BS, targets_BS=packed.targets_BS).sum()
    assert not torch.isclose(maskless_loss, unpacked_loss, rtol=1e-4), "the test cannot detect a missing mask"


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_pack_best_fit_packs_all_sizes_tightly(sizes):
    capacity = 20
    bins = pack_best_fit(np.array(sizes), capacity)  # each bin: indices into `sizes`
    assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
    fills = [sum(sizes[index] for index in members) for members in bins]
    assert max(fills) <= capacity
    min_bins = -(-sum(sizes) // capacity)
    num_large = sum(size > capacity / 2 for size in sizes)  # no two of them fit into one bin
    # 11/9 of the optimum and 6/9 of a bin is the known bound of best-fit decreasing.
    assert len(bins) <= 11 / 9 * min_bins + 6 / 9 or len(bins) <= 1.5 * num_large + 1
    assert sum(fill <= capacity / 2 for fill in fills) <= 1, "two bins would fit into one"


@pytest.mark.parametrize("is_packed", [False, True])
def test_find_document_windows_inverts_get_spans(is_packed, tmp_path, monkeypatch):
    monkeypatch.setattr("dist_llm.data.packed_windows.GROUP_DOCUMENTS", 3)
    corpus = write_corpus(tmp_path)
    windows = PackedWindows(corpus, LENGTHS, is_packed)
    for window in range(windows.num_windows):
        for start, num_tokens in windows.get_spans(window):
            (document,) = corpus.iter_documents(start, num_tokens)
            assert document.start <= start < start + num_tokens <= document.end
            assert window in windows.find_document_windows(document)


def test_a_document_of_one_token_has_no_window(tmp_path):
    corpus = write_corpus(tmp_path, sizes=(1, 1))
    assert PackedWindows(corpus, LENGTHS, is_packed=False).num_windows == 0


PROMPT_LENGTHS = (1, 0, 5, 3, 12, 4, 1, 9, 0, 7, 0, 2)


@pytest.mark.parametrize("windows", ["stream", "document", "packed"])
def test_prompts_are_inputs_without_a_loss(windows, tmp_path):
    corpus = write_corpus(tmp_path, prompts=PROMPT_LENGTHS)
    batch = load_epoch(corpus, windows=windows)
    scored_prompts_batch = load_epoch(corpus, windows=windows, prompt_loss_weight=1)
    assert np.array_equal(batch.inputs_BS, scored_prompts_batch.inputs_BS)
    is_valid_BS = batch.targets_BS != IGNORE_INDEX
    assert np.array_equal(batch.targets_BS[is_valid_BS], scored_prompts_batch.targets_BS[is_valid_BS])
    completion_tokens = []
    for document, prompt_len in zip(read_documents(corpus), PROMPT_LENGTHS, strict=True):
        completion_tokens += document[max(prompt_len, 1) :]
    if windows == "stream":  # a stream also predicts the first token of a document without a prompt
        weights = corpus.compute_loss_weights(np.array([0]), corpus.num_tokens, prompt_loss_weight=0)[0]
        assert weights.tolist() == [
            float(position >= prompt_len)
            for size, prompt_len in zip(DOCUMENT_SIZES, PROMPT_LENGTHS, strict=True)
            for position in range(size)
        ]
        end = (corpus.num_tokens - 1) // SEQ_LEN * SEQ_LEN + 1  # the tail makes no window
        assert batch.num_valid_tokens == weights[1:end].sum()
    else:
        assert sorted(batch.targets_BS[is_valid_BS].tolist()) == sorted(completion_tokens)


@pytest.mark.parametrize("windows", ["stream", "document", "packed"])
def test_losses_of_prompts_are_weighted(windows, tmp_path):
    corpus = write_corpus(tmp_path, prompts=PROMPT_LENGTHS)
    without_prompts = load_epoch(corpus, windows=windows)
    with_prompts = load_epoch(corpus, windows=windows, prompt_loss_weight=1)
    batch = load_epoch(corpus, windows=windows, prompt_loss_weight=0.25)
    is_valid_BS = with_prompts.targets_BS != IGNORE_INDEX
    is_completion_BS = without_prompts.targets_BS != IGNORE_INDEX
    assert is_valid_BS.sum() > is_completion_BS.sum() > 0
    expected_BS = torch.where(is_completion_BS, 1.0, 0.25) * is_valid_BS
    assert torch.equal(batch.loss_weights_BS, expected_BS)
    assert batch.targets_BS.tolist() == with_prompts.targets_BS.tolist()
    assert batch.loss_denominator == expected_BS.sum()
    assert batch.num_valid_tokens == is_valid_BS.sum()


@pytest.mark.parametrize("prompt_loss_weight", [0.0, 0.5, 1.0])
def test_evaluation_weights_prompts_as_training_does(prompt_loss_weight, tmp_path):
    """This holds also if training uses windows of varying lengths."""
    corpus = write_corpus(tmp_path, prompts=PROMPT_LENGTHS)
    config = make_config(corpus=corpus, windows="document", prompt_loss_weight=prompt_loss_weight)
    objective = build_objective(config, ObjectiveVocabulary(100, EOT), has_prompt_weights(config.data, [corpus]))
    heldout = EvaluationSetup({"": corpus}, objective, micro_batch=4, prompt_loss_weight=prompt_loss_weight)
    batches = list(iter_heldout_batches(heldout, corpus, component_index=0, dp_rank=0, dp_size=1))
    num_scored = sum(batch.num_valid_tokens for batch in batches)
    num_read = (corpus.num_tokens - 1) // SEQ_LEN * SEQ_LEN
    weights = corpus.compute_loss_weights(np.array([0]), corpus.num_tokens, prompt_loss_weight)[0][1 : num_read + 1]
    assert (weights < 1).any() == (prompt_loss_weight < 1)
    assert num_scored == (weights > 0).sum()
    assert sum(batch.loss_denominator for batch in batches) == weights.sum()


def test_padding_is_not_a_target_and_not_attended_to(tmp_path):
    corpus = write_corpus(tmp_path)
    sections = make_config(corpus=corpus, windows="packed").model_dump()
    sections["model"] |= {"architecture": "encoder", "vocab_size": None}
    sections["objective"] = {"name": "masked", "mask_rate": 0.5}
    config = resolve_config(UnresolvedConfig.model_validate(sections), world_size=1, tokenizer_size=100)
    vocabulary = ObjectiveVocabulary(100, EOT)
    loader = build_loader(config, build_fresh_plan(config), vocabulary, dp_rank=0, dp_size=1, pin=False)
    for sample in range(20):
        (batch,) = loader.load_batches(sample)
        is_padding_BS = batch.inputs_BS == EOT
        assert (batch.targets_BS[is_padding_BS] == IGNORE_INDEX).all()
        documents_S = batch.mask.documents_BT[0]
        num_text_tokens = int((~is_padding_BS[0]).sum())
        if is_padding_BS[0, -1] and is_padding_BS[0, -2]:
            assert documents_S[-1] not in documents_S[:num_text_tokens].tolist(), "text attends to padding"
