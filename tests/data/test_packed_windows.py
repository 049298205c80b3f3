"""Windows that do not cross documents: each token except a document's first is a target once.

Packing does not change a loss.
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
from dist_llm.data.shard import Manifest, ShardWriter
from dist_llm.data.streams import masks_prompts
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.build_model import build_model
from dist_llm.objectives.build_objective import build_objective
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary
from dist_llm.training.evaluate import Heldout, heldout_batches

SEQ, EOT = 8, 99
SIZES = (2, 3, 9, 10, 17, 5, 2, 30, 4, 8, 1, 6)


def write_corpus(directory, sizes=SIZES, prompts=None):
    """Write documents of these sizes that end with EOT. Other tokens count up. `prompts` are the prompt lengths."""
    writer = ShardWriter(directory, "train", "uint16", 40, has_prompts=prompts is not None)
    next_token = 0
    for number, size in enumerate(sizes):
        ids = np.append((np.arange(size - 1) + next_token) % EOT, EOT)
        next_token += size - 1
        prompt_lengths = None if prompts is None else np.array([prompts[number]])
        writer.extend(ids, np.array([size]), np.array([size - 1]), prompt_lengths)
    shards = {"train": writer.close(), "heldout": ()}
    Manifest("uint16", 100, "none", ("count",), shards, prompts=prompts is not None).save(directory)
    return Corpus(directory)


def make_config(corpus, steps_of=1, **data):
    raw = {
        "run": {"dir": "x", "steps": 1},
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2},
        "data": {"path": str(corpus.directory), "seq_len": SEQ, "global_batch": steps_of, "prefetch": 0, **data},
    }
    return resolve_config(UnresolvedConfig.model_validate(raw), 1, 100)


def load_epoch(corpus, **data):
    """Return all windows of one epoch as one batch."""
    plan = build_fresh_plan(make_config(corpus, **data))
    stream = plan.streams[0]
    count = stream.packed_windows.num_windows if stream.packed_windows else stream.order.num_windows
    config = make_config(corpus, count, **data)
    (batch,) = build_loader(config, plan, ObjectiveVocabulary(100, EOT), 0, 1, pin=False).load_batches(0)
    return batch


@pytest.mark.parametrize("windows", ["document", "packed"])
def test_each_token_except_a_documents_first_is_a_target_once(windows, tmp_path):
    corpus = write_corpus(tmp_path)
    batch = load_epoch(corpus, windows=windows)
    assert batch.inputs_BS.shape[1] == SEQ
    expected = [token for d in read_documents(corpus) for token in d[1:]]
    assert sorted(batch.targets_BS[batch.targets_BS != IGNORE_INDEX].tolist()) == sorted(expected)
    assert batch.num_valid_tokens == len(expected) == sum(SIZES) - len(SIZES)


def read_documents(corpus):
    token_lists = []
    for shard in range(len(corpus.shards)):
        start = int(corpus.shard_ends[shard]) - corpus.shards[shard].tokens
        edges = [*(corpus.get_document_offsets(shard).astype(int) + start), int(corpus.shard_ends[shard])]
        token_lists += [corpus.read(np.array([a]), b - a)[0].tolist() for a, b in pairwise(edges)]
    return token_lists


def test_packing_gives_fewer_windows_and_equal_losses(tmp_path):
    """The law of packing: a token's loss does not depend on the other documents in the window."""
    corpus = write_corpus(tmp_path)
    alone, packed = load_epoch(corpus, windows="document"), load_epoch(corpus, windows="packed")
    assert len(packed.inputs_BS) < len(alone.inputs_BS)
    model = build_model(make_config(corpus).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    losses = [model(b.inputs_BS, **b.forward_arguments()).sum() for b in (alone, packed)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    packed_blind = model(packed.inputs_BS, targets_BS=packed.targets_BS).sum()
    assert not torch.isclose(packed_blind, losses[0], rtol=1e-4), (
        "without the mask the loss differs, so the test can fail"
    )


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_pack_best_fit_packs_all_sizes_tightly(sizes):
    bins = pack_best_fit(np.array(sizes), 20)
    assert sorted(n for members in bins for n in members) == list(range(len(sizes)))
    assert all(sum(sizes[n] for n in members) <= 20 for members in bins)
    assert len(bins) <= 11 / 9 * -(-sum(sizes) // 20) + 6 / 9 or len(bins) <= 1.5 * sum(size > 10 for size in sizes) + 1
    assert sum(sum(sizes[n] for n in members) <= 10 for members in bins) <= 1, "two half-empty bins would be one"


@pytest.mark.parametrize("packed", [False, True])
def test_find_document_windows_inverts_get_spans(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("dist_llm.data.packed_windows.GROUP_DOCUMENTS", 3)
    corpus = write_corpus(tmp_path)
    windows = PackedWindows(corpus, SequenceLengths(SEQ + 1, SEQ, SEQ), packed)
    for window in range(windows.num_windows):
        for start, length in windows.get_spans(window):
            (document,) = corpus.iter_documents(start, length)
            assert document.start <= start < start + length <= document.end
            assert window in windows.find_document_windows(document)


def test_a_document_of_one_token_has_no_window(tmp_path):
    assert (
        PackedWindows(write_corpus(tmp_path, (1, 1)), SequenceLengths(SEQ + 1, SEQ, SEQ), is_packed=False).num_windows
        == 0
    )


PROMPTS = (1, 0, 5, 3, 12, 4, 1, 9, 0, 7, 0, 2)


@pytest.mark.parametrize("windows", ["stream", "document", "packed"])
def test_prompts_are_inputs_without_a_loss(windows, tmp_path):
    corpus = write_corpus(tmp_path, prompts=PROMPTS)
    batch = load_epoch(corpus, windows=windows)
    with_prompts = load_epoch(corpus, windows=windows, score_prompts=True)
    assert np.array_equal(batch.inputs_BS, with_prompts.inputs_BS)
    is_target = batch.targets_BS != IGNORE_INDEX
    assert np.array_equal(batch.targets_BS[is_target], with_prompts.targets_BS[is_target])
    completions = [t for d, p in zip(read_documents(corpus), PROMPTS, strict=True) for t in d[max(p, 1) :]]
    if windows == "stream":  # a stream also predicts the first token of a document without a prompt
        loss_mask = corpus.compute_loss_mask(np.array([0]), corpus.num_tokens)[0]
        assert loss_mask.tolist() == [n >= p for size, p in zip(SIZES, PROMPTS, strict=True) for n in range(size)]
        last = (corpus.num_tokens - 1) // SEQ * SEQ + 1  # the tail makes no window
        assert batch.num_valid_tokens == loss_mask[1:last].sum()
    else:
        assert sorted(batch.targets_BS[is_target].tolist()) == sorted(completions)


@pytest.mark.parametrize("score_prompts", [False, True])
def test_evaluation_scores_prompts_if_training_does(score_prompts, tmp_path):
    """Also if training uses windows of varying lengths."""
    corpus = write_corpus(tmp_path, prompts=PROMPTS)
    config = make_config(corpus, windows="document", score_prompts=score_prompts)
    prompts = masks_prompts(config.data, [corpus])
    objective = build_objective(config, ObjectiveVocabulary(100, EOT), prompts)
    heldout = Heldout({"": corpus}, objective, 4, score_prompts=score_prompts)
    loss_mask = sum(batch.num_valid_tokens for batch in heldout_batches(heldout, corpus, 0, 0, 1))
    num_read = (corpus.num_tokens - 1) // SEQ * SEQ
    num_prompt_tokens = (~corpus.compute_loss_mask(np.array([0]), corpus.num_tokens)[0])[1 : num_read + 1].sum()
    assert num_prompt_tokens > 0
    assert loss_mask == (num_read if score_prompts else num_read - num_prompt_tokens)


def test_padding_is_never_masked_or_attended_to(tmp_path):
    corpus = write_corpus(tmp_path)
    raw = make_config(corpus, windows="packed").model_dump()
    raw["model"] |= {"architecture": "encoder", "vocab_size": None}
    raw["objective"] = {"name": "masked", "mask_rate": 0.5}
    config = resolve_config(UnresolvedConfig.model_validate(raw), 1, 100)
    loader = build_loader(config, build_fresh_plan(config), ObjectiveVocabulary(100, EOT), 0, 1, pin=False)
    for first in range(20):
        (batch,) = loader.load_batches(first)
        padding = batch.inputs_BS == EOT
        assert (batch.targets_BS[padding] == IGNORE_INDEX).all()
        documents_S = batch.mask.documents_BT[0]
        real = int((~padding[0]).sum())
        if padding[0, -1] and padding[0, -2]:
            assert documents_S[-1] not in documents_S[:real].tolist(), "text does not attend to padding"
