"""Refuse keys that have no effect: a value other than the default, where nothing reads it.

A key whose effect depends on the number of ranks (parallel.reshard and its like) is not refused, so that one config
runs on a laptop and on a cluster. Nor is schedule.decay_steps, which a run's own config.yaml holds for every schedule.
Keys of another engine: `check_engine.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any

from dist_llm.config.load import Violation
from dist_llm.config.schema import Config, ObjectiveSpec

# (key, whether it has an effect, what it needs)
Rule = tuple[str, Callable[[Config], Any], str]


def _positions(*kinds: str) -> Callable[[Config], bool]:
    return lambda config: config.model.positions in kinds


def _optimizer(*names: str) -> Callable[[Config], bool]:
    return lambda config: config.optim.name in names


def _schedule(*names: str) -> Callable[[Config], bool]:
    return lambda config: config.schedule.name in names


RULES: tuple[Rule, ...] = (
    ("model.rope_theta", _positions("rope"), "model.positions=rope"),
    ("model.relative_buckets", _positions("relative"), "model.positions=relative"),
    ("model.relative_distance", _positions("relative"), "model.positions=relative"),
    ("optim.beta1", _optimizer("adamw", "muon"), "optim.name=adamw or muon"),
    ("optim.beta2", _optimizer("adamw", "muon"), "optim.name=adamw or muon"),
    ("optim.eps", _optimizer("adamw", "muon"), "optim.name=adamw or muon"),
    (
        "optim.implementation",
        lambda config: config.optim.name != "sgd" and config.optim.moments == "fp32",
        "optim.name=adamw or muon, and optim.moments=fp32",
    ),
    ("optim.muon_momentum", _optimizer("muon"), "optim.name=muon"),
    ("optim.momentum", _optimizer("sgd"), "optim.name=sgd"),
    ("optim.decay_embeddings", lambda config: config.optim.weight_decay, "optim.weight_decay above 0"),
    ("schedule.decay_fraction", _schedule("wsd"), "schedule.name=wsd"),
    ("schedule.min_ratio", lambda config: config.schedule.name != "constant", "another schedule.name than constant"),
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
OBJECTIVES_OF_KEY: dict[str, tuple[str, ...]] = {
    "see_prefix": ("prefix", "span"),
    "mask_rate": ("masked",),
    "whole_words": ("masked",),
    "noise_density": ("span",),
    "mean_span": ("span",),
    "fim_rate": ("fim",),
    "fim_spm_rate": ("fim",),
}


def check_effect(config: Config) -> Iterator[Violation]:
    """A violation for each key that is set and has no effect in this config."""
    for key, has_effect, needed in RULES:
        section, name = key.split(".")
        if _is_changed(getattr(config, section), name) and not has_effect(config):
            value = getattr(getattr(config, section), name)
            yield Violation((key,), f"{value} has no effect without {needed}; remove the key, or set {needed}")
    yield from _check_objectives(config)
    yield from _check_epochs(config)


def _check_objectives(config: Config) -> Iterator[Violation]:
    objective = config.objective
    if objective.mixture:
        for name in ObjectiveSpec.model_fields:
            if _is_changed(objective, name):
                yield Violation((f"objective.{name}",), "has no effect beside objective.mixture; set it in its entries")
    elif _is_changed(objective, "weight"):
        yield Violation(("objective.weight",), "has no effect without objective.mixture; remove the key")
    for number, component in enumerate(objective.components):
        prefix = f"objective.mixture.{number}" if objective.mixture else "objective"
        for name, objectives in OBJECTIVES_OF_KEY.items():
            if _is_changed(component, name) and component.name not in objectives:
                yield Violation(
                    (f"{prefix}.{name}", f"{prefix}.name"),
                    f"{getattr(component, name)} has no effect under {component.name}, only under "
                    f"{' or '.join(objectives)}; remove the key",
                )


def _check_epochs(config: Config) -> Iterator[Violation]:
    for number, source in enumerate(config.data.sources):
        if source.weight and _is_changed(source, "epochs"):
            yield Violation((f"data.sources.{number}.epochs",), "has no effect beside a weight; remove one of the two")


def _is_changed(section: Any, name: str) -> bool:
    """Whether the key has another value than its default."""
    return bool(getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True))


def _policies(config: Config) -> set[str]:
    return {config.guard.not_finite, config.guard.spike, config.guard.corrupt}
