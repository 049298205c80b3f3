"""Products in float8: near fp32 on every layout, and how rows are cut makes no more difference than in bf16.

What can be equal: scales are powers of two, so a tensor's rows are rounded alike whoever holds them, but where an
element is 2^14 times smaller than the largest. Losses are therefore equal however rows are cut into microbatches and
data or pipeline ranks, and gradients to the rounding of each microbatch's share of them to bf16, as without float8.
What cannot: tensor and context ranks add up in another order, and FSDP gathers embeddings and norms in bf16, which one
process has in fp32. So activations differ in bf16's last place and, where they then round to the other side, in
float8's.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_llm.parallel import fp8
from tests.laws.law import ROWS, Trace, config_of, merge_ranks, reference, trace
from tests.laws.layouts import MODELS, SGD, Layout
from tests.laws.worlds import restart_world, world

SIZES = {"n_kv_heads": 8, "d_ff": 64}  # what two tensor ranks hold divides by 16
LAYOUTS = [
    Layout(2, {"dp_shard": 2}, micro=4),
    Layout(2, {"dp_replicate": 2}, "gpt"),
    Layout(2, {"tp": 2}, "tied"),
    Layout(2, {"tp": 2, "sequence_parallel": False}, "gpt"),
    Layout(2, {"cp": 2}),
    Layout(2, {"pp": 2}, "tied", 6),
    Layout(2, {"pp": 2, "pp_schedule": "zbv"}, micro=6),
    Layout(2, {"dp_shard": 2, "recompute": "selective"}),
    Layout(2, {"tp": 2, "recompute": "full"}, "gpt"),
    Layout(4, {"dp_shard": 2, "tp": 2}, "tied"),
    Layout(2, {"tp": 2}, "t5", 8),
]


def config(layout: Layout, precision: str = "bf16", fp8: bool = True) -> Any:
    return config_of(
        layout.ranks,
        MODELS[layout.model] | SIZES,
        optim=SGD,
        parallel=layout.parallel,
        data={"micro_batch": layout.micro},
        precision=precision,
        fp8=fp8,
    )


def step(layout: Layout, on: bool = True) -> Trace:
    """One step of the layout."""
    if layout.ranks == 1:
        return merge_ranks([trace(config(layout, fp8=on), 1)])
    return merge_ranks(world(layout.ranks).run(trace, config(layout, fp8=on), 1))


def least_cosine(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """Of the gradients, those left out that are almost nothing."""
    largest = max(float(each.norm()) for each in wanted.values())
    counted = [name for name, each in wanted.items() if each.norm() > 1e-3 * largest]
    return min((float(torch.cosine_similarity(found[n].flatten(), wanted[n].flatten(), dim=0)), n) for n in counted)


def near(got: Trace, layout: Layout) -> None:
    """Loss within 1e-3, norm within 2e-2; each gradient at over 0.98 of cosine to fp32's (bf16's: 0.9999)."""
    want = reference(config(layout, "fp32", False), 1)
    assert got.losses[0] == pytest.approx(want.losses[0], rel=1e-3)
    assert got.norms[0] == pytest.approx(want.norms[0], rel=2e-2)
    cosine, name = least_cosine(got.gradients[0], want.gradients[0])
    assert 0.98 < cosine < 0.999, f"{name}: cosine {cosine:.4f}"
    for name, parameter in want.parameters[0].items():
        assert (got.parameters[0][name] - parameter).abs().max() < 6e-2 * want.norms[0], name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_float8_is_fp32_within_its_rounding(layout: Layout) -> None:
    near(step(layout), layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [LAYOUTS[0], *LAYOUTS[2:4], LAYOUTS[5], LAYOUTS[7]], ids=str)
def test_compiled_too(layout: Layout) -> None:
    restart_world(layout.ranks)
    compiled = config(layout).model_copy(update={"compile": True})
    near(merge_ranks(world(layout.ranks).run(trace, compiled, 1)), layout)


def farthest(found: Trace, wanted: Trace) -> float:
    """Of the gradients, the largest difference, relative, by norm."""
    pairs = [(found.gradients[0][name], each) for name, each in wanted.gradients[0].items()]
    return max(float((found - wanted).norm() / wanted.norm()) for found, wanted in pairs)


ONE = Layout(1, {}, micro=ROWS)
TWO = Layout(2, {"dp_shard": 2})  # its rank's rows in one piece
CUTS = [
    (Layout(1, {}, micro=1), ONE),
    (Layout(1, {}, micro=12), ONE),
    (Layout(2, {"pp": 2}, micro=6), ONE),
    (Layout(2, {"dp_shard": 2}, micro=3), TWO),
    (Layout(2, {"dp_replicate": 2}, micro=4), TWO),
    (Layout(4, {"dp_shard": 4}), TWO),
    (Layout(4, {"dp_replicate": 2, "dp_shard": 2}, micro=2), TWO),
]


def cut_alike(cut: Trace, whole: Trace) -> None:
    """Measured: losses the same bits; gradients 3.9e-3 apart at most, which is 2^-8 and what it is without float8."""
    assert cut.losses[0] == pytest.approx(whole.losses[0], rel=1e-7)
    assert farthest(cut, whole) < 6e-3


@pytest.mark.parametrize(("cut", "whole"), CUTS, ids=str)
def test_rows_are_rounded_alike_however_they_are_cut(cut: Layout, whole: Layout) -> None:
    cut_alike(step(cut), step(whole))


def test_a_scale_that_is_no_power_of_two_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for each tensor by itself, and 0.1 apart."""

    def exactly(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        scale = torch.finfo(kind).max / x.abs().amax().float().clamp(min=fp8.MIN_AMAX)
        return (x.float() * scale).to(kind), scale.reciprocal()

    monkeypatch.setattr(fp8, "quantize", exactly)
    one, twelve = step(ONE), step(Layout(1, {}, micro=12))
    with pytest.raises(AssertionError):
        cut_alike(twelve, one)
    assert farthest(twelve, one) > 0.05
