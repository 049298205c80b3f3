"""The space of runs that the law holds for: factors, their values, and the config of one combination.

A `Case` gives each factor one value. `violations` lists why a case is not a run: the config rules refuse it, or one of
its values has no effect there (a pipeline option without a pipeline), so that the case would cover nothing.
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_llm.config.check import check
from dist_llm.config.derive import AXES
from dist_llm.config.schema import Config
from tests.laws.engines import ENGINES, OFFLOADED
from tests.laws.engines import hold as hold_engine
from tests.laws.law import ROWS, config_of, hold_config, raw_config
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
# Moments rounded to bf16: which way may differ where one process's sum is the neighbouring fp32 number.
ROUNDED_MOMENTS = 1e-4
OBJECTIVES: dict[str, dict[str, Any]] = {"default": {}, "prefix": PREFIX, "mixture": UL2, "documents": DOCUMENTS}
LOSSES: dict[str, dict[str, Any]] = {"plain": {}, "smoothed": {"loss": {"label_smoothing": 0.1, "z_loss": 1e-2}}}

# The first value of each factor is its default: the simplest run there is.
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
# Bytes that the blocks of all ranks together may keep for backward: some blocks are recomputed, others are not.
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


def ranks_of(case: Mapping[str, Any]) -> int:
    return math.prod(case[axis] for axis in AXES)


def micro_batch(case: Case) -> int:
    """Rows of a microbatch: all that a data rank has, or few enough for the case's pipeline schedule."""
    rows = ROWS // (case["dp_replicate"] * case["dp_shard"])
    if case["microbatches"] == "one":
        return rows
    several = 4 if case["pp"] > 1 else 3
    return rows // several if rows % several == 0 else rows // 2


def sections(case: Case) -> dict[str, Any]:
    """The config sections of a case, as `raw_config` takes them."""
    extra = {**OBJECTIVES[case["objective"]], **LOSSES[case["loss"]]}
    return {
        **extra,
        "optim": OPTIMIZERS[case["optimizer"]],
        "data": {**extra.get("data", {}), "micro_batch": micro_batch(case)},
        "parallel": {key: case[key] for key in PARALLEL_KEYS} | recompute(case),
        "compile": case["compile"],
        **(ENGINES | OFFLOADED).get(case.get("engine", "native"), {}),
    }


def recompute(case: Case) -> dict[str, Any]:
    """The keys of activation checkpointing; a budget is the share of one rank."""
    if case["recompute"] == "budget":
        return {"activations_gib": ACTIVATION_BUDGET / ranks_of(case) / (1 << 30)}
    return {"recompute": case["recompute"]}


def hold_case(case: Case) -> None:
    """Raise AssertionError unless the case's two steps are those of one process."""
    later = ROUNDED_MOMENTS if case["optimizer"] == "bf16_moments" else None
    config = config_of(ranks_of(case), MODELS[case["model"]], **sections(case))
    if config.engine != "native":
        hold_engine(ranks_of(case), config, steps=2)
        return
    hold_config(config, ranks_of(case), steps=2, later=later)


def violations(case: Case) -> Iterator[str]:
    """Why the case is not a run, or covers nothing; empty where it is one."""
    if ranks_of(case) > MAX_RANKS:
        yield f"{ranks_of(case)} ranks, more than {MAX_RANKS}"
        return
    for option, axes in NEEDS.items():
        if case[option] != FACTORS[option][0] and all(case[axis] == 1 for axis in axes):
            yield f"{option}={case[option]} has no effect without {' or '.join(axes)}"
    if case["reduce_each_microbatch"] and case["microbatches"] == "one":
        yield "reduce_each_microbatch has no effect on one microbatch"
    if ranks_of(case) == 1:
        yield "one process is the reference"
    config = Config.model_validate(raw_config(MODELS[case["model"]], **sections(case)))
    yield from (str(each) for each in check(config, ranks_of(case), 0))


def complete(
    fixed: Mapping[str, Any],
    rng: random.Random,
    prefer: Mapping[str, Any],
    factors: Mapping[str, Sequence[Any]] = FACTORS,
) -> Case:
    """A random case with the `fixed` values, which uses the axes that its options need.

    `prefer`: values taken, where nothing else decides, in place of random ones.
    """
    case = {factor: prefer.get(factor, rng.choice(values)) for factor, values in factors.items()} | dict(fixed)
    for option, axes in NEEDS.items():
        if case[option] == FACTORS[option][0] or any(case[axis] > 1 for axis in axes):
            continue
        free = [axis for axis in axes if axis not in fixed]
        if option in fixed and free:
            case[rng.choice(free)] = 2
    return without_inert(case) | dict(fixed)


def without_inert(case: Case) -> Case:
    """The case with the default of each option that has no effect on its axes."""
    inert = [option for option, axes in NEEDS.items() if all(case[axis] == 1 for axis in axes)]
    return case | {option: FACTORS[option][0] for option in inert}


def random_case(
    rng: random.Random, fixed: Mapping[str, Any], prefer: Mapping[str, Any] | None = None, tries: int = 2000
) -> Case | None:
    """A case with the `fixed` values that is a run, its other values as of `complete`; None where none is found."""
    for _ in range(tries):
        case = complete(fixed, rng, prefer or {})
        if not any(violations(case)):
            return case
    return None


def describe(case: Case) -> str:
    """The values that are not defaults: `dp_shard=2 tp=2 optimizer=muon`."""
    return " ".join(f"{key}={value}" for key, value in case.items() if value != WIDE_FACTORS[key][0])
