"""Each decoder family computes the logits of transformers, and each of its settings matters (negative controls).

With the default fields of transformers, a missing setting can be invisible: without the cap of Gemma 2, logits change
by less than 1e-4. So the small models have values with a visible effect, and each setting is taken away once.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_llm.config.feedforward_sections import MoEConfig
from dist_llm.config.model_section import LayerKeys, ModelConfig
from dist_llm.convert.hf_config import build_hf_config, parse_hf_config
from dist_llm.convert.hf_families import DECODER_FAMILIES
from dist_llm.errors import CheckpointError
from dist_llm.models.build_model import build_model
from dist_llm.models.init import init_param_
from dist_llm.param_spec import collect_param_specs, iter_weights
from tests.convert.families import (
    FAMILIES,
    GROUPED,
    SMALL,
    VARIANTS,
    VOCAB,
    build_models,
    build_variant,
)

pytest.importorskip("transformers")

SEQ_LEN = 24
MAX_DIFFERENCE = 1e-5  # of logits in fp32, relative to the largest logit if that is above 1
MIN_EFFECT = 1e-3  # of a setting on the logits, relative to the largest logit
# The values of a Llama, for each setting that a family may have.
PLAIN: dict[str, Any] = {
    "rotary_fraction": 1.0,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "window": None,
    "positions": "rope",
    "qk_norm": False,
    "qkv_bias": False,
    "out_bias": False,
    "feedforward_bias": False,
    "attention_scale": None,
    "attention_cap": None,
    "logit_cap": None,
    "norm_order": "pre",
    "norm_weight": "plain",
    "norm_bias": False,
    "bias": False,
    "head_bias": False,
    "parallel_residual": "off",
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "attention_sinks": False,
}
# The plain values of the section `feedforward` of a model with experts.
PLAIN_ROUTER: dict[str, Any] = {
    "weight_scale": 1.0,
    "router_bias": False,
    "n_groups": 1,
    "n_shared_experts": 0,
    "selection_bias": False,
}
NO_EFFECT = {
    ("olmo", "norm_weight"),  # new weights are 1
    ("starcoder2", "norm_bias"),  # `bias` adds these biases too
}


def make_ids() -> Tensor:
    """Return random token ids [2, SEQ_LEN]."""
    return torch.randint(3, VOCAB, (2, SEQ_LEN), generator=torch.Generator().manual_seed(0))


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value or to 1."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_of_transformers(name: str) -> None:
    hf_model, native_model, _ = build_variant(name)
    ids = make_ids()
    assert relative_difference(native_model(ids), hf_model(input_ids=ids).logits) < MAX_DIFFERENCE


@pytest.mark.parametrize("name", VARIANTS)
def test_the_export_of_an_import_is_the_same_model(name: str) -> None:
    _, _, config = build_variant(name)
    family, _ = VARIANTS[name]
    exported = parse_hf_config(build_hf_config(config, family))
    assert exported == config or build_hf_config(exported, family) == build_hf_config(config, family)


def iter_settings(config: ModelConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Yield (setting, config in which this setting has the value of a Llama) for each setting of a model."""
    for key, plain in PLAIN.items():
        if getattr(config, key) != plain:
            changes = {key: plain}
            if key == "rotary_fraction":
                changes["rope_scaling"] = None  # has a factor for each rotated dimension
            yield key, config.model_copy(update=changes)
    if isinstance(config.feedforward, MoEConfig):
        for key, section in iter_routers(config.feedforward):
            yield f"feedforward.{key}", config.model_copy(update={"feedforward": section})
    if config.activation == "swiglu_clamped":
        yield "activation", config.model_copy(update={"activation": "swiglu"})
    for kind, section in config.kinds.items():
        for key in section.list_overrides().keys() & LayerKeys.model_fields.keys():
            plain = config.feedforward if key == "feedforward" else PLAIN[key]
            if getattr(section, key) != plain:
                changed = section.model_copy(update={key: plain})
                yield f"{kind}.{key}", config.model_copy(update={"kinds": {**config.kinds, kind: changed}})


