"""The global norm is accurate to the last digits of fp32, and clipping scales by it."""

import math

import pytest
import torch

from dist_llm.optim.gradient_clipping import ROW_ELEMENTS, clip_grads_, compute_global_norm

NUM_ELEMENTS = 1_000_000  # sequential summation of as many squares has a relative error of up to 1e-5


def make_gradients(shapes, seed=0, dtype=torch.float32):
    """Return random gradients of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def compute_fp64_norm(tensors):
    """Return the norm of all tensors together, computed in fp64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize(
    "shapes",
    [
        [(3,)],
        [(), (1,), (5, 7)],
        # The CPU code sums in rows of ROW_ELEMENTS: no full row, one, and one with a rest; then two full rows.
        [(ROW_ELEMENTS - 1,), (ROW_ELEMENTS,), (ROW_ELEMENTS + 1,)],
        [(2, ROW_ELEMENTS), (3, 5, 7)],
        [(NUM_ELEMENTS,), (3,)],
        [(1000, 1003), (1003, 1000)],  # large matrices whose rows are shorter than ROW_ELEMENTS
    ],
    ids=str,
)
def test_global_norm_equals_the_norm_of_one_vector(shapes):
    tensors = make_gradients(shapes)
    assert float(compute_global_norm(tensors)) == pytest.approx(compute_fp64_norm(tensors), rel=1e-6)


def test_rounding_errors_of_equal_elements_do_not_accumulate():
    """Equal elements are the worst case for sequential summation of squares."""
    tensor = torch.full((NUM_ELEMENTS,), 0.1)
    assert float(compute_global_norm([tensor])) == pytest.approx(compute_fp64_norm([tensor]), rel=1e-6)


def test_the_norm_of_strided_gradients_is_accurate():
    (tall,) = make_gradients([(2 * ROW_ELEMENTS + 2, 6)])
    strided = tall.T[::2]
    assert float(compute_global_norm([strided])) == pytest.approx(compute_fp64_norm([strided]), rel=1e-6)


def test_the_norm_of_bf16_gradients_is_accurate_to_fp32():
    (bf16_gradient,) = make_gradients([(3 * ROW_ELEMENTS,)], dtype=torch.bfloat16)
    norm = compute_global_norm([bf16_gradient])
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(compute_fp64_norm([bf16_gradient]), rel=1e-6)


def test_global_norm_of_no_gradients_is_zero():
    assert float(compute_global_norm([])) == 0
    assert float(compute_global_norm([torch.zeros(0, 4), torch.tensor([3.0])])) == 3


def test_a_non_finite_gradient_gives_a_non_finite_norm():
    assert compute_global_norm([torch.ones(2000), torch.tensor([math.nan])]).isnan()
    assert compute_global_norm([torch.ones(2000), torch.tensor([math.inf])]).isinf()


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 10.0])
def test_clipping_scales_all_gradients(max_norm):
    tensors = [10 * tensor for tensor in make_gradients([(50, 40), (7,)])]
    before = [tensor.clone() for tensor in tensors]
    norm = compute_global_norm(tensors)
    clip_grads_(tensors, norm, max_norm)
    for tensor, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, old * (max_norm / (float(norm) + 1e-6)))
    assert compute_fp64_norm(tensors) == pytest.approx(max_norm, rel=1e-5)


def test_small_gradients_are_not_clipped():
    tensors = make_gradients([(50, 40), (7,)])
    before = [tensor.clone() for tensor in tensors]
    clip_grads_(tensors, compute_global_norm(tensors), 1e3)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def test_zero_gradients_stay_zero():
    tensors = [torch.zeros(3)]
    clip_grads_(tensors, compute_global_norm(tensors), 1.0)
    assert torch.equal(tensors[0], torch.zeros(3))
