"""Kinds of layers: their names are checked, and each rule of a layer applies to each kind with the kind's own keys."""

import pytest
from pydantic import ValidationError

from dist_llm.config.check import check
from dist_llm.config.derive import resolve_config
from dist_llm.config.load import dump_config, load_config
from dist_llm.config.model_section import LayerKeys, LayerKind, UnresolvedModelConfig
from tests.config.test_check import TOKENIZER_SIZE, make_config


def check_model(world_size=1, **keys):
    """Return the violations of keys of section `model` as strings."""
    return [
        str(violation)
        for violation in check(make_config(**keys), world_size, TOKENIZER_SIZE)
        if violation.keys[0].startswith("model.")
    ]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"model__layers": ["a"]}, "model.layers: a is not a kind; model.kinds has: none"),
        (
            {"model__layers": ["a", "b"], "model__kinds": {"a": {}}},
            "model.layers: b is not a kind; model.kinds has: a",
        ),
        (
            {"model__kinds": {"a": {}}},
            "model.kinds: has no effect without model.layers; set the key, or remove kinds",
        ),
        (
            {"model__layers": ["a"], "model__kinds": {"a": {}, "b": {}}},
            "model.kinds.b: no layer is of this kind; add it to model.layers, or remove it",
        ),
        (
            {"model__layers": ["a", "a", "a"], "model__kinds": {"a": {}}},
            "model.layers: 3 names, but the model has 2 layers; list at most that many",
        ),
        (
            {"model__layers": ["a"], "model__kinds": {"a": {"positions": "learned"}}},
            "model.kinds.a.positions: learned applies to all layers; set it in model.positions",
        ),
        (
            {"model__layers": ["a"], "model__kinds": {"a": {"positions": "none", "rope_theta": 5.0}}},
            "model.kinds.a.rope_theta: has no effect with positions none; remove the key",
        ),
        (
            {"model__positions": "alibi", "model__layers": ["a"], "model__kinds": {"a": {"positions": "none"}}},
            "model.kinds.a.positions: has no effect with model.positions=alibi, whose bias all layers have; remove the "
            "key",
        ),
        (
            {"model__positions": "relative", "model__layers": ["a"], "model__kinds": {"a": {"n_heads": 8}}},
            "model.kinds.a.n_heads: all layers share the bias of relative positions, which has a value per head; "
            "remove the key",
        ),
        (
            {"model__layers": ["a", "b"], "model__kinds": {"a": {}, "b": {"n_heads": 6, "n_kv_heads": 4}}},
            "model.kinds.b.n_kv_heads: 4 key-value heads do not divide 6 query heads; set one of 1, 2, 3, 6",
        ),
        (
            {"model__layers": ["a"], "model__kinds": {"a": {"head_dim": 7}}},
            "model.kinds.a.head_dim: rope rotates pairs of dimensions, but a head has 7 dimensions; "
            "set an even head_dim, or make d_model / n_heads even",
        ),
    ],
)
def test_a_wrong_kind_is_refused(keys, expected):
    assert check_model(**keys) == [expected]


def test_the_sizes_of_each_kind_must_divide_over_tp():
    keys = {"model__layers": ["a", "b"], "model__kinds": {"a": {}, "b": {"d_ff": 33}}, "parallel__tp": 2}
    (violation,) = check_model(2, **keys)
    assert violation.startswith("model.kinds.b.d_ff: 33 hidden units do not divide over tp 2; tp can be 1, 3, 11, 33")


def test_an_encoder_decoder_has_no_kinds():
    keys = {"model__architecture": "encoder_decoder", "objective__name": "span", "data__seq_len": 64}
    assert check_model(**keys, model__layers=["a"], model__kinds={"a": {}}) == [
        "model.layers: kinds of layers are not supported in an encoder_decoder; remove the key"
    ]


def test_rope_theta_has_an_effect_if_a_kind_uses_it():
    kinds = {"a": {"positions": "rope"}, "b": {}}
    assert (
        check_model(model__positions="none", model__rope_theta=5.0, model__layers=["a", "b"], model__kinds=kinds) == []
    )


def test_only_keys_of_a_layer_can_differ():
    assert LayerKind.model_fields.keys() == LayerKeys.model_fields.keys()
    with pytest.raises(ValidationError, match=r"kinds\.a\.norm_eps"):
        UnresolvedModelConfig(d_model=8, n_layers=1, n_heads=1, layers=("a",), kinds={"a": {"norm_eps": 1e-3}})


def test_a_misspelled_key_of_a_kind_is_a_violation():
    _, violations = load_config({"run": {"dir": "x"}, "model": {"kinds": {"a": {"rope_tetha": 5.0}}}})
    assert "model.kinds.a.rope_tetha" in [violation.keys[0] for violation in violations]


def test_layers_repeat_the_names_and_inherit_derived_sizes():
    kinds = {"wide": {"n_heads": 8, "n_kv_heads": None, "attention_scale": None}, "plain": {}}
    config = make_config(
        model__n_layers=5, model__layers=["plain", "plain", "wide"], model__kinds=kinds, model__attention_scale=0.5
    )
    model = resolve_config(config, world_size=1, tokenizer_size=TOKENIZER_SIZE).model
    layers = [model.layer_config(layer) for layer in range(5)]
    assert [layer.n_heads for layer in layers] == [4, 4, 8, 4, 4]
    assert {layer.head_dim for layer in layers} == {8}, "head_dim is not derived from the keys of model"
    assert {layer.n_kv_heads for layer in layers} == {4}, "null does not give the size of model"
    assert [layer.attention_scale for layer in layers] == [0.5, 0.5, None, 0.5, 0.5], (
        "null does not give the default formula"
    )


def test_a_dumped_config_has_only_the_keys_that_a_kind_sets():
    kinds = {"a": {}, "b": {"n_heads": 2, "attention_scale": None}}
    config = resolve_config(
        make_config(model__layers=["a", "b"], model__kinds=kinds), world_size=1, tokenizer_size=TOKENIZER_SIZE
    )
    dumped = dump_config(config)
    assert "kinds:\n    a: {}\n    b:\n      n_heads: 2\n      attention_scale: null\n" in dumped
