"""The factors of muP and CompleteP are those of table 1 of Dey et al. 2025."""

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from dist_llm.config.parametrization import resolve_attention_scale, resolve_logit_scale, resolve_residual_scale
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.models.build_model import build_param_specs
from dist_llm.models.parametrization import apply_parametrization
from dist_llm.optim.param_groups import build_param_groups
from dist_llm.param_spec import ONES, ZEROS, InitRule, ParamSpec
from tests.laws.law import RankTrace, make_config, record_trace
from tests.laws.layouts import ADAMW

WIDTH, DEPTH, ALPHA = 4.0, 2.0, 0.5  # MODEL of law.py has d_model 32, 4 layers and heads of 4
MUP = {"base_d_model": 8}
COMPLETEP = {"name": "completep", "base_d_model": 8, "base_n_layers": 2, "depth_exponent": ALPHA}
# {name: (lr_mult, weight_decay_mult, eps_mult, factor of the standard deviation)}
MUP_FACTORS = {
    "embed.tokens.weight": (1, 1, 1, 1),
    "blocks.1.attention.q.weight": (1 / WIDTH, WIDTH, 1 / WIDTH, WIDTH**-0.5),
    "blocks.1.feedforward.down.weight": (1 / WIDTH, WIDTH, 1 / WIDTH, WIDTH**-0.5),
    "blocks.1.attention.q.bias": (1, 1, 1 / WIDTH, 1),
    "blocks.1.norm_attention.weight": (1, 1, 1 / WIDTH, 1),
    "head.norm.weight": (1, 1, 1, 1),
    "head.out.weight": (1, 1, 1, 1),
}
LR, EPS = DEPTH ** (ALPHA - 1), DEPTH**-ALPHA / WIDTH
RESIDUAL_OUTPUT_INIT = (DEPTH / WIDTH) ** 0.5  # GPT-2 divides by the root of the layers, here of those of the base
COMPLETEP_FACTORS = {
    "embed.tokens.weight": (1, 1, 1, 1),
    "blocks.1.attention.q.weight": (LR / WIDTH, WIDTH, EPS, WIDTH**-0.5),
    "blocks.1.feedforward.down.weight": (LR / WIDTH, WIDTH, EPS, RESIDUAL_OUTPUT_INIT),
    "blocks.1.attention.q.bias": (LR, 1, EPS, 1),
    "blocks.1.norm_attention.weight": (LR, 1, EPS, 1),
    "head.norm.weight": (1, 1, 1, 1),
    "head.out.weight": (1, 1, 1, 1),
}


def make_parametrized(parametrization: dict[str, Any] | None, **model: Any) -> Config:
    return make_config(ranks=1, model={"bias": True, "parametrization": parametrization, **model}, optim=ADAMW)


@pytest.mark.parametrize(
    ("parametrization", "factors"), [(MUP, MUP_FACTORS), (COMPLETEP, COMPLETEP_FACTORS)], ids=["mup", "completep"]
)
def test_the_factors_are_those_of_the_paper(
    parametrization: dict[str, Any], factors: dict[str, tuple[float, ...]]
) -> None:
    standard = build_param_specs(make_parametrized(None).model)
    specs = build_param_specs(make_parametrized(parametrization).model)
    for name, expected in factors.items():
        spec, init = specs[name], standard[name].init
        init_factor = spec.init.scale / init.scale if init.scale else 1.0
        actual = spec.lr_mult, spec.weight_decay_mult, spec.eps_mult, init_factor
        assert actual == pytest.approx(expected), name
        assert spec.init.constant == init.constant
        assert replace(spec, init=init, lr_mult=1.0, weight_decay_mult=1.0, eps_mult=1.0) == standard[name]


def test_the_optimizer_gets_the_factors() -> None:
    config = make_parametrized(COMPLETEP)
    engine = NativeEngine(config, torch.device("cpu"))
    names = {parameter: name for name, parameter in engine.named_parameters()}
    groups = build_param_groups(config.optim, engine.named_parameters(), build_param_specs(config.model))
    by_name = {names[parameter]: group for group in groups for parameter in group["params"]}
    hidden, bias = by_name["blocks.1.attention.q.weight"], by_name["blocks.1.attention.q.bias"]
    assert (hidden["lr_mult"], bias["lr_mult"]) == pytest.approx((LR / WIDTH, LR))
    assert (hidden["weight_decay"], bias["weight_decay"]) == pytest.approx((0.1 * WIDTH, 0.0))
    assert (hidden["eps"], by_name["head.out.weight"]["eps"]) == pytest.approx((1e-5 * EPS, 1e-5))


def test_the_forward_pass_gets_the_factors() -> None:
    model = make_parametrized({**COMPLETEP, "base_head_dim": 1}, residual_scale=0.5, logit_scale=3.0).model
    assert resolve_residual_scale(model) == pytest.approx(0.5 * DEPTH**-ALPHA)
    assert resolve_logit_scale(model) == pytest.approx(3.0 / WIDTH)
    assert resolve_attention_scale(model) == pytest.approx(1 / model.head_dim)
    standard = make_parametrized(None).model
    assert (resolve_residual_scale(standard), resolve_logit_scale(standard)) == (1.0, 1.0)
    assert resolve_attention_scale(standard) == standard.head_dim**-0.5


def test_the_dimensions_of_a_parameter_decide_and_not_its_name() -> None:
    init = InitRule("normal", 1.0)
    specs = {
        "hidden": ParamSpec(("ffn", "embed"), init),
        "stacked": ParamSpec(("experts", "ffn", "embed"), init),
        "input": ParamSpec(("embed", "taps"), init),
        "vector": ParamSpec(("embed",), ONES, decay=False),
        "bias": ParamSpec(("heads",), ZEROS, decay=False),
    }
    scaled = apply_parametrization(specs, (), make_parametrized(MUP).model)
    assert {name: spec.lr_mult for name, spec in scaled.items() if spec != specs[name]} == {
        "hidden": 1 / WIDTH,
        "stacked": 1 / WIDTH,
    }
    assert scaled["hidden"].init.scale == pytest.approx(1 / math.sqrt(WIDTH))


@pytest.mark.parametrize(
    "parametrization",
    [
        {"name": "mup", "base_d_model": 32, "base_head_dim": 4},
        {"name": "completep", "base_d_model": 32, "base_head_dim": 4, "base_n_layers": 4},
    ],
    ids=["mup", "completep"],
)
def test_the_base_model_computes_the_same_bits_as_without_parametrization(parametrization: dict[str, Any]) -> None:
    expected, actual = trace_standard(), record_trace(make_parametrized(parametrization), steps=2)
    assert (actual.losses, actual.grad_norms) == (expected.losses, expected.grad_norms)
    for name, shards in expected.parameters[-1].items():
        for (_, expected_shard), (_, actual_shard) in zip(shards, actual.parameters[-1][name], strict=True):
            assert torch.equal(expected_shard, actual_shard), name


def test_another_base_width_computes_other_losses() -> None:
    assert record_trace(make_parametrized({"base_d_model": 16}), steps=1).losses != trace_standard().losses[:1]


@cache
def trace_standard() -> RankTrace:
    return record_trace(make_parametrized(None), steps=2)
