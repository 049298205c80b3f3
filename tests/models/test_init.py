"""Initial values: they follow the configured distributions and do not depend on how tensors are sliced."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from dist_llm import counter_rng
from dist_llm.models.build_model import build_param_specs
from dist_llm.models.decoder import Decoder
from dist_llm.models.init import init_param_
from dist_llm.param_spec import InitRule, collect_param_specs

NORMAL, UNIFORM = InitRule("normal", 0.5), InitRule("uniform", 0.5)


def draw_values(rule, shape, name="w", seed=0, offset=(0, 0), full=None):
    """Initialize the slice of a parameter at `offset`; its full shape is `full`, by default `shape`."""
    values = torch.full(shape, math.nan)
    init_param_(values, name, rule, seed, full or shape, offset)
    return values


def test_normal_values_have_normal_quantiles():
    values = draw_values(NORMAL, (300, 1000)).flatten().double() / 0.5
    ranks = torch.tensor([0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999], dtype=torch.float64)
    cdf_values = torch.distributions.Normal(0, 1).cdf(values.sort().values[(ranks * len(values)).long()])
    # The tolerance is five standard errors of an empirical rank, sqrt(r (1 - r) / n), which are at most 0.0009.
    assert (cdf_values - ranks).abs().max() < 0.0046
    assert 4 < values.abs().max() < 6.5


def test_uniform_values_fill_their_range_evenly():
    values = draw_values(UNIFORM, (300, 1000)).flatten()
    assert values.abs().max() <= 0.5
    counts = torch.histc(values, 30, -0.5, 0.5)
    assert ((counts - 10_000).abs() < 500).all()


@pytest.mark.parametrize("rule", [NORMAL, UNIFORM], ids=["normal", "uniform"])
def test_values_are_independent_of_their_neighbours(rule):
    values = draw_values(rule, (400, 500))
    for one, other in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1]), (values[:, ::2], values[:, 1::2])):
        correlation = torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1]
        assert correlation.abs() < 0.012, "neighbours are correlated by more than five standard errors of 1 / sqrt(n)"


# Of a matrix with 64 inputs and 256 outputs.
STANDARD_DEVIATIONS = {"gpt2": 0.02, "xavier": math.sqrt(6 / (256 + 64)) / math.sqrt(3), "he": math.sqrt(2 / 64)}


@pytest.mark.parametrize("kind", STANDARD_DEVIATIONS)
def test_parameters_have_the_configured_standard_deviation(kind, settings):
    specs = build_param_specs(settings(init=kind, n_layers=8, d_model=64, d_ff=256))
    rule = specs["blocks.0.feedforward.up.weight"].init
    values = draw_values(rule, (256, 64))
    # The tolerance is five standard errors of a standard deviation, sd / sqrt(2n) = 0.0055 sd.
    assert float(values.std()) == pytest.approx(STANDARD_DEVIATIONS[kind], rel=0.028)
    assert abs(float(values.mean())) < 5 * STANDARD_DEVIATIONS[kind] / 128
    if kind == "gpt2":
        out, down = (specs[f"blocks.3.{name}.weight"].init for name in ("attention.out", "feedforward.down"))
        assert out.scale == down.scale == pytest.approx(rule.scale / 4), (
            "the scale of the output layers is not divided by sqrt(2 * 8 layers)"
        )


def test_all_parameters_have_the_rule_of_their_kind(settings):
    """Matrices are random, embeddings normal(init_std), norms one, biases zero."""
    for kind in STANDARD_DEVIATIONS:
        config = settings(init=kind, bias=True, norm="layernorm", positions="learned")
        for name, spec in build_param_specs(config).items():
            rule = spec.init
            if name.endswith(".bias"):
                assert (rule.scale, rule.constant) == (0, 0)
            elif "norm" in name:
                assert (rule.scale, rule.constant) == (0, 1)
            elif name.startswith("embed.") or name == "head.out.weight":
                assert (rule.distribution, rule.scale) == ("normal", 0.02)
            else:
                assert rule.scale > 0
                assert rule.num_used_rows is None


@pytest.mark.parametrize(
    "rule", [NORMAL, UNIFORM, InitRule("normal", 0.5, num_used_rows=7)], ids=["normal", "uniform", "padded"]
)
@hypothesis_settings(deadline=None)  # a loaded machine must not fail the test
@given(data=st.data())
def test_shard_equals_its_slice_of_the_full_parameter(rule, data):
    rows, columns = 11, 9
    first, last = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    left, right = sorted(data.draw(st.tuples(st.integers(0, columns), st.integers(0, columns))))
    full = draw_values(rule, (rows, columns))
    local = draw_values(rule, (last - first, right - left), offset=(first, left), full=(rows, columns))
    assert torch.equal(local, full[first:last, left:right])


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (4, 8, 4), (2, 3, 4, 5)], ids=str)
def test_all_elements_have_different_values(shape, monkeypatch):
    """All elements differ, and a slice has the values of the full tensor, for any number of dimensions and chunks."""
    full = draw_values(NORMAL, shape, offset=(0,) * len(shape))
    assert full.isfinite().all()
    assert full.unique().numel() == full.numel()
    monkeypatch.setattr(counter_rng, "CHUNK_ELEMENTS", 9)
    assert torch.equal(draw_values(NORMAL, shape, offset=(0,) * len(shape)), full)
    interior = tuple(slice(1, None) for _ in shape)
    slice_shape, offset = [size - 1 for size in shape], [1] * len(shape)
    assert torch.equal(draw_values(NORMAL, slice_shape, offset=offset, full=shape), full[interior])


def test_a_parameter_without_a_spec_is_an_error(settings):
    model = Decoder(settings())
    model.blocks["0"].attention.temperature = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"no module describes parameter blocks\.0\.attention\.temperature"):
        collect_param_specs(model)


def test_a_spec_with_a_wrong_number_of_dimensions_is_an_error(settings):
    model = Decoder(settings())
    model.head.out.weight = nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"head\.out\.weight has 1 dimensions, its ParamSpec \('vocab', 'embed'\)"):
        collect_param_specs(model)


def test_values_do_not_depend_on_the_chunk_size(monkeypatch):
    expected = draw_values(NORMAL, (50, 7))
    for chunk in (1, 7, 20, 349):
        monkeypatch.setattr(counter_rng, "CHUNK_ELEMENTS", chunk)
        assert torch.equal(draw_values(NORMAL, (50, 7)), expected)


def test_constants_fill_shards_of_vectors():
    local = torch.full((5,), math.nan)
    init_param_(local, "norm.weight", InitRule("normal", 0.0, constant=1.0), 0, (20,), (10,))
    assert torch.equal(local, torch.ones(5))


def test_names_and_seeds_change_the_values():
    draws = [
        draw_values(NORMAL, (20, 20), name, seed) for name in ("a", "b", "blocks.1", "blocks.11") for seed in (0, 1, 11)
    ]
    for i, one in enumerate(draws):
        assert all((one != other).float().mean() > 0.99 for other in draws[:i])
    assert torch.equal(draw_values(NORMAL, (20, 20), "a", 1), draws[1])


def test_values_do_not_depend_on_vocabulary_padding(build):
    plain, padded = build(vocab_multiple=1), build(vocab_multiple=64)
    for (name, one), (_, other) in zip(plain.named_parameters(), padded.named_parameters(), strict=True):
        assert torch.equal(one, other[: len(one)]), name
        assert (other[len(one) :] == 0).all()


def test_element_ids_above_32_bits_give_different_values():
    """The element ids of the embedding of a 70B model need more than 32 bits."""
    shape = (2**20, 2**13)
    one = draw_values(NORMAL, (2, 64), offset=(2**19 + 5, 0), full=shape)
    other = draw_values(NORMAL, (2, 64), offset=(5, 0), full=shape)
    assert not torch.equal(one, other)
    assert one.std() > 0.3
