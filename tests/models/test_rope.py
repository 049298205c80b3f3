"""The frequencies of each kind of RoPE scaling equal those of transformers, and depend only on the config."""

import math

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dist_llm.models.rope import apply_rotary, attention_factor, compute_frequencies, compute_rotary_cos_sin

CPU = torch.device("cpu")
# (our section, the section of transformers without its rope_type)
YARN = {"name": "yarn", "factor": 4.0, "original_max_seq_len": 64}
LLAMA3 = {"name": "llama3", "factor": 8.0, "original_max_seq_len": 64}
SCALINGS = {
    "linear": ({"name": "linear", "factor": 4.0}, {"factor": 4.0}),
    "dynamic": (
        {"name": "dynamic", "factor": 4.0, "original_max_seq_len": 256, "length": 1024},
        {"factor": 4.0},
    ),
    "llama3": (
        {**LLAMA3, "low_freq_factor": 0.5, "high_freq_factor": 6.0},
        {"factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 6.0, "original_max_position_embeddings": 64},
    ),
    "yarn": (YARN, {"factor": 4.0, "original_max_position_embeddings": 64}),
    "yarn_untruncated": (
        {**YARN, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
        {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.5,
        },
    ),
}
HEAD_DIM, MAX_SEQ_LEN, THETA = 32, 256, 10_000.0


@pytest.fixture
def layer(settings):
    """Return a function that makes the config of a layer with one head; `changes` are its keys."""

    def make_layer(**changes):
        return settings(
            head_dim=HEAD_DIM, n_heads=1, n_kv_heads=1, max_seq_len=MAX_SEQ_LEN, rope_theta=THETA, **changes
        )

    return make_layer


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_those_of_transformers(name, fraction, layer):
    own_section, hf_section = SCALINGS[name]
    rope_type = own_section["name"]
    hf_config = LlamaConfig(
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_SEQ_LEN,
        rope_parameters={
            "rope_type": rope_type,
            "rope_theta": THETA,
            "partial_rotary_factor": fraction,
            **hf_section,
        },
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS[rope_type](hf_config, CPU, seq_len=own_section.get("length"))
    config = layer(rope_scaling=own_section, rotary_fraction=fraction)
    actual = compute_frequencies(config, CPU)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert attention_factor(config.rope_scaling, config.max_seq_len) == pytest.approx(expected_factor)
    plain = compute_frequencies(layer(rotary_fraction=fraction), CPU)
    assert (actual / plain - 1).abs().max() > 0.1, "the scaling changes no frequency"


@pytest.mark.parametrize("length", [64, 256])
def test_longrope_equals_that_of_transformers(length, layer):
    short, long = [1.0 + index / 8 for index in range(16)], [2.0 + index / 4 for index in range(16)]
    hf_config = Phi3Config(
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        max_position_embeddings=MAX_SEQ_LEN,
        original_max_position_embeddings=64,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": THETA,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": 64,
        },
    )
    expected, expected_factor = ROPE_INIT_FUNCTIONS["longrope"](hf_config, CPU, seq_len=length)
    section = {"name": "longrope", "original_max_seq_len": 64, "short_factors": short, "long_factors": long}
    config = layer(rope_scaling={**section, "length": length})
    torch.testing.assert_close(compute_frequencies(config, CPU), expected, rtol=1e-6, atol=0)
    assert attention_factor(config.rope_scaling, MAX_SEQ_LEN) == pytest.approx(expected_factor)
    assert expected_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_frequencies_do_not_depend_on_the_positions_of_a_rank(name, layer):
    """A context-parallel rank without the last positions must not choose other frequencies."""
    scaling = {"name": name, "original_max_seq_len": 64, "length": 128}
    scaling |= {"factor": 4.0} if name == "dynamic" else {"short_factors": [1.0] * 16, "long_factors": [2.0] * 16}
    config = layer(rope_scaling=scaling)
    for full, early in zip(
        compute_rotary_cos_sin(torch.arange(200), config), compute_rotary_cos_sin(torch.arange(8), config), strict=True
    ):
        assert torch.equal(full[:8], early)


def test_dimensions_beyond_the_fraction_do_not_rotate(layer):
    x = torch.randn(1, 5, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    cos, sin = compute_rotary_cos_sin(torch.arange(5), layer(rotary_fraction=0.25))
    assert cos.shape == (5, 4)
    rotated = apply_rotary(x, cos, sin)
    assert torch.equal(rotated[..., 8:], x[..., 8:])
    assert (rotated[:, 1:, :, :8] - x[:, 1:, :, :8]).abs().amin(dim=(0, 1, 2)).max() > 1e-3
