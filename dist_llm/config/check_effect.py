"""Reject keys without an effect: the user has changed the value, but this config never reads it.

A key whose effect depends on the number of ranks (such as parallel.reshard) is accepted, because one config must run on
a laptop and on a cluster. The unions of `section.py` reject keys of another optimizer, schedule or objective.
`check_engine.py` rejects keys of another engine.
"""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from dist_llm.config.derive import iter_layer_models
from dist_llm.config.load import Violation
from dist_llm.config.objective_sections import MixtureConfig
from dist_llm.config.schema import UnresolvedConfig

# (key, whether it has an effect, the condition to satisfy)
Rule = tuple[str, Callable[[UnresolvedConfig], Any], str]


def _any_layer_has(key: str, value: str) -> Callable[[UnresolvedConfig], bool]:
    """Return a function that returns whether a layer of a config has this value of a key of `model`.

    `key` may name a key of a section, such as `feedforward.name`.
    """
    get_value = attrgetter(key)
    return lambda config: any(get_value(model) == value for _, model in iter_layer_models(config.model))


RULES: tuple[Rule, ...] = (
    ("model.d_ff", _any_layer_has("feedforward.name", "dense"), "a layer with feedforward.name=dense"),
    ("parallel.ep", _any_layer_has("feedforward.name", "moe"), "a layer with model.feedforward.name=moe"),
    ("parallel.ep_dispatch", lambda config: config.parallel.ep > 1, "parallel.ep above 1"),
    ("model.rope_theta", _any_layer_has("positions", "rope"), "model.positions=rope"),
    ("model.rotary_fraction", _any_layer_has("positions", "rope"), "model.positions=rope"),
    ("model.rope_scaling", _any_layer_has("positions", "rope"), "model.positions=rope"),
    *(
        (f"model.{name}", lambda config: not config.model.bias, "model.bias=false")
        for name in ("qkv_bias", "out_bias", "feedforward_bias")
    ),
    (
        "model.norm_bias",
        lambda config: config.model.norm == "layernorm" and not config.model.bias,
        "model.norm=layernorm and bias=false",
    ),
    ("model.head_bias", lambda config: config.model.head != "mlm", "model.head=linear"),
    ("model.relative_buckets", _any_layer_has("positions", "relative"), "model.positions=relative"),
    ("model.relative_distance", _any_layer_has("positions", "relative"), "model.positions=relative"),
    (
        "optim.implementation",
        lambda config: config.optim.name == "sgd" or config.optim.moments == "fp32",
        "optim.moments=fp32",
    ),
    ("optim.decay_embeddings", lambda config: config.optim.weight_decay, "optim.weight_decay above 0"),
    ("parallel.pp_schedule", lambda config: config.parallel.pp > 1, "parallel.pp above 1"),
    ("parallel.pp_split", lambda config: config.parallel.pp > 1, "parallel.pp above 1"),
    ("parallel.sequence_parallel", lambda config: config.parallel.tp > 1, "parallel.tp above 1"),
    ("parallel.async_tp", lambda config: config.parallel.tp > 1, "parallel.tp above 1"),
    ("parallel.recompute_budget", lambda config: config.compile, "compile=true"),
    (
        "guard.skip_steps",
        lambda config: "rewind" in (config.guard.not_finite, config.guard.spike),
        "guard.not_finite or guard.spike=rewind",
    ),
    (
        "guard.budget",
        lambda config: {"rewind", "skip"} & _get_guard_policies(config),
        "a policy of guard that skips or rewinds",
    ),
    ("eval.sample_tokens", lambda config: config.eval.sample_prompt, "eval.sample_prompt"),
)


def check_effect(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield a violation for each key that is set and has no effect in this config."""
    for key, has_effect, condition in RULES:
        section_name, name = key.split(".")
        section = getattr(config, section_name)
        if name in type(section).model_fields and _is_changed(section, name) and not has_effect(config):
            value = getattr(section, name)
            yield Violation((key,), f"{value} has no effect without {condition}; remove the key, or set {condition}")
    yield from _check_weight(config)
    yield from _check_epochs(config)


def _check_weight(config: UnresolvedConfig) -> Iterator[Violation]:
    if not isinstance(config.objective, MixtureConfig) and _is_changed(config.objective, "weight"):
        yield Violation(("objective.weight",), "has no effect without objective.mixture; remove the key")


def _check_epochs(config: UnresolvedConfig) -> Iterator[Violation]:
    for index, source in enumerate(config.data.sources):
        if source.weight and _is_changed(source, "epochs"):
            yield Violation((f"data.sources.{index}.epochs",), "has no effect beside a weight; remove one of the two")


def _is_changed(section: Any, name: str) -> bool:
    """Return whether the value of a key differs from its default."""
    return bool(getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True))


def _get_guard_policies(config: UnresolvedConfig) -> set[str]:
    """Return what the guard does after a bad step or a hardware error, such as `rewind`."""
    return {config.guard.not_finite, config.guard.spike, config.guard.corrupt}
