"""The space of runs that the law tests cover: factors, their values, and the config of each combination.

A factor is a property of a run, such as `tp`, `model` or `optimizer`. A `Case` assigns a value to each factor.
covering.py and random_runs.py choose cases. `find_violations` says why a case is no valid run: a config rule refuses
it, or a value has no effect in it, such as a pipeline schedule without a pipeline.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_llm.config.check import check
from dist_llm.config.derive import AXES
from dist_llm.config.schema import UnresolvedConfig
from tests.laws.engines import ENGINE_SECTIONS, OFFLOADED_ENGINE_SECTIONS, assert_engine_matches_one_process
from tests.laws.law import GLOBAL_BATCH, assert_config_matches_one_process, make_config, make_raw_config
from tests.laws.layouts import ADAMW, BF16_MOMENTS, CLIPPED_SGD, DOCUMENTS, MODELS, MUON, PREFIX, PROMPT_WEIGHTS, UL2

Case = dict[str, Any]

MAX_RANKS = 8
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "clipped_sgd": CLIPPED_SGD,
    "momentum": CLIPPED_SGD | {"momentum": 0.5},
    "adamw": ADAMW,
    "muon": MUON,
    "bf16_moments": BF16_MOMENTS,
}
# Relative tolerance of the steps after the first with bf16 moments. Where the fp32 sums of two layouts differ in the
# last bit, a moment may be rounded up in one layout and down in the other.
BF16_MOMENTS_TOLERANCE = 1e-4
# The config sections of each value of the factors `objective` and `loss`.
OBJECTIVE_SECTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "prefix": PREFIX,
    "mixture": UL2,
    "documents": DOCUMENTS,
    "prompt_weights": PROMPT_WEIGHTS,
}
LOSS_SECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed_with_z_loss": {"loss": {"label_smoothing": 0.1, "z_loss": 1e-2}},
}

# Models that only slow tests combine with everything else: "gemma" has tied embeddings too, "phi" parallel sublayers.
SLOW_MODELS = ("tied", "neox", "bloom", "completep", "six_experts", "windows")
MODELS_WITH_EXPERTS = ("moe", "deepseek", "six_experts")
# The first value of each factor is its default.
FACTORS: dict[str, tuple[Any, ...]] = {
    "dp_replicate": (1, 2),
    "dp_shard": (1, 2, 3),
    "cp": (1, 2),
    "tp": (1, 2),
    "pp": (1, 2),
    "ep": (1, 2),
    "model": tuple(name for name in MODELS if name not in SLOW_MODELS),
    "objective": tuple(OBJECTIVE_SECTIONS),
    "loss": tuple(LOSS_SECTIONS),
    "optimizer": tuple(OPTIMIZERS),
    "microbatches": ("one", "several"),
    "sequence_parallel": (True, False),
    "pp_schedule": ("1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"),
    "pp_split": ("cost", "count"),
    "reshard": ("default", "always", "never"),
    "reduce_each_microbatch": (False, True),
    "cpu_offload": (False, True),
    "recompute": ("none", "full", "selective", "budget"),
    "compile": (False, True),
}
# For random runs: also mesh dimensions of 4, and the third-party engines.
WIDE_FACTORS = FACTORS | {
    "model": tuple(MODELS),
    "dp_shard": (1, 2, 3, 4),
    "cp": (1, 2, 4),
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "ep": (1, 2, 4),
    "engine": ("native", *ENGINE_SECTIONS, *OFFLOADED_ENGINE_SECTIONS),
}
# The values of these factors are not copied to the config section `parallel`. `recompute` is a key of that section, but
# its value "budget" stands for another key (`make_recompute_keys`).
FACTORS_OUTSIDE_PARALLEL_SECTION = (
    *("model", "objective", "loss", "optimizer", "microbatches", "recompute", "compile", "engine"),
)
PARALLEL_SECTION_KEYS = tuple(key for key in FACTORS if key not in FACTORS_OUTSIDE_PARALLEL_SECTION)
# Bytes that the blocks of all ranks together may save for backward. With this budget some blocks are recomputed and
# others are not.
ACTIVATION_BUDGET_BYTES = 10 << 20
# Option -> axes. The option has an effect only if at least one of the axes is larger than 1.
AXES_OF_OPTION: dict[str, tuple[str, ...]] = {
    "ep": ("dp_shard", "cp", "tp"),
    "sequence_parallel": ("tp",),
    "pp_schedule": ("pp",),
    "pp_split": ("pp",),
    "reshard": ("dp_shard", "cp"),
    "reduce_each_microbatch": ("dp_replicate", "dp_shard", "cp"),
    "cpu_offload": ("dp_replicate", "dp_shard", "cp"),
}


def count_ranks(case: Mapping[str, Any]) -> int:
    """Return the number of ranks of a case."""
    return math.prod(case[axis] for axis in AXES)


def choose_micro_batch(case: Case) -> int:
    """Return the number of sequences in a microbatch.

    The factor `microbatches` says whether a data-parallel rank splits its sequences into one or several microbatches.
    """
    local_batch = GLOBAL_BATCH // (case["dp_replicate"] * case["dp_shard"])
    if case["microbatches"] == "one":
        return local_batch
    num_microbatches = 4 if case["pp"] > 1 else 3
    return local_batch // num_microbatches if local_batch % num_microbatches == 0 else local_batch // 2


def make_config_sections(case: Case) -> dict[str, Any]:
    """Return the config sections of a case, as `make_raw_config` takes them."""
    sections = {**OBJECTIVE_SECTIONS[case["objective"]], **LOSS_SECTIONS[case["loss"]]}
    return {
        **sections,
        "optim": OPTIMIZERS[case["optimizer"]],
        "data": {**sections.get("data", {}), "micro_batch": choose_micro_batch(case)},
        "parallel": {key: case[key] for key in PARALLEL_SECTION_KEYS} | make_recompute_keys(case),
        "compile": case["compile"],
        **(ENGINE_SECTIONS | OFFLOADED_ENGINE_SECTIONS).get(case.get("engine", "native"), {}),
    }


def make_recompute_keys(case: Case) -> dict[str, Any]:
    """Return the config keys of activation checkpointing: a budget in GiB per rank, or a mode for all blocks."""
    if case["recompute"] == "budget":
        return {"activations_gib": ACTIVATION_BUDGET_BYTES / count_ranks(case) / (1 << 30)}
    return {"recompute": case["recompute"]}


def assert_case_matches_one_process(case: Case) -> None:
    """Run two training steps of the case on its ranks.

    Raises AssertionError unless losses, gradients and parameters match those of one process.
    """
    later_tolerance = BF16_MOMENTS_TOLERANCE if case["optimizer"] == "bf16_moments" else None
    config = make_config(ranks=count_ranks(case), model=MODELS[case["model"]], **make_config_sections(case))
    if config.engine != "native":
        assert_engine_matches_one_process(ranks=count_ranks(case), config=config, steps=2)
        return
    assert_config_matches_one_process(config, ranks=count_ranks(case), steps=2, later_tolerance=later_tolerance)


def find_violations(case: Case) -> Iterator[str]:
    """Yield the reasons why the case is not a valid run, or has a value without effect."""
    if count_ranks(case) > MAX_RANKS:
        yield f"{count_ranks(case)} ranks, more than {MAX_RANKS}"
        return
    for option, axes in AXES_OF_OPTION.items():
        if case[option] != FACTORS[option][0] and all(case[axis] == 1 for axis in axes):
            yield f"{option}={case[option]} has no effect without {' or '.join(axes)}"
    if case["reduce_each_microbatch"] and case["microbatches"] == "one":
        yield "reduce_each_microbatch has no effect on one microbatch"
    if count_ranks(case) == 1:
        yield "one process is the reference"
    config = UnresolvedConfig.model_validate(make_raw_config(model=MODELS[case["model"]], **make_config_sections(case)))
    yield from (str(violation) for violation in check(config, count_ranks(case), tokenizer_size=0))


def complete_case(
    rng: random.Random,
    fixed: Mapping[str, Any],
    preferred: Mapping[str, Any],
    factors: Mapping[str, Sequence[Any]] = FACTORS,
) -> Case:
    """Return a random case with the `fixed` values.

    A factor that is not in `fixed` gets its value in `preferred`, or else a random value. If a fixed option needs an
    axis larger than 1, one of these axes (AXES_OF_OPTION) that is not in `fixed` is set to 2, and a fixed `ep` gets a
    model with experts. All options without an effect that are not in `fixed` get their default values.
    """
    case = {factor: preferred.get(factor, rng.choice(values)) for factor, values in factors.items()} | dict(fixed)
    if fixed.get("ep", 1) > 1 and "model" not in fixed:
        case["model"] = rng.choice([model for model in factors["model"] if model in MODELS_WITH_EXPERTS])
    for option, axes in AXES_OF_OPTION.items():
        if case[option] == FACTORS[option][0] or any(case[axis] > 1 for axis in axes):
            continue
        free_axes = [axis for axis in axes if axis not in fixed]
        if option in fixed and free_axes:
            case[rng.choice(free_axes)] = 2
    return reset_options_without_effect(case) | dict(fixed)


def reset_options_without_effect(case: Case) -> Case:
    """Return the case with the default of each option that has no effect on the axes of the case."""
    options_without_effect = [
        option for option, axes in AXES_OF_OPTION.items() if all(case[axis] == 1 for axis in axes)
    ]
    if case["model"] not in MODELS_WITH_EXPERTS:
        options_without_effect.append("ep")
    return case | {option: FACTORS[option][0] for option in options_without_effect}


def draw_valid_case(
    rng: random.Random, fixed: Mapping[str, Any], preferred: Mapping[str, Any] | None = None, max_draws: int = 2000
) -> Case | None:
    """Draw up to `max_draws` cases with `complete_case`. Return the first valid case, or None if no case is valid."""
    for _ in range(max_draws):
        case = complete_case(rng, fixed, preferred or {})
        if not any(find_violations(case)):
            return case
    return None


def format_case(case: Case) -> str:
    """Format the values of a case that are not defaults, such as `dp_shard=2 tp=2 optimizer=muon`."""
    return " ".join(f"{key}={value}" for key, value in case.items() if value != WIDE_FACTORS[key][0])
