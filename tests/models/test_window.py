"""Sliding windows: blocks of queries, dense masks and the rolling cache compute the same attention."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.models.attention import materialize_mask, scaled_dot_product
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.models.banded_attention import banded_attention, can_use_bands
from dist_llm.models.kv_cache import KVCache

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0] * 13 + [1] * 40 + [2] * 147, [0] * 100 + [1] * 100])


def draw(shape, seed):
    """Return random fp64 values of this shape that require gradients."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def attend_densely(q, k, v, mask):
    """Attention over all keys, where masked scores are minus infinity."""
    (S, T), groups = (q.shape[1], k.shape[1]), q.shape[2] // k.shape[2]
    scores = torch.einsum("bshe,bthe->bhst", q, k.repeat_interleave(groups, dim=2)) * q.shape[-1] ** -0.5
    b, rows, columns = (torch.arange(size) for size in (len(q), S, T))
    allowed = mask.allows(S, T, b[:, None, None], rows[None, :, None], columns).expand(len(q), S, T)
    probabilities = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthe->bshe", probabilities, v.repeat_interleave(groups, dim=2))


@pytest.mark.parametrize("with_documents", [False, True], ids=["", "documents"])
@pytest.mark.parametrize("window", [1, 7, 50])
@pytest.mark.parametrize("length", [64, 65, 200])
def test_bands_equal_a_dense_mask(length, window, with_documents):
    documents = DOCUMENTS[:, :length] if with_documents else None
    mask = replace(CAUSAL, window=window, documents_BT=documents)
    assert_bands_equal_a_dense_mask([draw((2, length, heads, 8), seed) for seed, heads in enumerate((4, 2, 2))], mask)


@settings(max_examples=30)
@given(data=st.data())
def test_bands_equal_a_dense_mask_for_random_shapes(data):
    """The window may exceed the sequence, and the documents of each row are random."""
    length, batch = data.draw(st.integers(1, 150), "S"), data.draw(st.integers(1, 3), "B")
    kv_heads, groups = data.draw(st.integers(1, 2), "K"), data.draw(st.integers(1, 3), "H / K")
    window, documents = data.draw(st.integers(1, length + 5), "window"), None
    if data.draw(st.booleans(), "has documents"):
        starts = st.lists(st.integers(0, length - 1), max_size=4)
        documents = torch.zeros(batch, length, dtype=torch.int64)
        for row in documents:
            for start in data.draw(starts, "starts of documents"):
                row[start:] += 1
    heads = (kv_heads * groups, kv_heads, kv_heads)
    inputs = [draw((batch, length, num, 4), seed) for seed, num in enumerate(heads)]
    assert_bands_equal_a_dense_mask(inputs, replace(CAUSAL, window=window, documents_BT=documents))


def assert_bands_equal_a_dense_mask(inputs, mask):
    """Compare outputs and gradients."""
    q, k, v = (tensor.transpose(1, 2) for tensor in inputs)
    actual = banded_attention(q, k, v, mask, 0.0, None).transpose(1, 2)
    expected = attend_densely(*inputs, mask)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = draw(actual.shape, 9).detach()
    for grad, expected_grad in zip(
        torch.autograd.grad((actual * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-12)


def test_the_kernel_of_a_mask_is_chosen_by_its_size():
    narrow, wide = replace(CAUSAL, window=100), replace(CAUSAL, window=101)
    assert can_use_bands(narrow, 200, 200)
    assert materialize_mask(narrow, (1, 200, 200), CPU, dense=False).materialized is None
    assert not can_use_bands(wide, 200, 200)
    assert materialize_mask(wide, (1, 200, 200), CPU, dense=False).materialized is not None
    assert not can_use_bands(narrow, 1, 200), "generation has one query"
    assert not can_use_bands(replace(narrow, prefix_B=torch.tensor([3])), 200, 200)
    unlimited = materialize_mask(replace(CAUSAL, window=200), (1, 200, 200), CPU, dense=False)
    assert unlimited == CAUSAL, "no key is further away than the window, so the fast path of the kernels is used"


@pytest.mark.parametrize("window", [60, 61, 120])
def test_attention_equals_a_dense_mask_with_each_kernel(window):
    """A window of 60 uses bands, 61 a boolean mask, and 120 no mask, because the sequence is not longer."""
    inputs = [draw((2, 120, 2, 8), seed) for seed in range(3)]
    mask = replace(CAUSAL, window=window)
    actual = scaled_dot_product(*inputs, materialize_mask(mask, (2, 120, 120), CPU, dense=False), 0.0)
    torch.testing.assert_close(actual, attend_densely(*inputs, mask), rtol=1e-12, atol=1e-12)


def test_capped_scores_equal_the_definition():
    q, k, v = (draw((1, 6, 2, 8), seed) for seed in range(3))
    scores = torch.einsum("bshe,bthe->bhst", 5 * q, k) * 8**-0.5
    scores = (2.0 * torch.tanh(scores / 2.0)).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bhst,bthe->bshe", scores.softmax(-1), v)
    actual = scaled_dot_product(5 * q, k, v, CAUSAL, 0.0, cap=2.0)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert (actual - scaled_dot_product(5 * q, k, v, CAUSAL, 0.0)).abs().max() > 1e-2


KINDS = {"layers": ["near", "full"], "kinds": {"near": {"window": 4}, "full": {"positions": "none"}}}


@pytest.mark.parametrize("lengths", [[1] * 12, [5, 1, 4, 2], [12]], ids=str)
def test_a_rolling_cache_gives_the_logits_of_the_full_sequence(lengths, build):
    """The first layer has the window, so its cache is shorter than the sequence."""
    model = build(**KINDS).double()
    tokens = torch.arange(12)[None] * 7 % 20
    expected, cache = model(tokens), KVCache()
    logits, start = [], 0
    for length in lengths:
        logits.append(model(tokens[:, start : start + length], cache=cache))
        start += length
        assert cache.length == start
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-10, atol=1e-10)
    assert [cache.layers[layer][0].shape[1] for layer in (0, 1)] == [3, 12]
