"""Attention masks allow the right inputs. Gradients show on which inputs a prediction depends."""

import pytest
import torch

from dist_llm.models.attention_mask import AttentionMask, EncoderInput

S, T = 8, 6
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [0] * 8, [0, 1, 1, 1, 1, 1, 1, 2], [0, 0, 1, 1, 0, 0, 1, 1]])
PREFIX = torch.tensor([4, 0, 8, 1])
POSITIONS = torch.arange(S)
CAUSAL_SS = POSITIONS[:, None] >= POSITIONS  # [S, S]: the keys that a causal query attends to
SAME_DOCUMENT = DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]
IN_PREFIX = PREFIX[:, None, None] > POSITIONS
ALL = torch.ones(4, S, S, dtype=torch.bool)
KINDS = {
    "causal": (AttentionMask(causal=True), CAUSAL_SS & ALL),
    "full": (AttentionMask(causal=False), ALL),
    "prefix": (AttentionMask(causal=True, prefix_B=PREFIX), CAUSAL_SS | IN_PREFIX),
    "causal, documents": (AttentionMask(causal=True, documents_BT=DOCUMENTS), CAUSAL_SS & SAME_DOCUMENT),
    "full, documents": (AttentionMask(causal=False, documents_BT=DOCUMENTS), SAME_DOCUMENT),
    "prefix, documents": (
        AttentionMask(causal=True, prefix_B=PREFIX, documents_BT=DOCUMENTS),
        (CAUSAL_SS | IN_PREFIX) & SAME_DOCUMENT,
    ),
}


def first_rows(mask, count):
    """Return the mask of the first `count` sequences of a batch."""
    tensors = {name: value[:count] for name, value in vars(mask).items() if isinstance(value, torch.Tensor)}
    return AttentionMask(causal=mask.causal, **tensors)


def find_dependence(model, output, embedding, inputs):
    """Return [B, S, inputs]: whether the logits at a position depend on an input. All input ids must differ."""
    dependence = torch.zeros(*output.shape[:2], inputs.shape[1], dtype=torch.bool)
    for row in range(len(output)):
        for position in range(output.shape[1]):
            (gradient,) = torch.autograd.grad(
                output[row, position].square().sum(), embedding.weight, retain_graph=True, materialize_grads=True
            )
            dependence[row, position] = gradient[inputs[row]].abs().sum(-1) > 0
    return dependence


def make_ids(count, length, first=0):
    """All ids are different, so a row of the embedding gradient belongs to one input."""
    return torch.arange(first, first + count * length).view(count, length)


@pytest.mark.parametrize("rows_B", [1, 4])
@pytest.mark.parametrize("positions", ["rope", "relative"])
@pytest.mark.parametrize("kind", KINDS)
def test_prediction_depends_only_on_allowed_tokens(kind, positions, rows_B, build):
    mask, expected = KINDS[kind]
    model = build(vocab_size=40, positions=positions, n_layers=1)
    inputs = make_ids(rows_B, S)
    output = model(inputs, mask=first_rows(mask, rows_B))
    assert torch.equal(find_dependence(model, output, model.embed.tokens, inputs), expected[:rows_B])


@pytest.mark.parametrize("rows_B", [1, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_cross_attention_is_limited_to_the_document(documents, rows_B, build):
    model = build(vocab_size=80, architecture="encoder_decoder", n_layers=1, n_encoder_layers=1)
    source_documents = (torch.arange(T) >= 2).long().expand(rows_B, T)
    target_documents = (POSITIONS >= 5).long().expand(rows_B, S)
    inputs, source = make_ids(rows_B, S), make_ids(rows_B, T, first=40)
    mask = AttentionMask(causal=True, documents_BT=target_documents if documents else None)
    encoder_input = EncoderInput(
        source, AttentionMask(causal=False, documents_BT=source_documents if documents else None)
    )
    output = model(inputs, mask=mask, encoder_input=encoder_input)
    same = target_documents[:, :, None] == target_documents[:, None, :] if documents else ALL[:rows_B]
    assert torch.equal(find_dependence(model, output, model.embed.tokens, inputs), CAUSAL_SS & same)
    across = target_documents[:, :, None] == source_documents[:, None, :]
    expected = across if documents else torch.ones(rows_B, S, T, dtype=torch.bool)
    assert torch.equal(find_dependence(model, output, model.embed.tokens, source), expected)


def test_no_token_attends_to_encoder_padding(build):
    model = build(vocab_size=80, architecture="encoder_decoder", n_layers=1, n_encoder_layers=1)
    inputs, source = make_ids(1, S), make_ids(1, T, first=40)
    documents = torch.tensor([[0, 0, 0, 0, -1, -1]])
    output = model(inputs, encoder_input=make_encoder_input(source, documents))
    dependence = find_dependence(model, output, model.embed.tokens, source)
    assert torch.equal(dependence, (documents == 0)[:, None].expand(1, S, T))


def make_encoder_input(tokens, documents):
    """Return an encoder input whose tokens [B, T] attend only to their own document."""
    return EncoderInput(tokens, AttentionMask(causal=False, documents_BT=documents))
