"""Our models and those of Hugging Face compute the same logits and losses from the same weights.

S is the sequence length of the decoder and T that of the encoder.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_llm.convert.hf_import import OLDER_NAMES
from dist_llm.convert.hf_tensor_mapping import NATIVE_ONLY, TensorMapping, to_native
from dist_llm.convert.hf_tensors import list_tensor_mappings
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import AttentionMask, EncoderInput
from dist_llm.param_spec import iter_weights
from tests.convert.families import ENCODER_DECODERS, FAMILIES, SINGLE_STACKS, VOCAB, S, T, build_models, to_hub_tensors

pytest.importorskip("transformers")


def make_random_tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Return random token ids [batch, length] without special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def make_padding_mask(batch: int, length: int) -> Tensor:
    """Return 1 for text and 0 for padding at the end. The text lengths rise from 1 to `length`."""
    ends = torch.linspace(1, length, batch).long()
    return (torch.arange(length) < ends[:, None]).long()


@pytest.mark.parametrize("family", SINGLE_STACKS)
@torch.no_grad()
def test_single_stack_logits_match_with_and_without_padding(family: str) -> None:
    hf_model, native_model, config = build_models(family)
    ids, mask = make_random_tokens(4, S), make_padding_mask(4, S)
    is_causal = config.architecture == "decoder"
    unpadded = native_model(ids, mask=AttentionMask(causal=is_causal))
    torch.testing.assert_close(unpadded, hf_model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)

    padded = native_model(ids, mask=AttentionMask(causal=is_causal, documents_BT=mask - 1))
    expected = hf_model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-4)

    labels = torch.where(mask == 1, ids, IGNORE_INDEX)
    targets = labels if not is_causal else torch.cat((labels[:, 1:], labels.new_full((4, 1), IGNORE_INDEX)), dim=1)
    loss = (
        native_model(ids, targets, AttentionMask(causal=is_causal, documents_BT=mask - 1)).sum()
        / (targets != IGNORE_INDEX).sum()
    )
    expected_loss = hf_model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SINGLE_STACKS)
@torch.no_grad()
def test_packed_documents_give_the_logits_of_separate_documents(family: str) -> None:
    """We pack three documents into a sequence. The Hugging Face model gets each document in its own sequence."""
    hf_model, native_model, config = build_models(family)
    edges = [0, 3, 4, S]
    ids = make_random_tokens(2, S)
    documents = torch.bucketize(torch.arange(S), torch.tensor(edges[1:-1]), right=True).expand(2, S)
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(edges)]).expand(2, S)
    mask = AttentionMask(causal=config.architecture == "decoder", documents_BT=documents)
    packed = native_model(ids, mask=mask, positions_BS=positions)
    for start, end in pairwise(edges):
        alone = hf_model(input_ids=ids[:, start:end]).logits
        torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@torch.no_grad()
def test_encoder_decoder_logits_match(family: str) -> None:
    hf_model, native_model, _ = build_models(family)
    source, inputs, mask = make_random_tokens(4, T), make_random_tokens(4, S, 1), make_padding_mask(4, T)
    actual = native_model(inputs, encoder_input=EncoderInput(source))
    expected = hf_model(input_ids=source, decoder_input_ids=inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    actual = native_model(
        inputs, encoder_input=EncoderInput(source, AttentionMask(causal=False, documents_BT=mask - 1))
    )
    expected = hf_model(input_ids=source, attention_mask=mask, decoder_input_ids=inputs).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    targets = make_random_tokens(4, S, 2)
    loss = native_model(
        inputs,
        targets_BS=targets,
        encoder_input=EncoderInput(source, AttentionMask(causal=False, documents_BT=mask - 1)),
    )
    expected_loss = hf_model(input_ids=source, attention_mask=mask, decoder_input_ids=inputs, labels=targets).loss
    torch.testing.assert_close(loss.sum() / targets.numel(), expected_loss, rtol=1e-4, atol=1e-4)

    cut_T, cut_S = 5, 7  # two documents, in both stacks
    documents_T = (torch.arange(T) >= cut_T).long().expand(4, T)
    documents_S = (torch.arange(S) >= cut_S).long().expand(4, S)
    positions_T = (torch.arange(T) - cut_T * documents_T[0]).expand(4, T)
    positions_S = (torch.arange(S) - cut_S * documents_S[0]).expand(4, S)
    packed = native_model(
        inputs,
        mask=AttentionMask(causal=True, documents_BT=documents_S),
        positions_BS=positions_S,
        encoder_input=EncoderInput(source, AttentionMask(causal=False, documents_BT=documents_T), positions_T),
    )
    first_logits = hf_model(input_ids=source[:, :cut_T], decoder_input_ids=inputs[:, :cut_S]).logits
    second_logits = hf_model(input_ids=source[:, cut_T:], decoder_input_ids=inputs[:, cut_S:]).logits
    torch.testing.assert_close(packed, torch.cat((first_logits, second_logits), dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_tensor_is_mapped_exactly_once(family: str) -> None:
    hf_model, native_model, config = build_models(family)
    mappings = list_tensor_mappings(family, config)
    names = {name: tensor for name, tensor in iter_weights(native_model) if not NATIVE_ONLY.fullmatch(name)}
    expected = [
        (name, expert)
        for name, tensor in names.items()
        for expert in (
            range(len(tensor))
            if any(mapping.native_name == name and mapping.expert == 1 for mapping in mappings)
            else [None]
        )
    ]
    assert sorted([(mapping.native_name, mapping.expert) for mapping in mappings], key=str) == sorted(expected, key=str)
    used = {mapping.hf_name for mapping in mappings} | {mapping.plus_row for mapping in mappings if mapping.plus_row}
    parameters = {
        OLDER_NAMES.get(name, name) if family == "gpt_neox" else name: parameter
        for name, parameter in to_hub_tensors(hf_model, list_hf_tensors(hf_model)).items()
    }
    assert used <= parameters.keys()
    used_pointers = {parameters[name].data_ptr() for name in used}
    assert all(tensor.data_ptr() in used_pointers for tensor in parameters.values()), (
        "a tensor is neither mapped nor tied to a mapped tensor"
    )
    for mapping in mappings:
        shape = names[mapping.native_name].shape
        shape = shape if mapping.expert is None else shape[1:]
        actual = to_native(mapping, parameters).shape
        assert actual == (shape if actual[0] != VOCAB else (VOCAB, *shape[1:])), (
            "shapes differ in more than the padding of the vocabulary"
        )


def list_hf_tensors(hf_model: Any) -> dict[str, Tensor]:
    """Return all parameters, also shared ones under each of their names, and the biases for the choice of experts."""
    biases = {name: buffer for name, buffer in hf_model.named_buffers() if name.endswith("e_score_correction_bias")}
    return {**dict(hf_model.named_parameters(remove_duplicate=False)), **biases}


def test_wrong_rotary_pairing_is_detected() -> None:
    """The logits differ if the weights have the rotary layout of Meta, which Hugging Face permutes."""
    hf_model, native_model, _ = build_models("llama")
    with torch.no_grad():
        for block in native_model.blocks.values():
            q = block.attention.q.weight
            q.copy_(q.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32))
    ids = make_random_tokens(2, S)
    assert (native_model(ids) - hf_model(input_ids=ids).logits).abs().max() > 1e-2


def test_fused_tensor_is_split_into_chunks() -> None:
    fused = torch.arange(24.0).view(2, 12)  # Conv1D stores inputs as rows
    chunk = to_native(TensorMapping("v", "x", transposed=True, chunk=2, num_chunks=3), {"x": fused})
    assert torch.equal(chunk, fused[:, 8:].t())
