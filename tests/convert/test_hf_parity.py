"""Our models and those of Hugging Face compute the same logits and losses from the same weights."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dist_llm.convert.hf_tensors import TensorMapping, tensor_mappings, to_native
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import AttentionMask, EncoderInput
from tests.convert.families import ENCODER_DECODERS, FAMILIES, SINGLE_STACKS, VOCAB, S, T, build_models

pytest.importorskip("transformers")


def make_random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_lengths_mask(rows: int, length: int) -> Tensor:
    """Return 1 for text and 0 for padding at the end; rows have all lengths from 1 to `length`."""
    ends = torch.linspace(1, length, rows).long()
    return (torch.arange(length) < ends[:, None]).long()


@pytest.mark.parametrize("family", SINGLE_STACKS)
@torch.no_grad()
def test_single_stack_logits_match_with_and_without_padding(family: str) -> None:
    hf, native, config = build_models(family)
    ids, mask = make_random_tokens(4, S), make_lengths_mask(4, S)
    causal = config.architecture == "decoder"
    full = native(ids, mask=AttentionMask(causal))
    torch.testing.assert_close(full, hf(input_ids=ids).logits, rtol=1e-4, atol=1e-4)

    padded = native(ids, mask=AttentionMask(causal, documents_BT=mask - 1))
    expected = hf(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)

    labels = torch.where(mask == 1, ids, IGNORE_INDEX)
    targets = labels if not causal else torch.cat((labels[:, 1:], labels.new_full((4, 1), IGNORE_INDEX)), dim=1)
    loss = native(ids, targets, AttentionMask(causal, documents_BT=mask - 1)).sum() / (targets != IGNORE_INDEX).sum()
    want_loss = hf(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, want_loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SINGLE_STACKS)
@torch.no_grad()
def test_single_stack_packed_documents_match_separate_ones(family: str) -> None:
    """Three documents in one row equal the Hugging Face model's logits of each document alone."""
    hf, native, config = build_models(family)
    edges = [0, 3, 4, S]
    ids = make_random_tokens(2, S)
    documents = torch.bucketize(torch.arange(S), torch.tensor(edges[1:-1]), right=True).expand(2, S)
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(edges)]).expand(2, S)
    mask = AttentionMask(config.architecture == "decoder", documents_BT=documents)
    packed = native(ids, mask=mask, positions_BS=positions)
    for start, end in pairwise(edges):
        alone = hf(input_ids=ids[:, start:end]).logits
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@torch.no_grad()
def test_encoder_decoder_logits_match(family: str) -> None:
    hf, native, _ = build_models(family)
    source, inputs, mask = make_random_tokens(4, T), make_random_tokens(4, S, 1), make_lengths_mask(4, T)
    actual = native(inputs, encoder_input=EncoderInput(source))
    expected = hf(input_ids=source, decoder_input_ids=inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    actual = native(inputs, encoder_input=EncoderInput(source, AttentionMask(False, documents_BT=mask - 1)))
    expected = hf(input_ids=source, attention_mask=mask, decoder_input_ids=inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    targets = make_random_tokens(4, S, 2)
    loss = native(
        inputs, targets_BS=targets, encoder_input=EncoderInput(source, AttentionMask(False, documents_BT=mask - 1))
    )
    want_loss = hf(input_ids=source, attention_mask=mask, decoder_input_ids=inputs, labels=targets).loss
    torch.testing.assert_close(loss.sum() / targets.numel(), want_loss, rtol=1e-4, atol=1e-4)

    cut_T, cut_S = 5, 7  # two documents, in both stacks
    documents_T = (torch.arange(T) >= cut_T).long().expand(4, T)
    documents_S = (torch.arange(S) >= cut_S).long().expand(4, S)
    positions_T = (torch.arange(T) - cut_T * documents_T[0]).expand(4, T)
    positions_S = (torch.arange(S) - cut_S * documents_S[0]).expand(4, S)
    packed = native(
        inputs,
        mask=AttentionMask(True, documents_BT=documents_S),
        positions_BS=positions_S,
        encoder_input=EncoderInput(source, AttentionMask(False, documents_BT=documents_T), positions_T),
    )
    first = hf(input_ids=source[:, :cut_T], decoder_input_ids=inputs[:, :cut_S]).logits
    second = hf(input_ids=source[:, cut_T:], decoder_input_ids=inputs[:, cut_S:]).logits
    torch.testing.assert_close(packed, torch.cat((first, second), dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_is_mapped_exactly_once(family: str) -> None:
    hf, native, config = build_models(family)
    table = tensor_mappings(family, config)
    names = dict(native.named_parameters())
    assert sorted(pair.native for pair in table) == sorted(names)
    used = {pair.hf for pair in table} | {pair.plus_row for pair in table if pair.plus_row}
    parameters = dict(hf.named_parameters(remove_duplicate=False))
    assert used <= parameters.keys()
    used_pointers = {parameters[name].data_ptr() for name in used}
    assert all(tensor.data_ptr() in used_pointers for tensor in parameters.values()), (
        "the other tensors are tied to used ones"
    )
    for pair in table:
        shape = names[pair.native].shape
        actual = to_native(pair, hf.state_dict()).shape
        assert actual == (shape if actual[0] != VOCAB else (VOCAB, *shape[1:])), (
            "shapes differ only in vocabulary padding"
        )


def test_wrong_rotary_pairing_is_detected() -> None:
    """With Meta's rotary pairing for Hugging Face's weights, as after a missing permutation, the logits differ."""
    hf, native, _ = build_models("llama")
    with torch.no_grad():
        for block in native.blocks.values():
            q = block.attention.q.weight
            q.copy_(q.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32))
    ids = make_random_tokens(2, S)
    assert (native(ids) - hf(input_ids=ids).logits).abs().max() > 1e-2


def test_fused_tensor_is_split_into_chunks() -> None:
    fused = torch.arange(24.0).view(2, 12)  # Conv1D stores inputs as rows
    chunk = to_native(TensorMapping("v", "x", transposed=True, chunk=2, num_chunks=3), {"x": fused})
    assert torch.equal(chunk, fused[:, 8:].t())
