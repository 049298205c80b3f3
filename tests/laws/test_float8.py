"""Training in float8 is near fp32 on every layout, and splitting the batch changes no more than in bf16.

Scales are powers of two, so all ranks round the rows of a tensor alike, except elements that are 2^14 times smaller
than the largest. Losses are therefore equal for all microbatch sizes, and on data-parallel and pipeline ranks.
Gradients are equal up to the bf16 rounding of the contribution of each microbatch, as without float8.

Tensor and context ranks differ more. They sum in another order, and FSDP gathers embeddings and norms in bf16, which
one process keeps in fp32. Activations then differ in the last bit of bf16, and more where float8 rounds the other way.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dist_llm.config.schema import Config
from dist_llm.parallel import fp8
from tests.laws.law import (
    GLOBAL_BATCH,
    Trace,
    make_layout_config,
    merge_ranks,
    record_trace,
    trace_one_process,
)
from tests.laws.layouts import SGD, Layout, index_by_name
from tests.laws.worlds import get_world, restart_world, run_on_ranks

SIZES = {"n_kv_heads": 8, "d_ff": 64}  # the sizes on each of two tensor ranks are multiples of 16
LAYOUTS = index_by_name(
    Layout(ranks=2, parallel={"dp_shard": 2}, micro_batch=4),
    Layout(ranks=2, parallel={"dp_replicate": 2}, model="gpt"),
    Layout(ranks=2, parallel={"tp": 2}, model="tied"),
    Layout(ranks=2, parallel={"tp": 2, "sequence_parallel": False}, model="gpt"),
    Layout(ranks=2, parallel={"cp": 2}),
    Layout(ranks=2, parallel={"pp": 2}, model="tied", micro_batch=6),
    Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "zbv"}, micro_batch=6),
    Layout(ranks=2, parallel={"dp_shard": 2, "recompute": "selective"}),
    Layout(ranks=2, parallel={"tp": 2, "recompute": "full"}, model="gpt"),
    Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2}, model="tied"),
    Layout(ranks=2, parallel={"tp": 2}, model="t5", micro_batch=8),
)
COMPILED = (
    "dp_shard2_micro4_llama",
    "tp2_tied",
    "tp2_sequence_parallel-False_gpt",
    "pp2_micro6_tied",
    "dp_shard2_recompute-selective_llama",
)


def make_fp8_config(layout: Layout, *, precision: str = "bf16", fp8: bool = True) -> Config:
    """Return the config of a layout with matrices that are large enough for fp8."""
    return make_layout_config(layout, optim=SGD, model=SIZES, precision=precision, fp8=fp8)


def trace_one_step(layout: Layout) -> Trace:
    """Return the trace of one float8 step of the layout."""
    return merge_ranks(run_on_ranks(layout.ranks, record_trace, make_fp8_config(layout), steps=1))


class LeastCosine(NamedTuple):
    """The cosine similarity of two gradients of a parameter."""

    cosine: float
    name: str


def find_least_cosine(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> LeastCosine:
    """Find the parameter whose gradient differs most from the expected one, apart from gradients near zero."""
    largest_norm = max(float(gradient.norm()) for gradient in expected.values())
    names = [name for name, gradient in expected.items() if gradient.norm() > 1e-3 * largest_norm]
    return min(
        LeastCosine(float(torch.cosine_similarity(gradients[name].flatten(), expected[name].flatten(), dim=0)), name)
        for name in names
    )


def assert_near_fp32(actual: Trace, layout: Layout) -> None:
    """Compare with fp32: loss within 1e-3, norm within 2e-2, each gradient with a cosine above 0.98 (bf16: 0.9999)."""
    expected = trace_one_process(make_fp8_config(layout, precision="fp32", fp8=False), steps=1)
    assert actual.losses[0] == pytest.approx(expected.losses[0], rel=1e-3)
    assert actual.grad_norms[0] == pytest.approx(expected.grad_norms[0], rel=2e-2)
    cosine, name = find_least_cosine(actual.gradients[0], expected.gradients[0])
    assert 0.98 < cosine < 0.999, f"{name}: cosine {cosine:.4f}"
    for name, parameter in expected.parameters[0].items():
        assert (actual.parameters[0][name] - parameter).abs().max() < 6e-2 * expected.grad_norms[0], name


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_float8_is_near_fp32(layout: Layout) -> None:
    assert_near_fp32(trace_one_step(layout), layout)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_float8_is_near_fp32(name: str) -> None:
    layout = LAYOUTS[name]
    restart_world(layout.ranks)
    compiled_config = make_fp8_config(layout).model_copy(update={"compile": True})
    assert_near_fp32(merge_ranks(get_world(layout.ranks).run(record_trace, compiled_config, steps=1)), layout)


def find_largest_difference(trace: Trace, expected_trace: Trace) -> float:
    """Return the largest norm of a difference of gradients, relative to the norm of the expected gradient."""
    pairs = [(trace.gradients[0][name], gradient) for name, gradient in expected_trace.gradients[0].items()]
    return max(float((actual - expected).norm() / expected.norm()) for actual, expected in pairs)


ONE = Layout(ranks=1, micro_batch=GLOBAL_BATCH)
TWO = Layout(ranks=2, parallel={"dp_shard": 2})  # one microbatch per rank
SPLITS = [
    (Layout(ranks=1, micro_batch=1), ONE),
    (Layout(ranks=1, micro_batch=12), ONE),
    (Layout(ranks=2, parallel={"pp": 2}, micro_batch=6), ONE),
    (Layout(ranks=2, parallel={"dp_shard": 2}, micro_batch=3), TWO),
    (Layout(ranks=2, parallel={"dp_replicate": 2}, micro_batch=4), TWO),
    (Layout(ranks=4, parallel={"dp_shard": 4}), TWO),
    (Layout(ranks=4, parallel={"dp_replicate": 2, "dp_shard": 2}, micro_batch=2), TWO),
]


def assert_rounded_alike(split: Trace, unsplit: Trace) -> None:
    """Compare a step of a split batch with one of the full batch: equal losses, and gradients within 6e-3.

    The measured difference of gradients is at most 3.9e-3, about 2^-8, as without float8.
    """
    assert split.losses[0] == pytest.approx(unsplit.losses[0], rel=1e-7)
    assert find_largest_difference(split, unsplit) < 6e-3


@pytest.mark.parametrize(("split", "unsplit"), SPLITS, ids=str)
def test_a_split_batch_is_rounded_as_the_full_batch(split: Layout, unsplit: Layout) -> None:
    assert_rounded_alike(trace_one_step(split), trace_one_step(unsplit))


def test_a_scale_that_is_no_power_of_two_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the exact scale of each tensor, the gradients of a split batch differ by 0.1."""

    def quantize_with_exact_scale(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = torch.finfo(kind).max / x.abs().amax().float().clamp(min=fp8.MIN_AMAX)
        return (x.float() * scale).to(kind), scale.reciprocal()

    monkeypatch.setattr(fp8, "quantize", quantize_with_exact_scale)
    unsplit, split = trace_one_step(ONE), trace_one_step(Layout(ranks=1, micro_batch=12))
    with pytest.raises(AssertionError):
        assert_rounded_alike(split, unsplit)
    assert find_largest_difference(split, unsplit) > 0.05
