"""Compare random runs that the config rules accept with one process: loss, gradients, norm, weights.

The native engine is compared in fp64. DeepSpeed and accelerate run in fp32 and do not expose gradients, so the weights
after each of two steps are compared.

  python -m tests.laws.random_runs --seed 0 --minutes 120

Prints one line per failure with its smallest case, in which as many values as possible are defaults, and one line per
minute with the number of drawn, refused, equal and failed cases. Exit code 1 if a case failed. The same seed draws the
same cases.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch

from tests.laws import worlds
from tests.laws.space import (
    WIDE_FACTORS,
    Case,
    assert_case_matches_one_process,
    complete_case,
    count_ranks,
    describe,
    drop_inert_options,
    find_violations,
)
from tests.laws.worlds import WorldError, restart_world, stop_all

LINE_SECONDS = 60
COMPILED_SHARE = 0.02  # a compiled run takes as long as many eager runs
ENGINE_SHARE = 0.1  # of the drawn cases: the rules refuse most native cases and few cases of the other engines
# Factors that only the native engine supports.
NATIVE_ONLY = (
    *("dp_replicate", "cp", "tp", "sequence_parallel", "reshard", "reduce_each_microbatch", "cpu_offload"),
    *("pp_schedule", "pp_split", "compile"),
)


def draw_case(rng: random.Random) -> Case:
    """Draw a random case, which the rules may refuse."""
    if rng.random() < ENGINE_SHARE:
        engine = rng.choice(WIDE_FACTORS["engine"][1:])
        defaults = {factor: WIDE_FACTORS[factor][0] for factor in NATIVE_ONLY}
        return complete_case({"engine": engine}, rng, defaults, WIDE_FACTORS)
    return complete_case(
        {"engine": "native"}, rng, {} if rng.random() < COMPILED_SHARE else {"compile": False}, WIDE_FACTORS
    )


def find_failure(case: Case) -> str | None:
    """Return the error of the case's two steps; None if they match one process."""
    try:
        assert_case_matches_one_process(case)
    except (AssertionError, WorldError) as error:
        restart_world(count_ranks(case))
        return str(error).strip().splitlines()[-1]
    if case["engine"] != "native":
        restart_world(count_ranks(case))  # DeepSpeed leaves global settings in a process
    return None


def shrink_case(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Return the failing case with as many defaults as possible that is still valid and still fails."""
    progress = True
    while progress:
        progress = False
        for factor, values in WIDE_FACTORS.items():
            smaller = drop_inert_options(case | {factor: values[0]})
            if smaller != case and not any(find_violations(smaller)) and fails(smaller):
                case, progress = smaller, True
    return case


def search(seed: int, seconds: float, report: Callable[[str], None]) -> list[tuple[Case, str]]:
    """Draw and compare cases for this time. Return the smallest case and the message of each failure."""
    rng, counts, failed = random.Random(seed), Counter[str](), list[tuple[Case, str]]()
    start_time = last_report = time.monotonic()
    while time.monotonic() - start_time < seconds:
        case = draw_case(rng)
        counts["drawn"] += 1
        if any(find_violations(case)):
            counts["refused"] += 1
            continue
        message = find_failure(case)
        counts["equal" if message is None else "failed"] += 1
        if message is not None:
            report(f"failed: {describe(case)}: {message}")
            smallest_case = shrink_case(case, lambda candidate: find_failure(candidate) is not None)
            failed.append((smallest_case, message))
            report(f"smallest: {describe(smallest_case)}")
        if time.monotonic() - last_report > LINE_SECONDS:
            last_report = time.monotonic()
            report(f"{(last_report - start_time) / 60:.0f} min: {format_counts(counts)}")
    report(f"seed {seed}, {seconds / 60:g} min: {format_counts(counts)}")
    return failed


def format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("drawn", "refused", "equal", "failed"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn cases")
    parser.add_argument("--minutes", type=float, default=10.0, help="time limit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    worlds.timeout_factor = 20
    try:
        return bool(search(options.seed, 60 * options.minutes, lambda line: print(line, flush=True)))
    finally:
        stop_all()


if __name__ == "__main__":
    sys.exit(main())
