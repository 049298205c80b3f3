"""Each key of a model has a role. A change of a key that affects the function of the model is detected.

The function of a model is the map from tokens and parameters to logits.
"""

from typing import Any

import pytest
import torch

from dist_llm.config.compare import (
    MODEL_ROLES,
    OBJECTIVE_ROLES,
    PARAMETER_KEYS,
    REQUESTABLE,
    find_function_differences,
    find_other_differences,
    find_resume_differences,
    get_function_keys,
    merge_model_keys,
)
from dist_llm.config.feedforward_sections import MoEConfig
from dist_llm.config.model_section import LayerKind, ModelConfig
from dist_llm.config.objective_sections import ObjectiveConfig
from dist_llm.config.parametrization_sections import MupConfig
from dist_llm.config.rope_sections import LinearScaling
from dist_llm.config.schema import Config
from dist_llm.config.section import get_union_members
from dist_llm.models.attention_mask import CAUSAL, EncoderInput
from dist_llm.models.build_model import build_model
from tests.laws.law import make_config
from tests.laws.layouts import T5

KINDS: dict[str, Any] = {"layers": ["a", "b"], "kinds": {"a": {}, "b": {"rope_theta": 500.0}}}

# For each key of the model: a value that differs from its default in law.py, and the keys that give it an effect.
OTHER_VALUES: dict[str, tuple[Any, dict[str, Any]]] = {
    "architecture": ("encoder", {}),
    "d_model": (64, {}),
    "n_layers": (3, {}),
    "n_encoder_layers": (1, T5),
    "n_heads": (4, {}),
    "n_kv_heads": (2, {}),
    "head_dim": (8, {}),
    "feedforward": (MoEConfig(n_experts=8, top_k=2, d_expert=16), {}),
    "d_ff": (64, {}),
    "vocab_size": (129, {}),
    "vocab_multiple": (8, {}),
    "max_seq_len": (64, {"positions": "learned"}),
    "positions": ("none", {}),
    "rope_theta": (500_000.0, {}),
    "rotary_fraction": (0.5, {"head_dim": 8}),
    "rope_scaling": (LinearScaling(factor=2.0), {}),
    "window": (3, {}),
    "relative_buckets": (16, T5),
    "relative_distance": (20, T5),
    "norm": ("layernorm", {}),
    "norm_eps": (1e-3, {}),
    "norm_order": ("post", {}),
    "norm_weight": ("plus_one", {}),
    "norm_bias": (True, {"norm": "layernorm"}),
    "norm_embedding": (True, {}),
    "parallel_residual": ("two_norms", {}),
    "embedding_scale": (2.0, {}),
    "residual_scale": (0.5, {}),
    "logit_scale": (0.5, {}),
    "activation": ("geglu", {}),
    "bias": (True, {}),
    "qkv_bias": (True, {}),
    "out_bias": (True, {}),
    "feedforward_bias": (True, {}),
    "tie_embeddings": (True, {}),
    "head": ("mlm", {}),
    "head_bias": (True, {}),
    "attention_scale": (1.0, {}),
    "qk_norm": (True, {}),
    "attention_cap": (0.5, {}),
    "attention_sinks": (True, {}),
    "output_gate": ("per_head", {}),
    "logit_cap": (5.0, {}),
    "dropout": (0.1, {}),
    "stochastic_depth": (0.1, {}),
    "layers": (("b", "a"), KINDS),
    "kinds": ({"a": LayerKind(), "b": LayerKind(rope_theta=100.0)}, KINDS),
    "init": ("xavier", {}),
    "init_std": (0.1, {}),
    "parametrization": (MupConfig(base_d_model=8), {}),
}


def change_model(config: Config, **keys: Any) -> Config:
    """Return the config with other values of these keys of section `model`."""
    return config.model_copy(update={"model": config.model.model_copy(update=keys)})


def make_config_pair(key: str) -> tuple[Config, Config]:
    """Return two configs that differ in one key of section `model`, with the keys that it requires."""
    value, required_keys = OTHER_VALUES[key]
    previous = make_config(ranks=1, model=required_keys)
    return previous, change_model(previous, **{key: value})


def test_every_key_has_a_role() -> None:
    assert set(MODEL_ROLES) == set(ModelConfig.model_fields), "a key of ModelConfig has no role: add it to MODEL_ROLES"
    of_other_packages = {"mixer", "mixer_options"}
    assert set(MODEL_ROLES) - of_other_packages == set(OTHER_VALUES), "a key has no other value: add it to OTHER_VALUES"
    objective_keys = {key for member in get_union_members(ObjectiveConfig).values() for key in member.model_fields}
    assert set(OBJECTIVE_ROLES) == objective_keys, "a key of the objectives has no role: add it to OBJECTIVE_ROLES"
    assert set(REQUESTABLE) >= PARAMETER_KEYS


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_change_is_reported_by_the_role_of_its_key(key: str) -> None:
    previous, current = make_config_pair(key)
    of_function, of_training = find_function_differences(previous, current), find_other_differences(previous, current)
    expected = of_function if MODEL_ROLES[key] != "training" else of_training
    assert [(difference.key, difference.saved, difference.current) for difference in expected] == [
        (f"model.{key}", previous.model.model_dump()[key], current.model.model_dump()[key])
    ]
    assert len(of_function) + len(of_training) == 1
    assert find_function_differences(previous, previous) == find_other_differences(previous, previous) == []


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_the_role_of_a_key_matches_the_logits(key: str) -> None:
    """Two models with the same parameters have different logits if and only if the key affects the function."""
    previous, current = make_config_pair(key)
    previous_logits, logits = compute_logits(previous), compute_logits(current)
    is_same = previous_logits.shape == logits.shape and torch.allclose(previous_logits, logits, rtol=1e-5, atol=1e-6)
    # An encoder is the same module as a decoder; the batch contains the attention mask.
    assert is_same == (MODEL_ROLES[key] == "training" or key in ("architecture", "max_seq_len"))


