"""The laws of the mixer: every layout computes the loss, gradients and weights of one process, in fp64.

They use the law tests of dist_llm, so they run in a checkout of its repository, where this package is installed.
"""

import pytest
import torch

from dist_llm.config.check import check
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.models.build_model import build_model, build_param_specs
from dist_llm.models.init import init_param_
from dist_llm.models.kv_cache import KVCache
from tests.laws.law import assert_config_matches_one_process, make_config, make_raw_config
from tests.laws.layouts import ADAMW, CLIPPED_SGD, DOCUMENTS

MODEL = {
    "layers": ["near", "near", "full"],
    "kinds": {"near": {"mixer": "gated_convolution", "mixer_options": {"width": 3}}, "full": {}},
}
MUON = {"name": "muon", "lr": 0.01}
# (ranks, section parallel, sequences in a microbatch, further sections)
LAYOUTS = [
    (2, {"dp_shard": 2}, 4, {"optim": ADAMW}),
    (4, {"dp_replicate": 2, "dp_shard": 2}, 3, {"optim": MUON}),
    (2, {"tp": 2}, 3, {"optim": CLIPPED_SGD, **DOCUMENTS}),
    (2, {"tp": 2, "sequence_parallel": False}, 0, {"optim": CLIPPED_SGD}),
    (2, {"pp": 2, "pp_schedule": "zbv"}, 6, {"optim": CLIPPED_SGD}),
    (4, {"pp": 2, "tp": 2, "pp_schedule": "interleaved_1f1b", "recompute": "full"}, 6, {"optim": CLIPPED_SGD}),
    (8, {"pp": 2, "dp_shard": 2, "tp": 2}, 3, {"optim": CLIPPED_SGD, **DOCUMENTS}),
]


@pytest.mark.parametrize(("ranks", "parallel", "micro_batch", "sections"), LAYOUTS, ids=str)
def test_a_layout_computes_the_steps_of_one_process(ranks, parallel, micro_batch, sections):
    data = {"micro_batch": micro_batch} | sections.get("data", {})
    config = make_config(ranks=ranks, model=MODEL, parallel=parallel, **{**sections, "data": data})
    assert_config_matches_one_process(config, ranks=ranks, steps=2)


def build(seed=0):
    """Build an fp64 model with the mixer and random parameters."""
    config = make_config(ranks=1, model=MODEL).model
    model, specs = build_model(config).double().eval(), build_param_specs(config)
    for name, parameter in model.named_parameters():
        init_param_(parameter.detach(), name, specs[name].init, seed, parameter.shape, (0,) * parameter.ndim)
    return model


def test_generation_with_a_cache_gives_the_logits_of_the_full_sequence():
    model, tokens, cache = build(), torch.arange(9)[None] * 5 % 97, KVCache()
    parts = [model(part, cache=cache) for part in tokens.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-12, atol=1e-12)


def test_the_taps_have_no_weight_decay_and_are_divided_over_tensor_ranks():
    spec = build_param_specs(make_config(ranks=1, model=MODEL).model)["blocks.0.mixer.taps"]
    assert (spec.decay, spec.muon, spec.dims[0]) == (False, False, "ffn")


@pytest.mark.parametrize(
    ("near", "parallel", "message"),
    [
        ({"mixer_options": {"width": 0}}, {}, "model.kinds.near.mixer_options.width: input should be greater"),
        ({"n_heads": 4}, {}, "model.kinds.near.n_heads: only attention reads this key"),
        ({}, {"cp": 2}, "model.kinds.near.mixer: gated_convolution does not support context parallelism; set cp=1"),
        ({"mixer": "gated_convlution"}, {}, "model.kinds.near.mixer: no installed package has gated_convlution"),
    ],
)
def test_a_wrong_config_is_refused(near, parallel, message):
    kinds = {"near": MODEL["kinds"]["near"] | near, "full": {}}
    raw = make_raw_config(model=MODEL | {"kinds": kinds}, parallel=parallel)
    violations = check(UnresolvedConfig.model_validate(raw), 2 if parallel else 1, tokenizer_size=0)
    assert [str(violation) for violation in violations if str(violation).startswith(message)]


def test_heads_that_the_mixer_does_not_read_need_not_divide_over_tensor_ranks():
    raw = make_raw_config(model={"n_heads": 3, "n_kv_heads": 3, "mixer": "gated_convolution"}, parallel={"tp": 2})
    assert check(UnresolvedConfig.model_validate(raw), world_size=2, tokenizer_size=0) == []
