"""A packed row of documents gives each document the logits and gradients that it has alone."""

import pytest
import torch
import torch.nn.functional as F

from dist_llm.models.attention_mask import AttentionMask
from dist_llm.models.banded_attention import can_use_bands

LENGTHS = [[5, 1, 9, 5], [12, 2, 2, 4]]  # documents of each row
S, VOCAB = 20, 40
DOCUMENTS = torch.stack([torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)) for lengths in LENGTHS])
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
MASK = AttentionMask(True, documents_BT=DOCUMENTS)
KINDS = {
    "layers": ["near", "far", "unrotated"],
    "n_layers": 4,
    "kinds": {
        "near": {"window": 3},
        "far": {"window": 11, "rope_scaling": {"name": "yarn", "factor": 4.0, "original_max_seq_len": 8}},
        "unrotated": {"positions": "none"},
    },
}
MODELS = {
    "pre": {},
    "sandwich": {"norm_order": "sandwich", "norm_weight": "plus_one"},
    "reordered": {"norm_order": "reordered", "qk_norm": "all"},
    "parallel, one norm": {"parallel_residual": "one_norm", "norm": "layernorm", "rotary_fraction": 0.5},
    "parallel, two norms": {"parallel_residual": "two_norms", "norm": "layernorm", "norm_weight": "none"},
}


@pytest.fixture(params=MODELS)
def model(request, build):
    """An fp64 model of each of MODELS with layers of several kinds."""
    return build(vocab_size=VOCAB, max_seq_len=32, n_kv_heads=2, **KINDS, **MODELS[request.param]).double()


TOKENS = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)).view(2, S)  # all ids are different
TARGETS = TOKENS.roll(1, dims=1)


def iter_documents():
    """Yield (row, slice of its tokens) of each document."""
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            yield row, slice(start, start + length)
            start += length


def sum_losses(logits, targets):
    """Return the summed cross-entropy."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


def test_the_row_uses_bands_and_a_dense_mask():
    assert can_use_bands(AttentionMask(True, documents_BT=DOCUMENTS, window=3), S, S)
    assert not can_use_bands(AttentionMask(True, documents_BT=DOCUMENTS, window=11), S, S)


def test_a_packed_row_gives_the_logits_and_gradients_of_its_documents_alone(model):
    parameters = dict(model.named_parameters())
    logits = model(TOKENS, mask=MASK, positions_BS=POSITIONS)
    packed_grads = torch.autograd.grad(sum_losses(logits, TARGETS), list(parameters.values()))
    loss = torch.zeros((), dtype=torch.float64)
    for row, tokens in iter_documents():
        document_logits = model(TOKENS[row : row + 1, tokens])
        torch.testing.assert_close(logits[row, tokens], document_logits[0], rtol=1e-11, atol=1e-11)
        loss = loss + sum_losses(document_logits, TARGETS[row : row + 1, tokens])
    grads = torch.autograd.grad(loss, list(parameters.values()))
    for name, packed_grad, grad in zip(parameters, packed_grads, grads, strict=True):
        torch.testing.assert_close(packed_grad, grad, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text)


def test_positions_that_continue_over_documents_give_the_same_logits(model):
    """Attention depends on distances alone. RoPE computes its angles in fp32."""
    logits = model(TOKENS, mask=MASK)
    torch.testing.assert_close(logits, model(TOKENS, mask=MASK, positions_BS=POSITIONS), rtol=1e-5, atol=1e-5)


def test_the_loss_of_a_document_has_no_gradient_at_the_embeddings_of_the_rest(model):
    embeddings = []
    model.embed.register_forward_hook(lambda module, inputs, output: embeddings.append(output))
    logits = model(TOKENS, mask=MASK, positions_BS=POSITIONS)
    for row, tokens in iter_documents():
        loss = sum_losses(logits[row, tokens], TARGETS[row, tokens])
        (grad_BSD,) = torch.autograd.grad(loss, embeddings, retain_graph=True)
        in_document = torch.zeros(2, S, dtype=torch.bool)
        in_document[row, tokens] = True
        assert torch.equal(grad_BSD.ne(0).any(-1), in_document)
