"""The space of runs that the law covers: factors, their values, and the config of each combination.

A `Case` assigns one value to each factor. `find_violations` lists why a case is not a valid run: a config rule refuses
it, or one of its values has no effect in it (a pipeline option without a pipeline), so that the case would cover
nothing.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_llm.config.check import check
from dist_llm.config.derive import AXES
from dist_llm.config.schema import UnresolvedConfig
from tests.laws.engines import ENGINES, OFFLOADED, assert_engine_matches_one_process
from tests.laws.law import ROWS, assert_config_matches_one_process, make_config, make_raw_config
from tests.laws.layouts import ADAMW, BF16_MOMENTS, CLIPPED_SGD, DOCUMENTS, MODELS, MUON, PREFIX, UL2

Case = dict[str, Any]

MAX_RANKS = 8
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "clipped_sgd": CLIPPED_SGD,
    "momentum": CLIPPED_SGD | {"momentum": 0.5},
    "adamw": ADAMW,
    "muon": MUON,
    "bf16_moments": BF16_MOMENTS,
}
# The rounding of a moment to bf16 may go either way where the fp32 sums of two layouts are neighbouring numbers.
ROUNDED_MOMENTS = 1e-4
OBJECTIVES: dict[str, dict[str, Any]] = {"default": {}, "prefix": PREFIX, "mixture": UL2, "documents": DOCUMENTS}
LOSSES: dict[str, dict[str, Any]] = {"plain": {}, "smoothed": {"loss": {"label_smoothing": 0.1, "z_loss": 1e-2}}}

# The first value of each factor is its default.
FACTORS: dict[str, tuple[Any, ...]] = {
    "dp_replicate": (1, 2),
    "dp_shard": (1, 2, 3),
    "cp": (1, 2),
    "tp": (1, 2),
    "pp": (1, 2),
    "model": tuple(MODELS),
    "objective": tuple(OBJECTIVES),
    "loss": tuple(LOSSES),
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
# For random runs: also wider axes, and the third-party engines.
WIDE_FACTORS = FACTORS | {
    "dp_shard": (1, 2, 3, 4),
    "cp": (1, 2, 4),
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "engine": ("native", *ENGINES, *OFFLOADED),
}
NOT_PARALLEL = ("model", "objective", "loss", "optimizer", "microbatches", "recompute", "compile", "engine")
PARALLEL_KEYS = tuple(key for key in FACTORS if key not in NOT_PARALLEL)
# Bytes that the blocks of all ranks together may save for backward. Some blocks are recomputed, others are not.
ACTIVATION_BUDGET = 10 << 20
# Options that have an effect only where one of these axes is in use.
NEEDS: dict[str, tuple[str, ...]] = {
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


def rows_per_microbatch(case: Case) -> int:
    """Return the rows of a microbatch: all rows of a data rank, or few enough for the case's pipeline schedule."""
    rows = ROWS // (case["dp_replicate"] * case["dp_shard"])
    if case["microbatches"] == "one":
        return rows
    count = 4 if case["pp"] > 1 else 3
    return rows // count if rows % count == 0 else rows // 2


def config_sections(case: Case) -> dict[str, Any]:
    """Return the config sections of a case, as `make_raw_config` takes them."""
    extra = {**OBJECTIVES[case["objective"]], **LOSSES[case["loss"]]}
    return {
        **extra,
        "optim": OPTIMIZERS[case["optimizer"]],
        "data": {**extra.get("data", {}), "micro_batch": rows_per_microbatch(case)},
        "parallel": {key: case[key] for key in PARALLEL_KEYS} | recompute_keys(case),
        "compile": case["compile"],
        **(ENGINES | OFFLOADED).get(case.get("engine", "native"), {}),
    }


def recompute_keys(case: Case) -> dict[str, Any]:
    """Return the keys of activation checkpointing. A budget applies to one rank."""
    if case["recompute"] == "budget":
        return {"activations_gib": ACTIVATION_BUDGET / count_ranks(case) / (1 << 30)}
    return {"recompute": case["recompute"]}


def assert_case_matches_one_process(case: Case) -> None:
    """Raise AssertionError unless the case's two steps are those of one process."""
    later = ROUNDED_MOMENTS if case["optimizer"] == "bf16_moments" else None
    config = make_config(count_ranks(case), MODELS[case["model"]], **config_sections(case))
    if config.engine != "native":
        assert_engine_matches_one_process(count_ranks(case), config, steps=2)
        return
    assert_config_matches_one_process(config, count_ranks(case), steps=2, later=later)


def find_violations(case: Case) -> Iterator[str]:
    """Yield why the case is not a valid run or covers nothing."""
    if count_ranks(case) > MAX_RANKS:
        yield f"{count_ranks(case)} ranks, more than {MAX_RANKS}"
        return
    for option, axes in NEEDS.items():
        if case[option] != FACTORS[option][0] and all(case[axis] == 1 for axis in axes):
            yield f"{option}={case[option]} has no effect without {' or '.join(axes)}"
    if case["reduce_each_microbatch"] and case["microbatches"] == "one":
        yield "reduce_each_microbatch has no effect on one microbatch"
    if count_ranks(case) == 1:
        yield "one process is the reference"
    config = UnresolvedConfig.model_validate(make_raw_config(MODELS[case["model"]], **config_sections(case)))
    yield from (str(each) for each in check(config, count_ranks(case), 0))


def complete_case(
    fixed: Mapping[str, Any],
    rng: random.Random,
    prefer: Mapping[str, Any],
    factors: Mapping[str, Sequence[Any]] = FACTORS,
) -> Case:
    """Return a random case with the `fixed` values, which uses the axes that its options need.

    `prefer` replaces random values where nothing else decides.
    """
    case = {factor: prefer.get(factor, rng.choice(values)) for factor, values in factors.items()} | dict(fixed)
    for option, axes in NEEDS.items():
        if case[option] == FACTORS[option][0] or any(case[axis] > 1 for axis in axes):
            continue
        free = [axis for axis in axes if axis not in fixed]
        if option in fixed and free:
            case[rng.choice(free)] = 2
    return drop_inert_options(case) | dict(fixed)


def drop_inert_options(case: Case) -> Case:
    """Return the case with the default of each option that has no effect on its axes."""
    inert = [option for option, axes in NEEDS.items() if all(case[axis] == 1 for axis in axes)]
    return case | {option: FACTORS[option][0] for option in inert}


def draw_valid_case(
    rng: random.Random, fixed: Mapping[str, Any], prefer: Mapping[str, Any] | None = None, tries: int = 2000
) -> Case | None:
    """Return a valid case with the `fixed` values, otherwise as in `complete_case`; None if no valid case is found."""
    for _ in range(tries):
        case = complete_case(fixed, rng, prefer or {})
        if not any(find_violations(case)):
            return case
    return None


def describe(case: Case) -> str:
    """Return the values that are not defaults: `dp_shard=2 tp=2 optimizer=muon`."""
    return " ".join(f"{key}={value}" for key, value in case.items() if value != WIDE_FACTORS[key][0])
