"""Training in bf16 and fp16 is near fp32 on every layout, and a step with an fp16 overflow changes no weight."""

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch

from dist_llm.engines.native import NativeEngine
from dist_llm.models import attention
from dist_llm.optim.loss_scale import GROWTH_STEPS, LossScale
from dist_llm.training.step import train_step
from tests.laws.law import make_batches, make_config, make_layout_config, merge_ranks, record_trace, trace_one_process
from tests.laws.layouts import SGD, Layout
from tests.laws.worlds import get_world

PRECISION_LAYOUTS = [
    Layout(ranks=2, parallel={"dp_shard": 2}, micro_batch=4),
    Layout(ranks=2, parallel={"dp_replicate": 2}, model="gpt"),
    Layout(ranks=2, parallel={"tp": 2}, model="tied", micro_batch=8),
    Layout(ranks=2, parallel={"cp": 2}),
    Layout(ranks=2, parallel={"pp": 2}, model="tied", micro_batch=6),
    Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2}, model="tied"),
    Layout(ranks=4, parallel={"pp": 2, "dp_shard": 2}, micro_batch=3),
    Layout(ranks=4, parallel={"pp": 2, "tp": 2}, micro_batch=6),
    Layout(ranks=4, parallel={"pp": 2, "tp": 2, "pp_schedule": "zbv"}, model="tied", micro_batch=6),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", PRECISION_LAYOUTS, ids=str)
def test_half_precision_is_near_fp32(layout: Layout, precision: str) -> None:
    """The loss of one step agrees within 2e-3, the norm within 2e-2, and each gradient has a cosine above 0.99.

    The cosine does not depend on the loss scale.
    """
    config = make_layout_config(layout, optim=SGD, precision=precision)
    actual = merge_ranks(get_world(layout.ranks).run(record_trace, config, steps=1))
    expected = trace_one_process(make_layout_config(layout, optim=SGD, precision="fp32"), steps=1)
    assert actual.losses[0] == pytest.approx(expected.losses[0], rel=2e-3)
    assert actual.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=2e-2)
    largest_norm = max(float(gradient.norm()) for gradient in expected.gradients[0].values())
    # A trace has the gradients before the optimizer step, which in fp16 are still multiplied by the loss scale.
    name = "embed.tokens.weight"
    gradient_ratio = actual.gradients[0][name].norm() / expected.gradients[0][name].norm()
    assert gradient_ratio == pytest.approx(LossScale().value if precision == "fp16" else 1.0, rel=2e-2)
    for name, gradient in expected.gradients[0].items():
        if gradient.norm() > 1e-3 * largest_norm:
            cosine = torch.cosine_similarity(actual.gradients[0][name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.99, f"{name}: cosine {cosine:.4f}"
    for name, parameter in expected.parameters[0].items():
        assert (actual.parameters[0][name] - parameter).abs().max() < 2e-2 * expected.grad_norms[0], name


def record_rotation_dtypes(config: Any) -> set[torch.dtype]:
    """Take a step; return the dtypes of the cosines and sines that rotate queries and keys."""
    engine, dtypes = NativeEngine(config, torch.device("cpu")), set[torch.dtype]()
    rotate = attention.apply_rotary

    def record_and_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        dtypes.update((cos.dtype, sin.dtype))
        return rotate(x, cos, sin)

    with patch.object(attention, "apply_rotary", record_and_rotate):
        train_step(engine, make_batches(config, engine, step=0), lr=1.0)
    return dtypes


@pytest.mark.parametrize("layout", PRECISION_LAYOUTS[:4:3], ids=str)
def test_rotary_positions_stay_in_fp32(layout: Layout) -> None:
    """FSDP casts the arguments of a block to bf16, and tensors inside tuples and dataclasses too."""
    config = make_layout_config(layout, optim=SGD, precision="bf16")
    assert get_world(layout.ranks).run(record_rotation_dtypes, config) == [{torch.float32}] * layout.ranks


def test_a_step_with_an_overflow_halves_the_loss_scale_and_changes_no_weight() -> None:
    engine = NativeEngine(make_config(ranks=1, optim=SGD, precision="fp16"), torch.device("cpu"))
    assert engine.loss_scale is not None
    engine.loss_scale.value = 2.0**120
    before = {name: p.detach().clone() for name, p in engine.named_parameters()}

    report = train_step(engine, make_batches(engine.config, engine, step=0), lr=1.0)

    assert not math.isfinite(report.grad_norm)
    assert engine.loss_scale.value == 2.0**119
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in engine.named_parameters())


def test_the_loss_scale_doubles_after_many_finite_steps() -> None:
    scale = LossScale(value=8.0)
    for _ in range(GROWTH_STEPS - 1):
        scale.update(is_finite=True)
    assert scale == LossScale(8.0, GROWTH_STEPS - 1)
    scale.update(is_finite=True)
    assert scale == LossScale(value=16.0, good_steps=0)
    scale.update(is_finite=False)
    assert scale == LossScale(value=8.0, good_steps=0)
