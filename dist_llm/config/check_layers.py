"""Check the layers of a model: the names of their kinds, and the rules of one layer for each kind."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from dist_llm.config.derive import count_rotated_dims, format_divisors, iter_layer_models, resolve_d_ff
from dist_llm.config.feedforward_sections import DenseConfig, MoEConfig
from dist_llm.config.load import Violation
from dist_llm.config.model_section import ATTENTION, ATTENTION_KEYS, UnresolvedModelConfig
from dist_llm.config.registered_classes import check_registered_layers, check_registered_layout
from dist_llm.config.rope_sections import DynamicScaling, Llama3Scaling, LongropeScaling
from dist_llm.config.schema import UnresolvedConfig

LayerCheck = Callable[[UnresolvedConfig], Iterator[Violation]]


class ShardedSize(NamedTuple):
    """A size of a layer that must be a multiple of tp, and the keys that set it."""

    keys: tuple[str, ...]
    description: str
    size: int


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
    if "positions" in overrides and model.positions in ("relative", "alibi"):
        yield Violation(
            (f"model.kinds.{name}.positions", "model.positions"),
            f"has no effect with model.positions={model.positions}, whose bias all layers have; remove the key",
        )
    if overrides.get("positions") not in (None, "rope", "none"):
        yield Violation(
            (f"model.kinds.{name}.positions",), f"{positions} applies to all layers; set it in model.positions"
        )
    if overrides.get("mixer", model.mixer) != ATTENTION:
        for key in ATTENTION_KEYS:
            if key in overrides:
                yield Violation(
                    (f"model.kinds.{name}.{key}",), "only attention reads this key; remove it, or set mixer=attention"
                )
    for key in ("rope_theta", "rotary_fraction", "rope_scaling"):
        if overrides.get(key) is not None and positions != "rope":
            yield Violation((f"model.kinds.{name}.{key}",), f"has no effect with positions {positions}; remove the key")
    if "n_heads" in overrides and model.positions in ("relative", "alibi"):
        yield Violation(
            (f"model.kinds.{name}.n_heads", "model.positions"),
            f"all layers share the bias of {model.positions} positions, which has a value per head; remove the key",
        )


def check_each_kind(config: UnresolvedConfig, check_layer: LayerCheck) -> Iterator[Violation]:
    """Yield the violations of `check_layer` for each kind of layer. They name the keys of the kind that it sets."""
    for kind, model in iter_layer_models(config.model):
        for violation in check_layer(config.model_copy(update={"model": model})):
            keys = [_get_key_of_kind(config.model, kind, key) for key in violation.keys]
            # Keys of the kind come first, because the message starts with the first key.
            yield Violation(tuple(sorted(keys, key=lambda key: key in violation.keys)), violation.message)


def _get_key_of_kind(model: UnresolvedModelConfig, kind: str | None, key: str) -> str:
    """Return the key of the kind instead of the key of `model`, if the kind sets it."""
    section, _, name = key.partition(".")
    if kind is None or section != "model" or name.split(".")[0] not in model.kinds[kind].model_fields_set:
        return key
    return f"model.kinds.{kind}.{name}"


def check_one_layer(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations of the heads, the rotation and the window of a layer."""
    model = config.model
    yield from check_registered_layers(model)
    if model.mixer != ATTENTION:
        return
    if not model.head_dim and model.d_model % model.n_heads:
        yield Violation(
            ("model.n_heads", "model.d_model", "model.head_dim"),
            f"{model.n_heads} heads do not divide d_model {model.d_model}; set n_heads to one of "
            f"{format_divisors(model.d_model)}, or set model.head_dim",
        )
    elif model.positions == "rope":
        yield from _check_rotation(model)
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        yield Violation(
            ("model.n_kv_heads", "model.n_heads"),
            f"{model.n_kv_heads} key-value heads do not divide {model.n_heads} query heads; "
            f"set one of {format_divisors(model.n_heads)}",
        )
    if model.window and model.architecture != "decoder":
        yield Violation(
            ("model.window", "model.architecture"), "sliding windows need model.architecture=decoder; remove the key"
        )


