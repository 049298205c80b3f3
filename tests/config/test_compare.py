"""Every key of a model is classified, and a change of one that decides the function is noticed."""

from typing import Any

import pytest
import torch

from dist_llm.config.compare import (
    MODEL_ROLES,
    OBJECTIVE_ROLES,
    PART_KEYS,
    REQUESTABLE,
    function_differences,
    function_of,
    other_differences,
    resume_differences,
)
from dist_llm.config.schema import Config, ModelConfig, ObjectiveConfig
from dist_llm.models.attention_mask import CAUSAL, EncoderInput
from dist_llm.models.build_model import build_model
from tests.laws.law import make_config
from tests.laws.layouts import T5

# Of each key another value than the law's model has, and what it takes for the key to have an effect.
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "architecture": ("encoder", {}),
    "d_model": (64, {}),
    "n_layers": (3, {}),
    "n_encoder_layers": (1, T5),
    "n_heads": (4, {}),
    "n_kv_heads": (2, {}),
    "head_dim": (8, {}),
    "d_ff": (64, {}),
    "vocab_size": (129, {}),
    "vocab_multiple": (8, {}),
    "max_seq_len": (64, {"positions": "learned"}),
    "positions": ("none", {}),
    "rope_theta": (500_000.0, {}),
    "relative_buckets": (16, T5),
    "relative_distance": (20, T5),
    "norm": ("layernorm", {}),
    "norm_eps": (1e-3, {}),
    "norm_order": ("post", {}),
    "norm_embedding": (True, {}),
    "activation": ("geglu", {}),
    "bias": (True, {}),
    "qkv_bias": (True, {}),
    "tie_embeddings": (True, {}),
    "head": ("mlm", {}),
    "attention_scale": (1.0, {}),
    "qk_norm": (True, {}),
    "logit_cap": (5.0, {}),
    "dropout": (0.1, {}),
    "stochastic_depth": (0.1, {}),
    "init": ("xavier", {}),
    "init_std": (0.1, {}),
}


def changed(config: Config, **keys: Any) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=keys)})


def pair(key: str) -> tuple[Config, Config]:
    value, needs = OTHER[key]
    before = make_config(1, needs)
    return before, changed(before, **{key: value})


def test_every_key_is_classified() -> None:
    assert set(MODEL_ROLES) == set(ModelConfig.model_fields) == set(OTHER), "classify the new key of ModelConfig"
    assert set(OBJECTIVE_ROLES) == set(ObjectiveConfig.model_fields), "classify the new key of ObjectiveConfig"
    assert set(REQUESTABLE) >= PART_KEYS


@pytest.mark.parametrize("key", OTHER)
def test_a_change_of_the_key_is_noticed_as_its_role_says(key: str) -> None:
    before, now = pair(key)
    function, other = function_differences(before, now), other_differences(before, now)
    expected = function if MODEL_ROLES[key] != "training" else other
    assert [(each.key, each.before, each.now) for each in expected] == [
        (f"model.{key}", getattr(before.model, key), getattr(now.model, key))
    ]
    assert len(function) + len(other) == 1
    assert function_differences(before, before) == other_differences(before, before) == []


@pytest.mark.parametrize("key", OTHER)
def test_the_role_is_that_of_the_model(key: str) -> None:
    """The parameters of one model give another one other logits exactly where the key decides the function."""
    before, now = pair(key)
    roles = [changed_outputs(each) for each in (before, now)]
    same = roles[0].shape == roles[1].shape and torch.allclose(*roles, rtol=1e-5, atol=1e-6)
    # An encoder is the same module as a decoder: what it sees comes with the batch.
    assert same == (MODEL_ROLES[key] == "training" or key in ("architecture", "max_seq_len"))


@torch.no_grad()
def changed_outputs(config: Config) -> torch.Tensor:
    """Logits of a model whose parameters depend on their names and elements alone."""
    model = build_model(config.model).eval()
    for name, parameter in model.named_parameters():
        numbers = torch.arange(parameter.numel()) + sum(map(ord, name))
        parameter.copy_(torch.sin(numbers.double() * 0.7).float().reshape(parameter.shape) * 0.5)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
    ids = torch.arange(24).reshape(2, 12) * 7 % 129
    extra = {"encoder_input": EncoderInput(ids.flip(1))} if config.model.architecture == "encoder_decoder" else {}
    return model(ids, mask=CAUSAL, **extra)


def test_a_key_without_effect_is_no_difference() -> None:
    before = make_config(1, {"positions": "none"})
    assert function_differences(before, changed(before, rope_theta=5e5, max_seq_len=64, relative_buckets=8)) == []
    explicit = changed(before, attention_scale=before.model.head_dim**-0.5)
    assert function_differences(before, explicit) == []
    biased = make_config(1, {"bias": True})
    assert function_differences(biased, changed(biased, qkv_bias=True)) == []
    assert function_of(biased.model)["rope_theta"] == 10_000.0


def test_an_objective_is_compared_by_what_the_model_learns_from() -> None:
    before = make_config(1, {}, objective={"name": "span", "mode": "R"}, data={"seq_len": 64})
    rate = before.model_copy(update={"objective": before.objective.model_copy(update={"noise_density": 0.5})})
    assert function_differences(before, rate) == []
    for key, value in (("name", "prefix"), ("mode", "X"), ("see_prefix", False)):
        other = before.model_copy(update={"objective": before.objective.model_copy(update={key: value})})
        assert [each.key for each in function_differences(before, other)] == ["objective"]
        assert resume_differences(before, other) == [], "data.json and data.on_change decide"


def test_a_resume_cannot_change_rows_of_padding_or_the_mask() -> None:
    before = make_config(1, {})
    assert [each.key for each in resume_differences(before, changed(before, vocab_multiple=64))] == [
        "model.vocab_multiple"
    ]
    assert resume_differences(before, changed(before, vocab_multiple=2)) != []
    masked = before.model_copy(update={"data": before.data.model_copy(update={"document_mask": True})})
    assert [each.key for each in resume_differences(before, masked)] == ["data.document_mask"]
    new = masked.model_copy(update={"data": masked.data.model_copy(update={"on_change": "new_segment"})})
    assert resume_differences(before, new) == []
