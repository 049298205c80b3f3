"""Methods that stabilize training: stochastic depth, QK norm, logit softcap, initialization; relative buckets."""

import math

import pytest
import torch

from dist_llm.models.build_model import build_model, build_param_specs
from dist_llm.models.decoder import apply_softcap
from dist_llm.models.stochastic_depth import stochastic_depth_scale


def test_stochastic_depth_scale_has_mean_one():
    draws = torch.randint(-(2**62), 2**62, (20_000,), generator=torch.Generator().manual_seed(0))
    for rate in (0.1, 0.5):
        scales = stochastic_depth_scale(draws, 3, rate)
        assert (scales == 0).float().mean() == pytest.approx(rate, abs=0.02)
        assert scales.mean() == pytest.approx(1.0, abs=0.03)
    scale_layer_3, scale_layer_4 = stochastic_depth_scale(draws, 3, 0.5), stochastic_depth_scale(draws, 4, 0.5)
    assert ((scale_layer_3 == 0) & (scale_layer_4 == 0)).float().mean() == pytest.approx(0.25, abs=0.02), (
        "the scales of two layers are not independent"
    )
    assert torch.equal(stochastic_depth_scale(draws[::2], 3, 0.5), scale_layer_3[::2]), (
        "the scale of a sample depends on the other samples of the batch"
    )


def test_stochastic_depth_skips_layers_only_in_training(build):
    model = build(stochastic_depth=0.9, n_layers=1).train()
    tokens = torch.arange(12).view(2, 6)
    draws = next(
        torch.tensor([number, number + 1]) for number in range(100)
        if stochastic_depth_scale(torch.tensor([number, number + 1]), 0, 0.9).tolist() == [0.0, pytest.approx(10.0)]
    )  # fmt: skip
    hidden = model.embed(tokens, torch.arange(6))
    logits = model(tokens, sample_hash_B=draws)
    assert torch.equal(logits[0], model._apply_head(hidden, targets_BS=None)[0])
    assert not torch.allclose(logits[1], model._apply_head(hidden, targets_BS=None)[1])
    assert torch.equal(model.eval()(tokens, sample_hash_B=draws), model(tokens))


def test_later_layers_are_skipped_more_often(build):
    model = build(stochastic_depth=0.4, n_layers=4).train()
    draws = torch.randint(2**62, (20_000,), generator=torch.Generator().manual_seed(0))
    rates = [(model._depth_scale(draws, layer) == 0).float().mean() for layer in range(4)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.02)


def test_qk_norm_bounds_the_attention_scores(build):
    """With qk_norm, query weights that are 100 times larger give the same logits."""
    tokens = torch.arange(12).view(2, 6)
    for qk_norm in (True, False):
        model = build(qk_norm=qk_norm)
        before = model(tokens)
        with torch.no_grad():
            for block in model.blocks.values():
                block.attention.q.weight *= 100
        after = model(tokens)
        assert torch.allclose(before, after, atol=1e-3) == qk_norm


def test_softcap_bounds_the_logits(build):
    logits = torch.tensor([-1000.0, -1.0, 0.0, 0.01, 1.0, 1000.0])
    assert apply_softcap(logits, 5.0).abs().max() <= 5.0
    torch.testing.assert_close(apply_softcap(logits, 5.0)[2:4], logits[2:4], rtol=1e-4, atol=0)
    assert apply_softcap(logits, 0.0) is logits
    assert build(logit_cap=0.5)(torch.arange(6)[None]).abs().max() <= 0.5


@pytest.mark.parametrize(("layers", "encoder"), [(6, 0), (6, 3)])
def test_tfixup_scales_match_the_paper(layers, encoder, settings):
    """The scale is (9 N)^-1/4 in a decoder and 0.67 N^-1/4 in an encoder, and 1 for queries and keys (Huang et al.
    2020, 3.2)."""
    architecture = "encoder_decoder" if encoder else "decoder"
    config = settings(init="tfixup", d_ff=32, n_layers=layers, n_encoder_layers=encoder, architecture=architecture)
    xavier = math.sqrt(6 / (32 + 32))
    outer = (9 * layers) ** -0.25 if encoder else 0.67 * layers**-0.25
    specs, name = build_param_specs(config), f"blocks.{encoder}.attention"
    assert specs[f"{name}.q.weight"].init.scale == pytest.approx(xavier)
    for matrix in ("v", "out"):
        assert specs[f"{name}.{matrix}.weight"].init.scale == pytest.approx(xavier * outer)
    assert specs["embed.tokens.weight"].init.scale == pytest.approx(32**-0.5 * outer)
    if encoder:
        inner = specs["blocks.0.feedforward.up.weight"].init.scale
        assert inner == pytest.approx(xavier * 0.67 * encoder**-0.25)


def test_depth_init_shrinks_with_the_layer_number(settings):
    """The scale is that of Zhang et al. 2019, eq. 6."""
    config = settings(init="depth", n_layers=4)
    scales = [build_param_specs(config)[f"blocks.{layer}.attention.q.weight"].init.scale for layer in range(4)]
    assert scales == pytest.approx([math.sqrt(6 / 64) / math.sqrt(number) for number in (1, 2, 3, 4)])


@pytest.mark.parametrize("init", ["gpt2", "xavier", "he", "depth", "tfixup"])
@pytest.mark.parametrize("architecture", ["decoder", "encoder", "encoder_decoder"])
def test_all_architectures_have_init_rules(architecture, init, settings):
    encoder = {"n_encoder_layers": 2} if architecture == "encoder_decoder" else {}
    config = settings(
        architecture=architecture,
        init=init,
        positions="relative",
        head="mlm",
        qk_norm=True,
        norm_embedding=True,
        **encoder,
    )
    specs = build_param_specs(config)
    for name, parameter in build_model(config).named_parameters():
        rule = specs[name].init
        ones = parameter.ndim == 1 and name.endswith("weight")
        zeros = name.endswith("bias")
        assert (rule.constant, rule.scale > 0) == (float(ones), not (ones or zeros)), name


def test_relative_buckets_equal_those_of_t5(settings):
    """Expected buckets follow Raffel et al. 2020, 2.1, with 8 buckets, the last of them from distance 16 on."""
    from dist_llm.models.positional_encoding import RelativeBias

    config = settings(n_heads=2, relative_buckets=8, relative_distance=16)
    causal_buckets = RelativeBias(config, bidirectional=False).compute_buckets(
        -torch.tensor([0, 1, 2, 3, 4, 5, 6, 8, 11, 16, 40])
    )
    # One bucket per distance up to 3; then 4 + log(d / 4) / log(4) * 4, rounded down, at most 7.
    assert causal_buckets.tolist() == [0, 1, 2, 3, 4, 4, 5, 6, 6, 7, 7]
    assert RelativeBias(config, bidirectional=False).compute_buckets(torch.tensor([1, 9])).tolist() == [0, 0]
    bidirectional_buckets = RelativeBias(config, bidirectional=True).compute_buckets(
        torch.tensor([-1, 0, 1, -2, 2, 30, -30])
    )
    # Half of the buckets are for keys after the query. Each direction has 4 buckets; distances 0 and 1 have their own.
    assert bidirectional_buckets.tolist() == [1, 0, 5, 2, 6, 7, 3]
