"""Configs of published mixtures of experts have the published numbers of parameters.

The reports give rounded numbers, which a wrong layer may also give. So the exact numbers are computed again here, from
the shapes in the reports.
"""

from pathlib import Path

import pytest

from dist_llm.config.derive import resolve_config
from dist_llm.config.load import load_config
from dist_llm.config.model_section import ModelConfig
from dist_llm.models.build_model import count_parameters, format_parameter_counts

MIXTRAL_EXPERT = 3 * 4096 * 14336
MIXTRAL_REST = 32 * (2 * 4096**2 + 2 * 4096 * 8 * 128 + 8 * 4096 + 2 * 4096) + 2 * 32000 * 4096 + 4096
QWEN3_EXPERT = 3 * 2048 * 768
QWEN3_REST = (
    48 * (2 * 2048 * 32 * 128 + 2 * 2048 * 4 * 128 + 2 * 128 + 128 * 2048 + 2 * 2048) + 2 * 151936 * 2048 + 2048
)
GPT_OSS_EXPERT = 3 * 2880**2 + 3 * 2880
GPT_OSS_HEADS = (64 + 2 * 8) * 64  # dimensions of queries, keys and values
GPT_OSS_ATTENTION = (2880 + 1) * GPT_OSS_HEADS + (64 * 64 + 1) * 2880 + 64
GPT_OSS_REST = 36 * (GPT_OSS_ATTENTION + 128 * (2880 + 1) + 2 * 2880) + 2 * 201088 * 2880 + 2880

# {config: (layers, experts, chosen experts, parameters of an expert, other parameters)}
SHAPES = {
    "mixtral-8x7b": (32, 8, 2, MIXTRAL_EXPERT, MIXTRAL_REST),
    "qwen3-30b-a3b": (48, 128, 8, QWEN3_EXPERT, QWEN3_REST),
    "gpt-oss-120b": (36, 128, 4, GPT_OSS_EXPERT, GPT_OSS_REST),
}
# Billions of parameters in the reports: all, and those that a token uses. The report of gpt-oss counts no embedding as
# used, only the head.
PUBLISHED = {"mixtral-8x7b": (46.7, 12.9), "qwen3-30b-a3b": (30.5, 3.3), "gpt-oss-120b": (116.83, 5.13)}
UNCOUNTED = {"gpt-oss-120b": 201088 * 2880}


def read_model(name: str) -> ModelConfig:
    config, violations = load_config(Path(name))
    assert violations == []
    assert config is not None
    return resolve_config(config, 8, tokenizer_size=4096).model


@pytest.mark.parametrize("name", SHAPES)
def test_the_number_of_parameters_is_that_of_the_published_shapes(name: str) -> None:
    num_layers, num_experts, top_k, expert, rest = SHAPES[name]
    counts = count_parameters(read_model(name))
    assert counts == (rest + num_layers * num_experts * expert, rest + num_layers * top_k * expert)


@pytest.mark.parametrize("name", SHAPES)
def test_the_number_of_parameters_is_published(name: str) -> None:
    total, active = count_parameters(read_model(name))
    published_total, published_active = PUBLISHED[name]
    assert total / 1e9 == pytest.approx(published_total, abs=0.05)
    # Qwen3 rounds 3.35 down.
    assert (active - UNCOUNTED.get(name, 0)) / 1e9 == pytest.approx(published_active, abs=0.06)


@pytest.mark.parametrize("name", SHAPES)
def test_the_comment_of_the_config_has_the_numbers(name: str) -> None:
    comment = (Path(__file__).parents[2] / "configs" / f"{name}.yaml").read_text()
    assert format_parameter_counts(read_model(name)) in comment


def test_a_token_of_the_demo_uses_as_many_parameters_with_experts() -> None:
    """Beside the weights of the routers: d_model x experts in each layer."""
    num_dense, _ = count_parameters(read_model("demo"))
    _, num_active = count_parameters(read_model("demo-moe"))
    assert num_active == num_dense + 4 * 192 * 8
