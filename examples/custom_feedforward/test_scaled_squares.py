"""The laws of the layer: every layout computes the loss, gradients and weights of one process, in fp64.

They use the law tests of dist_llm, so they run in a checkout of its repository, where this package is installed.
"""

import pytest

from dist_llm.config.check import check
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.models.build_model import build_model, build_param_specs
from dist_llm.observe.flops import count_flops_per_sample
from tests.laws.law import assert_config_matches_one_process, make_config, make_raw_config
from tests.laws.layouts import ADAMW, CLIPPED_SGD, DOCUMENTS

SECTION = {"name": "scaled_squares", "hidden": 24}
MODEL = {"layers": ["squares", "dense"], "kinds": {"squares": {"feedforward": SECTION}, "dense": {}}}
MUON = {"name": "muon", "lr": 0.01}
# (ranks, section parallel, sequences in a microbatch, further sections)
LAYOUTS = [
    (2, {"dp_shard": 2}, 4, {"optim": ADAMW}),
    (4, {"dp_replicate": 2, "dp_shard": 2}, 3, {"optim": MUON}),
    (2, {"tp": 2}, 3, {"optim": CLIPPED_SGD}),
    (2, {"tp": 2, "sequence_parallel": False, "recompute": "full"}, 0, {"optim": CLIPPED_SGD}),
    (2, {"cp": 2}, 4, {"optim": CLIPPED_SGD, **DOCUMENTS}),
    (8, {"pp": 2, "dp_shard": 2, "tp": 2, "pp_schedule": "zbv"}, 3, {"optim": CLIPPED_SGD}),
]


@pytest.mark.parametrize(("ranks", "parallel", "micro_batch", "sections"), LAYOUTS, ids=str)
def test_a_layout_computes_the_steps_of_one_process(ranks, parallel, micro_batch, sections):
    data = {"micro_batch": micro_batch} | sections.get("data", {})
    config = make_config(ranks=ranks, model=MODEL, parallel=parallel, **{**sections, "data": data})
    assert_config_matches_one_process(config, ranks=ranks, steps=2)


def test_parameters_and_flops_follow_the_options():
    config = make_config(ranks=1, model=MODEL).model
    shapes = {name: tuple(parameter.shape) for name, parameter in build_model(config).named_parameters()}
    assert shapes["blocks.0.feedforward.up.weight"] == (24, config.d_model)
    assert shapes["blocks.1.feedforward.up.weight"] == (config.d_ff, config.d_model)
    spec = build_param_specs(config)["blocks.0.feedforward.scale"]
    assert (spec.decay, spec.muon, spec.dims) == (False, False, ("ffn",))
    wider = make_config(
        ranks=1, model=MODEL | {"kinds": {"squares": {"feedforward": SECTION | {"hidden": 48}}, "dense": {}}}
    ).model
    layers = [config.layer_config(layer) for layer in range(config.n_layers)]
    num_layers = sum(layer.feedforward.name == "scaled_squares" for layer in layers)
    added_weights = num_layers * 2 * config.d_model * (48 - 24)
    assert count_flops_per_sample(wider, 32, 0) - count_flops_per_sample(config, 32, 0) == 6 * added_weights * 32


@pytest.mark.parametrize(
    ("section", "parallel", "message"),
    [
        ({"hidden": 0}, {}, "model.kinds.squares.feedforward.hidden: input should be greater"),
        ({"hiden": 3}, {}, "model.kinds.squares.feedforward.hiden: extra inputs are not permitted"),
        (
            {"hidden": 3},
            {"tp": 2},
            "model.kinds.squares.feedforward.name: 3 hidden units of scaled_squares",
        ),
        ({"name": "scaled_squers"}, {}, "model.kinds.squares.feedforward.name: no installed package has scaled_squers"),
    ],
)
def test_a_wrong_config_is_refused(section, parallel, message):
    kinds = {"squares": {"feedforward": SECTION | section}, "dense": {}}
    raw = make_raw_config(model=MODEL | {"kinds": kinds}, parallel=parallel)
    violations = check(UnresolvedConfig.model_validate(raw), 2 if parallel else 1, tokenizer_size=0)
    assert [str(violation) for violation in violations if str(violation).startswith(message)], violations
