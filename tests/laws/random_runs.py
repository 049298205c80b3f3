"""Compare random runs that the config rules accept with one process: loss, gradients, gradient norm, weights.

The native engine is compared in fp64. DeepSpeed and accelerate run in fp32 and do not expose gradients, so only losses,
norms and weights are compared.

  python -m tests.laws.random_runs --seed 0 --minutes 120

A failing case is reduced to its smallest case, in which as many values as possible are defaults. The program prints
each failing case and its smallest case, and once per minute the numbers of drawn, refused, equal and failed cases.
The same seed draws the same cases. Exit code 1: a case failed.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch

from tests.laws import worlds
from tests.laws.run_space import (
    WIDE_FACTORS,
    Case,
    assert_case_matches_one_process,
    complete_case,
    count_ranks,
    find_violations,
    format_case,
    reset_options_without_effect,
)
from tests.laws.worlds import WorldError, restart_world, stop_all

REPORT_INTERVAL_SECONDS = 60
COMPILED_FRACTION = 0.02  # a compiled run takes as long as many eager runs
# Fraction of the drawn cases with a third-party engine. It is low, since the rules refuse most native cases.
ENGINE_FRACTION = 0.1
# Factors that only the native engine supports.
NATIVE_ONLY_FACTORS = (
    *("dp_replicate", "cp", "tp", "sequence_parallel", "reshard", "reduce_each_microbatch", "cpu_offload"),
    *("pp_schedule", "pp_split", "compile"),
)


def draw_case(rng: random.Random) -> Case:
    """Draw a random case, which the config rules may refuse."""
    if rng.random() < ENGINE_FRACTION:
        engine = rng.choice(WIDE_FACTORS["engine"][1:])
        defaults = {factor: WIDE_FACTORS[factor][0] for factor in NATIVE_ONLY_FACTORS}
        return complete_case(rng, {"engine": engine}, preferred=defaults, factors=WIDE_FACTORS)
    preferred = {} if rng.random() < COMPILED_FRACTION else {"compile": False}
    return complete_case(rng, {"engine": "native"}, preferred, WIDE_FACTORS)


def find_failure(case: Case) -> str | None:
    """Run two steps of the case; return the last line of the error, or None if the steps match one process."""
    try:
        assert_case_matches_one_process(case)
    except (AssertionError, WorldError) as error:
        restart_world(count_ranks(case))
        return str(error).strip().splitlines()[-1]
    if case["engine"] != "native":
        restart_world(count_ranks(case))  # DeepSpeed changes the global state of a process
    return None


def shrink_case(case: Case, fails: Callable[[Case], bool]) -> Case:
    """Set factors to their defaults as long as the case remains valid and failing; return the result."""
    has_changed = True
    while has_changed:
        has_changed = False
        for factor, values in WIDE_FACTORS.items():
            smaller_case = reset_options_without_effect(case | {factor: values[0]})
            if smaller_case != case and not any(find_violations(smaller_case)) and fails(smaller_case):
                case, has_changed = smaller_case, True
    return case


def search_failures(seed: int, seconds: float, report: Callable[[str], None]) -> list[tuple[Case, str]]:
    """Draw and compare cases for `seconds`. Return (smallest case, error message) of each failure.

    `report` receives each line of the output.
    """
    rng, counts, failures = random.Random(seed), Counter[str](), list[tuple[Case, str]]()
    start_time = last_report_time = time.monotonic()
    while time.monotonic() - start_time < seconds:
        case = draw_case(rng)
        counts["drawn"] += 1
        if any(find_violations(case)):
            counts["refused"] += 1
            continue
        message = find_failure(case)
        counts["equal" if message is None else "failed"] += 1
        if message is not None:
            report(f"failed: {format_case(case)}: {message}")
            smallest_case = shrink_case(case, lambda candidate: find_failure(candidate) is not None)
            failures.append((smallest_case, message))
            report(f"smallest: {format_case(smallest_case)}")
        if time.monotonic() - last_report_time > REPORT_INTERVAL_SECONDS:
            last_report_time = time.monotonic()
            report(f"{(last_report_time - start_time) / 60:.0f} min: {format_counts(counts)}")
    report(f"seed {seed}, {seconds / 60:g} min: {format_counts(counts)}")
    return failures


def format_counts(counts: Counter[str]) -> str:
    """Return the counts as text, such as `8 drawn, 5 refused, 3 equal, 0 failed`."""
    return ", ".join(f"{counts[name]} {name}" for name in ("drawn", "refused", "equal", "failed"))


def main() -> int:
    """Search for failures with the options of the command line; return 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the drawn cases; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=10.0, help="duration; default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    worlds.timeout_factor = 20
    try:
        return bool(search_failures(options.seed, 60 * options.minutes, lambda line: print(line, flush=True)))
    finally:
        stop_all()


if __name__ == "__main__":
    sys.exit(main())
