"""Reject keys that have no effect: their value is not the default, but nothing reads it.

A key whose effect depends on the number of ranks (such as parallel.reshard) is accepted, so that one config runs on a
laptop and on a cluster. Keys of another optimizer, schedule or objective are rejected by the unions of `section.py`,
keys of another engine by `check_engine.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from dist_llm.config.load import Violation
from dist_llm.config.objective_sections import MixtureConfig
from dist_llm.config.schema import UnresolvedConfig

# (key, whether it has an effect, the condition to satisfy)
Rule = tuple[str, Callable[[UnresolvedConfig], Any], str]


def _positions(*kinds: str) -> Callable[[UnresolvedConfig], bool]:
    return lambda config: config.model.positions in kinds


RULES: tuple[Rule, ...] = (
    ("model.rope_theta", _positions("rope"), "model.positions=rope"),
    ("model.relative_buckets", _positions("relative"), "model.positions=relative"),
    ("model.relative_distance", _positions("relative"), "model.positions=relative"),
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
    ("guard.budget", lambda config: {"rewind", "skip"} & _policies(config), "a policy of guard that skips or rewinds"),
    ("eval.sample_tokens", lambda config: config.eval.sample_prompt, "eval.sample_prompt"),
)


def check_effect(config: UnresolvedConfig) -> Iterator[Violation]:
    """Yield a violation for each key that is set and has no effect in this config."""
    for key, has_effect, needed in RULES:
        section, name = key.split(".")
        values = getattr(config, section)
        if name in type(values).model_fields and _is_changed(values, name) and not has_effect(config):
            value = getattr(values, name)
            yield Violation((key,), f"{value} has no effect without {needed}; remove the key, or set {needed}")
    yield from _check_weight(config)
    yield from _check_epochs(config)


def _check_weight(config: UnresolvedConfig) -> Iterator[Violation]:
    if not isinstance(config.objective, MixtureConfig) and _is_changed(config.objective, "weight"):
        yield Violation(("objective.weight",), "has no effect without objective.mixture; remove the key")


def _check_epochs(config: UnresolvedConfig) -> Iterator[Violation]:
    for number, source in enumerate(config.data.sources):
        if source.weight and _is_changed(source, "epochs"):
            yield Violation((f"data.sources.{number}.epochs",), "has no effect beside a weight; remove one of the two")


def _is_changed(section: Any, name: str) -> bool:
    """Return whether the value of a key differs from its default."""
    return bool(getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True))


def _policies(config: UnresolvedConfig) -> set[str]:
    return {config.guard.not_finite, config.guard.spike, config.guard.corrupt}