def iter_routers(moe: MoEConfig) -> Iterator[tuple[str, MoEConfig]]:
    """Yield (key, section with another value of this key) for each key of a router that has an effect."""
    yield "top_k", moe.model_copy(update={"top_k": moe.top_k - 1})
    yield "score", moe.model_copy(update={"score": "sigmoid" if moe.score == "softmax" else "softmax"})
    yield "normalize_weights", moe.model_copy(update={"normalize_weights": not moe.normalize_weights})
    for key, plain in PLAIN_ROUTER.items():
        if getattr(moe, key) != plain:
            yield key, moe.model_copy(update={key: plain})


def build_with_weights_of(config: ModelConfig, original: nn.Module) -> nn.Module:
    """Build a model with the parameters and buffers of another one, where both have them."""
    model, weights = build_model(config).eval(), dict(iter_weights(original))
    specs = collect_param_specs(model)
    for name, parameter in iter_weights(model):
        if name in weights and weights[name].shape == parameter.shape:
            parameter.copy_(weights[name])
        elif name in specs:
            init_param_(parameter, name, specs[name].init, 0, parameter.shape, (0,) * parameter.ndim)
    return model


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_each_setting_has_an_effect(name: str) -> None:
    hf_model, native_model, config = build_variant(name)
    ids = make_ids()
    expected = hf_model(input_ids=ids).logits
    effects = {
        setting: relative_difference(build_with_weights_of(changed, native_model)(ids), expected)
        for setting, changed in iter_settings(config)
        if (name, setting) not in NO_EFFECT
    }
    invisible = {setting: effect for setting, effect in effects.items() if effect < MIN_EFFECT}
    assert not invisible, "without these settings, the logits are almost the same"


def test_every_family_has_a_small_model() -> None:
    assert DECODER_FAMILIES.keys() <= FAMILIES.keys()


LINEAR = {"rope_type": "linear", "factor": 8.0}
WINDOWS = {**GROUPED, "num_hidden_layers": 8, "sliding_window": 4}
# Fields of rotary positions as versions of transformers before 5 wrote them.
OLD_ROPE_FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {**GROUPED, "rope_theta": 500.0, "rope_scaling": LINEAR}),
    ("gemma3_text", {**WINDOWS, "rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": LINEAR}),
    ("olmo3", {**WINDOWS, "rope_theta": 5e5, "rope_scaling": LINEAR}),
    ("gpt_neox", {**SMALL, "rotary_emb_base": 500, "rotary_pct": 0.5}),
    ("phi", {**GROUPED, "rope_theta": 500.0, "partial_rotary_factor": 0.25}),
    *((family, GROUPED) for family in ("glm", "nemotron", "stablelm", "smollm3", "cohere")),
    ("gemma3_text", WINDOWS),
]


@pytest.mark.parametrize(("family", "fields"), OLD_ROPE_FIELDS)
def test_old_and_absent_fields_of_rope_mean_the_same_as_in_transformers(family: str, fields: dict[str, Any]) -> None:
    import transformers

    content: dict[str, Any] = getattr(transformers, FAMILIES[family][0])(**fields).to_dict()
    names = {name for name in content if name.startswith(("rope_", "rotary_")) or name == "partial_rotary_factor"}
    unrelated = {name: value for name, value in content.items() if name not in names}
    assert parse_hf_config({**unrelated, **fields}) == parse_hf_config(content)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_a_partial_rotation_that_transformers_ignores_is_refused(family: str) -> None:
    _, _, config = build_models(family)
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor 0\.5 is not supported"):
        parse_hf_config({**build_hf_config(config, family), "partial_rotary_factor": 0.5})
    partial = config.model_copy(update={"rotary_fraction": 0.5})
    with pytest.raises(CheckpointError, match=r"rotary_fraction 0.5 \(not 1.0\)"):
        build_hf_config(partial, family)


@pytest.mark.parametrize("fraction", [0.25, 1.0])
@pytest.mark.parametrize("family", ["glm", "phi", "gpt_neox", "nemotron", "stablelm"])
@torch.no_grad()
def test_any_part_of_a_head_can_rotate(family: str, fraction: float) -> None:
    """The value may differ from the default of the family."""
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": fraction}
    hf_model, native_model, config = build_models(family, rope_parameters=rope)
    assert config.rotary_fraction == fraction
    assert parse_hf_config(build_hf_config(config, family)).rotary_fraction == fraction
    ids = make_ids()
    assert relative_difference(native_model(ids), hf_model(input_ids=ids).logits) < MAX_DIFFERENCE
