"""Random runs that the config rules accept, each held against one process: loss, gradients, norm, weights.

The native engine is judged in fp64. DeepSpeed and accelerate run in fp32; they keep their gradients to themselves, so
that the weights after each of two steps are compared.

  python -m tests.laws.random_runs --seed 0 --minutes 120

Prints a line per failure with its smallest case: every value that can be the default is the default. One line a minute
counts the cases that were drawn, refused by the rules, equal and failed. Exit code 1 if one failed. The same seed draws
the same cases.
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
    complete,
    describe,
    hold_case,
    ranks_of,
    violations,
    without_inert,
)
from tests.laws.worlds import WorldError, restart_world, stop_all

LINE_SECONDS = 60
COMPILED_SHARE = 0.02  # compiling takes as long as many eager runs
ENGINE_SHARE = 0.1  # of what is drawn: most of it is refused for the native engine, little for the others
# What only the native engine has.
NATIVE_ONLY = (
    *("dp_replicate", "cp", "tp", "sequence_parallel", "reshard", "reduce_each_microbatch", "cpu_offload"),
    *("pp_schedule", "pp_split", "compile"),
)


def draw(rng: random.Random) -> Case:
    """A random case, which the rules may refuse."""
    if rng.random() < ENGINE_SHARE:
        engine = rng.choice(WIDE_FACTORS["engine"][1:])
        defaults = {factor: WIDE_FACTORS[factor][0] for factor in NATIVE_ONLY}
        return complete({"engine": engine}, rng, defaults, WIDE_FACTORS)
    return complete(
        {"engine": "native"}, rng, {} if rng.random() < COMPILED_SHARE else {"compile": False}, WIDE_FACTORS
    )


def failure(case: Case) -> str | None:
    """What is wrong with the case's two steps; None where they are those of one process."""
    try:
        hold_case(case)
    except (AssertionError, WorldError) as error:
        restart_world(ranks_of(case))
        return str(error).strip().splitlines()[-1]
    if case["engine"] != "native":
        restart_world(ranks_of(case))  # DeepSpeed leaves settings in a process
    return None


def smallest(case: Case, fails: Callable[[Case], bool]) -> Case:
    """The case with as many defaults as possible that is still a run, and still fails."""
    changed = True
    while changed:
        changed = False
        for factor, values in WIDE_FACTORS.items():
            smaller = without_inert(case | {factor: values[0]})
            if smaller != case and not any(violations(smaller)) and fails(smaller):
                case, changed = smaller, True
    return case


def search(seed: int, seconds: float, report: Callable[[str], None]) -> list[tuple[Case, str]]:
    """Draw and judge cases for so long. Returns each failure's smallest case with what is wrong."""
    rng, counts, failed = random.Random(seed), Counter[str](), list[tuple[Case, str]]()
    begin = last = time.monotonic()
    while time.monotonic() - begin < seconds:
        case = draw(rng)
        counts["drawn"] += 1
        if any(violations(case)):
            counts["refused"] += 1
            continue
        message = failure(case)
        counts["equal" if message is None else "failed"] += 1
        if message is not None:
            report(f"failed: {describe(case)}: {message}")
            small = smallest(case, lambda each: failure(each) is not None)
            failed.append((small, message))
            report(f"smallest: {describe(small)}")
        if time.monotonic() - last > LINE_SECONDS:
            last = time.monotonic()
            report(f"{(last - begin) / 60:.0f} min: {_line(counts)}")
    report(f"seed {seed}, {seconds / 60:g} min: {_line(counts)}")
    return failed


def _line(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("drawn", "refused", "equal", "failed"))


def main() -> int:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--seed", type=int, default=0, help="of the cases that are drawn")
    top.add_argument("--minutes", type=float, default=10.0, help="how long to draw")
    options = top.parse_args()
    torch.set_num_threads(1)
    worlds.timeout_factor = 20
    try:
        return bool(search(options.seed, 60 * options.minutes, lambda line: print(line, flush=True)))
    finally:
        stop_all()


if __name__ == "__main__":
    sys.exit(main())