@torch.no_grad()
def compute_logits(config: Config) -> torch.Tensor:
    """Return the logits of a model whose parameters depend only on their names and elements."""
    model = build_model(config.model).eval()
    for name, parameter in model.named_parameters():
        element_ids = torch.arange(parameter.numel()) + sum(map(ord, name))
        parameter.copy_(torch.sin(element_ids.double() * 0.7).float().reshape(parameter.shape) * 0.5)
        if "norm" in name and name.endswith("weight"):
            parameter.add_(1.0)
    ids = torch.arange(24).reshape(2, 12) * 7 % 129
    if config.model.architecture == "encoder_decoder":
        return model(ids, mask=CAUSAL, encoder_input=EncoderInput(ids.flip(1)))
    return model(ids, mask=CAUSAL)


def test_a_change_without_effect_is_not_a_difference() -> None:
    previous = make_config(ranks=1, model={"positions": "none"})
    changed = change_model(previous, rope_theta=5e5, max_seq_len=64, relative_buckets=8)
    assert find_function_differences(previous, changed) == []
    explicit = change_model(previous, attention_scale=previous.model.head_dim**-0.5)
    assert find_function_differences(previous, explicit) == []
    biased = make_config(ranks=1, model={"bias": True})
    assert find_function_differences(biased, change_model(biased, qkv_bias=True)) == []
    assert get_function_keys(biased.model)["rope_theta"] == 10_000.0
    layered = make_config(ranks=1, model=KINDS)
    kinds = {"x": LayerKind(), "y": LayerKind(rope_theta=500.0)}
    assert find_function_differences(layered, change_model(layered, layers=("x", "y"), kinds=kinds)) == []
    assert find_function_differences(previous, change_model(previous, layers=("x",), kinds=kinds)) == []


def test_objectives_are_compared_by_their_effect_on_the_function() -> None:
    previous = make_config(ranks=1, objective={"name": "span", "mode": "R"}, data={"seq_len": 64})
    denser = previous.model_copy(update={"objective": previous.objective.model_copy(update={"noise_density": 0.5})})
    assert find_function_differences(previous, denser) == []
    for key, value in (("name", "prefix"), ("mode", "X"), ("see_prefix", False)):
        changed = previous.model_copy(update={"objective": previous.objective.model_copy(update={key: value})})
        assert [difference.key for difference in find_function_differences(previous, changed)] == ["objective"]
        assert find_resume_differences(previous, changed) == [], (
            "changed objectives, which the data history handles, are a difference"
        )


def test_a_resume_cannot_change_vocabulary_padding_or_the_mask() -> None:
    previous = make_config(ranks=1)
    padded = change_model(previous, vocab_multiple=64)
    assert [difference.key for difference in find_resume_differences(previous, padded)] == ["model.vocab_multiple"]
    assert find_resume_differences(previous, change_model(previous, vocab_multiple=2)) != []
    masked = previous.model_copy(update={"data": previous.data.model_copy(update={"document_mask": True})})
    assert [difference.key for difference in find_resume_differences(previous, masked)] == ["data.document_mask"]
    new_segment = masked.model_copy(update={"data": masked.data.model_copy(update={"on_change": "new_segment"})})
    assert find_resume_differences(previous, new_segment) == []


EXPERTS = {"name": "moe", "n_experts": 4, "top_k": 2, "d_expert": 48}
SOME_EXPERTS = {"layers": ["moe", "dense"], "kinds": {"moe": {}, "dense": {"feedforward": {"name": "dense"}}}}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"feedforward": EXPERTS, "d_ff": None}, ["model.feedforward"]),
        ({"feedforward": EXPERTS, **SOME_EXPERTS}, ["model.feedforward"]),
        ({"feedforward": EXPERTS, **SOME_EXPERTS, "d_ff": 64}, ["model.d_ff", "model.feedforward"]),
        ({"d_ff": 64}, ["model.d_ff"]),
    ],
)
def test_d_ff_is_compared_in_layers_that_are_dense_in_both_models(model: dict[str, Any], expected: list[str]) -> None:
    differences = find_function_differences(make_config(ranks=1), make_config(ranks=1, model=model))
    assert sorted(difference.key for difference in differences) == expected


def test_a_model_of_a_checkpoint_loses_d_ff_if_all_layers_get_experts() -> None:
    """The key would have no effect, and the rules refuse such a key."""
    saved = make_config(ranks=1).model.model_dump()
    for keys, d_ff in (({"feedforward": EXPERTS}, None), ({"feedforward": EXPERTS, **SOME_EXPERTS}, 48), ({}, 48)):
        allowed = ["model.feedforward", "model.layers", "model.kinds"]
        merged, violations = merge_model_keys(keys, saved, "dense", allowed)
        assert (merged["d_ff"], violations) == (d_ff, [])
