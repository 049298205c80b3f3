"""Who sees whom, proved by gradients: a prediction depends on what it may see, and on nothing else."""

import pytest
import torch

from dist_llm.models.attention_mask import AttentionMask, EncoderInput

S, T = 8, 6
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2], [0] * 8, [0, 1, 1, 1, 1, 1, 1, 2], [0, 0, 1, 1, 0, 0, 1, 1]])
PREFIX = torch.tensor([4, 0, 8, 1])
places = torch.arange(S)
AFTER = places[:, None] >= places  # [S, S]: what a causal query may see
SAME = DOCUMENTS[:, :, None] == DOCUMENTS[:, None, :]
WITHIN = places < PREFIX[:, None, None]
ALL = torch.ones(4, S, S, dtype=torch.bool)
KINDS = {
    "causal": (AttentionMask(True), AFTER & ALL),
    "full": (AttentionMask(False), ALL),
    "prefix": (AttentionMask(True, prefix_B=PREFIX), AFTER | WITHIN),
    "causal, documents": (AttentionMask(True, documents_BT=DOCUMENTS), AFTER & SAME),
    "full, documents": (AttentionMask(False, documents_BT=DOCUMENTS), SAME),
    "prefix, documents": (AttentionMask(True, prefix_B=PREFIX, documents_BT=DOCUMENTS), (AFTER | WITHIN) & SAME),
}


def rows(mask, count):
    cut = {name: value[:count] for name, value in vars(mask).items() if isinstance(value, torch.Tensor)}
    return AttentionMask(mask.causal, **cut)


def reached(model, output, embedding, inputs):
    """[B, S, inputs]: whether the logits at a place depend on an input, whose ids are all different."""
    found = torch.zeros(*output.shape[:2], inputs.shape[1], dtype=torch.bool)
    for row in range(len(output)):
        for place in range(output.shape[1]):
            (gradient,) = torch.autograd.grad(
                output[row, place].square().sum(), embedding.weight, retain_graph=True, materialize_grads=True
            )
            found[row, place] = gradient[inputs[row]].abs().sum(-1) > 0
    return found


def ids(count, length, first=0):
    """Every id once, so that a gradient says whose it is."""
    return torch.arange(first, first + count * length).view(count, length)


@pytest.mark.parametrize("rows_B", [1, 4])
@pytest.mark.parametrize("positions", ["rope", "relative"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_depends_on_what_it_sees(kind, positions, rows_B, build):
    mask, want = KINDS[kind]
    model = build(vocab_size=40, positions=positions, n_layers=1)
    inputs = ids(rows_B, S)
    output = model(inputs, mask=rows(mask, rows_B))
    assert torch.equal(reached(model, output, model.embed.tokens, inputs), want[:rows_B])


@pytest.mark.parametrize("rows_B", [1, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_a_decoder_sees_the_whole_source_of_its_document(documents, rows_B, build):
    model = build(vocab_size=80, architecture="encoder_decoder", n_layers=1, n_encoder_layers=1)
    source_documents = (torch.arange(T) >= 2).long().expand(rows_B, T)
    target_documents = (places >= 5).long().expand(rows_B, S)
    inputs, source = ids(rows_B, S), ids(rows_B, T, first=40)
    mask = AttentionMask(True, documents_BT=target_documents if documents else None)
    read = EncoderInput(source, AttentionMask(False, documents_BT=source_documents if documents else None))
    output = model(inputs, mask=mask, encoder_input=read)
    same = target_documents[:, :, None] == target_documents[:, None, :] if documents else ALL[:rows_B]
    assert torch.equal(reached(model, output, model.embed.tokens, inputs), AFTER & same)
    across = target_documents[:, :, None] == source_documents[:, None, :]
    want = across if documents else torch.ones(rows_B, S, T, dtype=torch.bool)
    assert torch.equal(reached(model, output, model.embed.tokens, source), want)


def test_padding_of_a_source_is_seen_by_no_text(build):
    model = build(vocab_size=80, architecture="encoder_decoder", n_layers=1, n_encoder_layers=1)
    inputs, source = ids(1, S), ids(1, T, first=40)
    documents = torch.tensor([[0, 0, 0, 0, -1, -1]])
    output = model(inputs, encoder_input=source_of(source, documents))
    found = reached(model, output, model.embed.tokens, source)
    assert torch.equal(found, (documents == 0)[:, None].expand(1, S, T))


def source_of(tokens, documents):
    return EncoderInput(tokens, AttentionMask(False, documents_BT=documents))
