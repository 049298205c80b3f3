"""Check `model.layers` and `model.kinds`, and apply the rules of one layer to each kind of layer."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dist_llm.config.derive import iter_layer_models
from dist_llm.config.load import Violation
from dist_llm.config.model_section import UnresolvedModelConfig
from dist_llm.config.schema import UnresolvedConfig

LayerCheck = Callable[[UnresolvedConfig], Iterator[Violation]]


def check_layers(model: UnresolvedModelConfig) -> Iterator[Violation]:
    """Yield violations of the names in `layers` and of `kinds`."""
    if model.kinds and not model.layers:
        yield Violation(
            ("model.kinds", "model.layers"), "has no effect without model.layers; set the key, or remove kinds"
        )
    if model.layers and model.architecture == "encoder_decoder":
        yield Violation(
            ("model.layers", "model.architecture"),
            "kinds of layers are not supported in an encoder_decoder; remove the key",
        )
    if len(model.layers) > model.n_layers:
        yield Violation(
            ("model.layers", "model.n_layers"),
            f"{len(model.layers)} names, but the model has {model.n_layers} layers; list at most that many",
        )
    for name in dict.fromkeys(model.layers):
        if name not in model.kinds:
            known = ", ".join(model.kinds) or "none"
            yield Violation(("model.layers",), f"{name} is not a kind; model.kinds has: {known}")
    for name, kind in model.kinds.items():
        if model.layers and name not in model.layers:
            yield Violation((f"model.kinds.{name}",), "no layer is of this kind; add it to model.layers, or remove it")
        yield from _check_kind(model, name, kind.list_overrides())


def _check_kind(model: UnresolvedModelConfig, name: str, overrides: Mapping[str, Any]) -> Iterator[Violation]:
    # A kind can only switch rotation on or off: other positional encodings belong to the model.
    positions = overrides.get("positions", model.positions)
    if overrides.get("positions") not in (None, "rope", "none"):
        yield Violation(
            (f"model.kinds.{name}.positions",), f"{positions} applies to all layers; set it in model.positions"
        )
    if "rope_theta" in overrides and positions != "rope":
        yield Violation(
            (f"model.kinds.{name}.rope_theta",), f"has no effect with positions {positions}; remove the key"
        )
    if "n_heads" in overrides and model.positions == "relative":
        yield Violation(
            (f"model.kinds.{name}.n_heads", "model.positions"),
            "all layers share the table of relative positions, which has a column per head; remove the key",
        )


def check_each_kind(config: UnresolvedConfig, check_layer: LayerCheck) -> Iterator[Violation]:
    """Yield the violations of `check_layer` for each kind of layer. They name the keys of the kind that it sets."""
    for kind, model in iter_layer_models(config.model):
        for violation in check_layer(config.model_copy(update={"model": model})):
            keys = [_key_of_kind(config.model, kind, key) for key in violation.keys]
            # Keys of the kind come first, because the message starts with the first key.
            yield Violation(tuple(sorted(keys, key=lambda key: key in violation.keys)), violation.message)


def _key_of_kind(model: UnresolvedModelConfig, kind: str | None, key: str) -> str:
    """Return the key of the kind instead of the key of `model`, if the kind sets it."""
    section, _, name = key.partition(".")
    if kind is None or section != "model" or name not in model.kinds[kind].model_fields_set:
        return key
    return f"model.kinds.{kind}.{name}"