def check_layer_layout(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield violations of the sizes of a layer that are sharded over tp, and of registered classes under the layout."""
    model, tp = config.model, config.parallel.tp
    sizes: list[ShardedSize] = []
    if model.mixer == ATTENTION:
        num_kv_heads = model.n_kv_heads or model.n_heads
        sizes.append(ShardedSize(("model.n_heads",), "query heads", model.n_heads))
        sizes.append(ShardedSize(("model.n_kv_heads", "model.n_heads"), "key-value heads", num_kv_heads))
    feedforward = model.feedforward
    if isinstance(feedforward, DenseConfig):
        sizes.append(ShardedSize(("model.d_ff", "model.d_model"), "hidden units", resolve_d_ff(model)))
    elif isinstance(feedforward, MoEConfig) and feedforward.n_shared_experts:
        keys = ("model.feedforward.d_expert", "model.feedforward.n_shared_experts")
        num_hidden_units = feedforward.d_expert * feedforward.n_shared_experts
        sizes.append(ShardedSize(keys, "hidden units of shared experts", num_hidden_units))
    for sharded in sizes:
        if sharded.size % tp:
            yield indivisible_by_tp(sharded.keys, sharded.description, sharded.size, tp)
    yield from check_registered_layout(model, tp, config.parallel.cp)


def indivisible_by_tp(keys: tuple[str, ...], description: str, size: int, tp: int) -> Violation:
    """Return the violation of a size that does not divide over tp."""
    return Violation(
        (*keys, "parallel.tp"), f"{size} {description} do not divide over tp {tp}; tp can be {format_divisors(size)}"
    )


def _check_rotation(model: UnresolvedModelConfig) -> Iterator[Violation]:
    num_rotated = count_rotated_dims(model)
    if num_rotated % 2 or not num_rotated:
        share = "a head has" if model.rotary_fraction == 1 else f"{model.rotary_fraction} of a head are"
        yield Violation(
            ("model.n_heads", "model.d_model", "model.head_dim", "model.rotary_fraction", "model.positions"),
            f"rope rotates pairs of dimensions, but {share} {num_rotated} dimensions; set an even head_dim, or make "
            "d_model / n_heads even",
        )
    scaling = model.rope_scaling
    if isinstance(scaling, LongropeScaling):
        for name in ("short_factors", "long_factors"):
            if len(getattr(scaling, name)) != num_rotated // 2:
                yield Violation(
                    (f"model.rope_scaling.{name}", "model.rope_scaling"),
                    f"{len(getattr(scaling, name))} numbers, but {num_rotated} dimensions rotate; list "
                    f"{num_rotated // 2}, one for each pair",
                )
    if isinstance(scaling, Llama3Scaling) and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield Violation(
            ("model.rope_scaling.low_freq_factor", "model.rope_scaling"),
            f"{scaling.low_freq_factor} must be less than high_freq_factor {scaling.high_freq_factor}",
        )
    if isinstance(scaling, DynamicScaling) and num_rotated <= 2:
        yield Violation(
            ("model.rope_scaling", "model.head_dim"), "dynamic scaling needs more than 2 rotated dimensions in a head"
        )


def check_residuals(model: UnresolvedModelConfig) -> Iterator[Violation]:
    """Yield violations of the order of norms and sublayers."""
    if model.parallel_residual != "off" and model.norm_order != "pre":
        yield Violation(
            ("model.parallel_residual", "model.norm_order"),
            f"parallel attention and feed-forward need norm_order pre, found {model.norm_order}; set one of the two",
        )
    if model.parallel_residual != "off" and model.architecture == "encoder_decoder":
        yield Violation(
            ("model.parallel_residual", "model.architecture"),
            "an encoder_decoder has cross-attention between attention and feed-forward; set parallel_residual to off",
        )
