"""Attention with sinks equals softmax over the keys and the sink, in outputs and gradients, by each kernel and mask."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dist_llm.models import attention
from dist_llm.models.attention import materialize_mask, scaled_dot_product
from dist_llm.models.attention_mask import CAUSAL, FULL
from dist_llm.models.softmax_attention import causal_mask, dense_attention, softmax_attention

B, T, H, K, E = 2, 80, 4, 2, 8
CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 13 + [1] * 67, [0] * 40 + [1] * 40])
BANDED, WIDE = replace(CAUSAL, window=7), replace(CAUSAL, window=60)
# name -> (mask, number of queries)
CASES = {
    "causal": (CAUSAL, T),
    "full": (FULL, T),
    "cached": (CAUSAL, 5),
    "one query": (CAUSAL, 1),
    "documents": (replace(CAUSAL, documents_BT=DOCUMENTS), T),
    "prefix": (replace(CAUSAL, prefix_B=torch.tensor([3, 50])), T),
    "bands": (BANDED, T),
    "bands of documents": (replace(BANDED, documents_BT=DOCUMENTS), T),
    "dense window": (WIDE, T),
    "context rank": (
        replace(CAUSAL, documents_BT=DOCUMENTS, query_positions_BS=torch.arange(20, 40).expand(B, 20), num_keys=T),
        20,
    ),
}


def draw_inputs(S, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (B, S, H, E), (B, T, K, E), (B, T, K, E), (H,)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def compute_reference(q, k, v, sinks, mask, bias_HST=None):
    S = q.shape[1]
    scores = torch.einsum("bshe,bthe->bhst", q, k.repeat_interleave(H // K, dim=2)) * E**-0.5
    b, rows, columns = (torch.arange(size) for size in (B, S, T))
    allowed = mask.allows(S, T, b[:, None, None], rows[None, :, None], columns).expand(B, S, T)
    scores = (scores if bias_HST is None else scores + bias_HST).masked_fill(~allowed[:, None], -torch.inf)
    weights = torch.cat((scores, sinks[:, None, None].expand(B, H, S, 1)), dim=-1).softmax(-1)[..., :-1]
    return torch.einsum("bhst,bthe->bshe", weights, v.repeat_interleave(H // K, dim=2))


def assert_equal_with_gradients(actual, expected, inputs, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    pairs = zip(*(torch.autograd.grad((out * weights).sum(), inputs) for out in (actual, expected)), strict=True)
    for grad, expected_grad in pairs:
        assert expected_grad.abs().max() > 1e-3
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=tolerance * float(expected_grad.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_sinks_equal_one_more_logit(name):
    mask, S = CASES[name]
    inputs = draw_inputs(S)
    q, k, v, sinks = inputs
    materialized = materialize_mask(mask, (B, S, T), CPU, dense=False, has_sinks=True)
    actual = scaled_dot_product(q, k, v, materialized, 0.0, sinks_H=sinks)
    assert_equal_with_gradients(actual, compute_reference(*inputs, mask), inputs)


def test_a_bias_with_gradients_has_sinks():
    """The bias of relative positions is learned, and the flash kernel has no gradient of its mask."""
    inputs, bias = draw_inputs(T), torch.randn(H, T, T, dtype=torch.float64, requires_grad=True)
    q, k, v, sinks = inputs
    materialized = materialize_mask(CAUSAL, (B, T, T), CPU, dense=False, bias_HST=bias, has_sinks=True)
    actual = scaled_dot_product(q, k, v, materialized, 0.0, sinks_H=sinks)
    assert_equal_with_gradients(actual, compute_reference(*inputs, CAUSAL, bias), [*inputs, bias])


def test_the_dense_kernel_has_the_same_sinks():
    """GPUs use it where FlexAttention cannot be used."""
    inputs = draw_inputs(T)
    heads = [x.transpose(1, 2) for x in inputs[:3]]
    actual = dense_attention(*heads, causal_mask(T, T, CPU), 0.0, None, sinks_H=inputs[3]).transpose(1, 2)
    assert_equal_with_gradients(actual, compute_reference(*inputs, CAUSAL), inputs)


def test_a_large_sink_leaves_nothing_and_a_small_sink_everything():
    q, k, v, _ = draw_inputs(T)
    out = scaled_dot_product(q, k, v, CAUSAL, 0.0, sinks_H=torch.tensor([1e4, -1e4, 1e4, -1e4]).double())
    assert not out[:, :, ::2].any()
    torch.testing.assert_close(out[:, :, 1::2], scaled_dot_product(q, k, v, CAUSAL, 0.0)[:, :, 1::2])


def test_autocast_computes_sinks_in_bf16():
    """Queries in fp32, such as those after a norm, are cast. The gradients are those of fp64, rounded."""
    inputs, exact = draw_inputs(T, torch.float32), draw_inputs(T, torch.float32)
    q, k, v, sinks = inputs
    with torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product(q, k.bfloat16(), v.bfloat16(), CAUSAL, 0.0, sinks_H=sinks)
    assert out.dtype == torch.bfloat16
    expected = compute_reference(*(x.double() for x in exact), CAUSAL).float()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.03)
    out.float().square().sum().backward()
    expected.square().sum().backward()
    for actual, reference in zip(inputs, exact, strict=True):
        error = (actual.grad - reference.grad).norm() / reference.grad.norm()
        assert error < 0.02


def test_dropout_drops_weights_of_keys_but_not_the_sink():
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, T, T)
    weights = softmax_attention(q, k, torch.eye(T)[None, None], None, 0.25, False, None, torch.zeros(1))
    assert 0.70 < (weights != 0).float().mean() < 0.80
    remaining = weights[weights != 0]
    torch.testing.assert_close(remaining, torch.full_like(remaining, 1 / (T + 1) / 0.75))


@pytest.mark.parametrize("name", ["causal", "documents", "bands"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_has_the_same_sinks(name, monkeypatch):
    """GPUs use it, compiled. On a CPU it has no backward, so here only the sinks have gradients."""
    mask, S = CASES[name]
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention)
    block_mask = create_block_mask(lambda b, h, q, k: mask.allows(S, T, b, q, k), B, None, S, T, device="cpu")
    q, k, v = (x.detach() for x in draw_inputs(S)[:3])
    sinks = draw_inputs(S)[3]
    actual = scaled_dot_product(q, k, v, replace(mask, materialized=block_mask), 0.0, sinks_H=sinks)
    assert_equal_with_gradients(actual, compute_reference(q, k, v, sinks, mask), [sinks], tolerance=1e-5)
