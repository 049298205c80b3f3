"""The global norm is accurate to the last digits of fp32, and clipping scales by it."""

import math

import pytest
import torch

from dist_llm.optim import gradient_clipping

MILLION = 1_000_000


def make_gradients(shapes, seed=0, dtype=torch.float32):
    """Return random gradients of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def exact_norm(tensors):
    """Return the norm of all tensors together, computed in fp64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


@pytest.mark.parametrize(
    "shapes",
    [
        [(3,)],
        [(), (1,), (5, 7)],
        [
            (gradient_clipping.ROW_ELEMENTS - 1,),
            (gradient_clipping.ROW_ELEMENTS,),
            (gradient_clipping.ROW_ELEMENTS + 1,),
        ],
        [(2, gradient_clipping.ROW_ELEMENTS), (3, 5, 7)],
        [(MILLION,), (3,)],
        [(1000, 1003), (1003, 1000)],
    ],
    ids=str,
)
def test_global_norm_equals_the_norm_of_one_vector(shapes):
    tensors = make_gradients(shapes)
    assert float(gradient_clipping.compute_global_norm(tensors)) == pytest.approx(exact_norm(tensors), rel=1e-6)


def test_rounding_errors_of_equal_elements_do_not_accumulate():
    """Equal elements are the worst case for sequential summation of squares."""
    tensor = torch.full((MILLION,), 0.1)
    assert float(gradient_clipping.compute_global_norm([tensor])) == pytest.approx(exact_norm([tensor]), rel=1e-6)


def test_the_norm_of_strided_and_bf16_gradients():
    (wide,) = make_gradients([(2050, 6)])
    assert float(gradient_clipping.compute_global_norm([wide.T[::2]])) == pytest.approx(
        exact_norm([wide.T[::2]]), rel=1e-6
    )
    (bf16_gradient,) = make_gradients([(3000,)], dtype=torch.bfloat16)
    norm = gradient_clipping.compute_global_norm([bf16_gradient])
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(exact_norm([bf16_gradient]), rel=1e-6)


def test_global_norm_of_no_gradients_is_zero():
    assert float(gradient_clipping.compute_global_norm([])) == 0
    assert float(gradient_clipping.compute_global_norm([torch.zeros(0, 4), torch.tensor([3.0])])) == 3


def test_a_non_finite_gradient_gives_a_non_finite_norm():
    assert gradient_clipping.compute_global_norm([torch.ones(2000), torch.tensor([math.nan])]).isnan()
    assert gradient_clipping.compute_global_norm([torch.ones(2000), torch.tensor([math.inf])]).isinf()


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 10.0])
def test_clipping_scales_all_gradients(max_norm):
    tensors = [10 * tensor for tensor in make_gradients([(50, 40), (7,)])]
    before = [tensor.clone() for tensor in tensors]
    norm = gradient_clipping.compute_global_norm(tensors)
    gradient_clipping.clip_grads_(tensors, norm, max_norm)
    for tensor, old in zip(tensors, before, strict=True):
        torch.testing.assert_close(tensor, old * (max_norm / (float(norm) + 1e-6)))
    assert exact_norm(tensors) == pytest.approx(max_norm, rel=1e-5)


def test_small_gradients_are_not_clipped():
    tensors = make_gradients([(50, 40), (7,)])
    before = [tensor.clone() for tensor in tensors]
    gradient_clipping.clip_grads_(tensors, gradient_clipping.compute_global_norm(tensors), 1e3)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))


def test_zero_gradients_stay_zero():
    tensors = [torch.zeros(3)]
    gradient_clipping.clip_grads_(tensors, gradient_clipping.compute_global_norm(tensors), 1.0)
    assert torch.equal(tensors[0], torch.zeros(3))
