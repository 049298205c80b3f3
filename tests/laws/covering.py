"""The covering array of the law tests: a list of cases that together have every pair of values of a valid run.

A target is a combination of values that at least one case must have: a pair of values of two factors (run_space.py), or
three axes of size 2. `covering.json` contains the cases, and the incompatible targets, for which no valid run was
found. After a change of the factors or of the config rules, write the file again with this command, which takes some
minutes:

  python -m tests.laws.covering
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from dist_llm.config.derive import AXES
from tests.laws.run_space import (
    FACTORS,
    Case,
    complete_case,
    count_ranks,
    draw_valid_case,
    find_violations,
    format_case,
)

FILE = Path(__file__).with_suffix(".json")
NUM_CANDIDATES = 60  # number of random cases that are drawn to choose the next case of the array

Target = tuple[tuple[str, Any], ...]  # ((factor, value), ...)


def iter_targets() -> Iterator[Target]:
    """Yield each triple of axes, all of size 2, then each pair of values of two factors."""
    yield from (tuple((axis, 2) for axis in axes) for axes in combinations(AXES, 3))
    for first_factor, second_factor in combinations(FACTORS, 2):
        for first_value in FACTORS[first_factor]:
            for second_value in FACTORS[second_factor]:
                yield (first_factor, first_value), (second_factor, second_value)


def is_covered(target: Target, cases: Iterable[Case]) -> bool:
    """Return whether at least one case has all values of the target."""
    return any(all(case[factor] == value for factor, value in target) for case in cases)


def load_array() -> tuple[list[Case], list[Target]]:
    """Read covering.json: return the cases, and the targets for which no valid run was found."""
    content = json.loads(FILE.read_text())
    defaults = {factor: values[0] for factor, values in FACTORS.items()}
    return [defaults | case for case in content["cases"]], [_to_target(target) for target in content["incompatible"]]


def _to_target(values: dict[str, Any]) -> Target:
    return tuple(values.items())


def estimate_seconds(case: Case) -> float:
    """Return a rough estimate of the seconds that a case takes on two cores."""
    return 0.5 + count_ranks(case) * (0.6 + 8 * case["compile"])


def build_array(seed: int = 0) -> tuple[list[Case], list[Target]]:
    """Build the array greedily. Return the cases, and the targets for which no valid run was found.

    Each step adds the candidate that covers most remaining targets per second of run time.
    """
    rng = random.Random(seed)
    cases: list[Case] = []
    incompatible: list[Target] = []
    remaining = dict.fromkeys(iter_targets())
    while remaining:
        target = next(iter(remaining))
        candidates = list(_iter_candidates(target, remaining, rng))
        if not candidates:
            incompatible.append(target)
            del remaining[target]
            continue

        def count_targets_per_second(case: Case) -> float:
            return sum(is_covered(target, [case]) for target in remaining) / estimate_seconds(case)

        best_case = max(candidates, key=count_targets_per_second)
        cases.append(best_case)
        for covered_target in [target for target in remaining if is_covered(target, [best_case])]:
            del remaining[covered_target]
        print(f"{len(cases)} cases, {len(remaining)} targets left: {format_case(best_case)}", file=sys.stderr)
    return _drop_redundant(cases, incompatible), incompatible


def _iter_candidates(target: Target, remaining: Iterable[Target], rng: random.Random) -> Iterator[Case]:
    """Yield random valid cases with the values of `target`, and where valid with those of other remaining targets."""
    fixed, remaining_targets = dict(target), list(remaining)
    for index in range(NUM_CANDIDATES):
        sampled_targets = rng.sample(remaining_targets, min(6, len(remaining_targets)))
        preferred = dict(value for sampled_target in sampled_targets for value in sampled_target)
        # Each rank compiles separately. So a case either has few ranks or is not compiled.
        cheap_values = dict.fromkeys(AXES, 1) if index % 2 else {"compile": False}
        case = complete_case(rng, fixed, preferred | cheap_values)
        if not any(find_violations(case)):
            yield case
    # Only if these draws fail too is the target incompatible.
    if (fallback_case := draw_valid_case(rng, fixed, preferred={"compile": False})) is not None:
        yield fallback_case


def _drop_redundant(cases: list[Case], incompatible: list[Target]) -> list[Case]:
    """Drop each case whose targets other cases cover, the most expensive case first."""
    compatible = [target for target in iter_targets() if target not in incompatible]
    required_cases = list(cases)
    for case in sorted(cases, key=estimate_seconds, reverse=True):
        other_cases = [required_case for required_case in required_cases if required_case is not case]
        if all(is_covered(target, other_cases) for target in compatible if is_covered(target, [case])):
            required_cases = other_cases
    return required_cases


def main() -> None:
    """Build the array and write covering.json."""
    cases, incompatible = build_array()
    defaults = {factor: values[0] for factor, values in FACTORS.items()}
    content = {
        "cases": [{key: value for key, value in case.items() if value != defaults[key]} for case in cases],
        "incompatible": [dict(target) for target in incompatible],
    }
    lists = ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, items)) + "\n]" for name, items in content.items())
    FILE.write_text("{\n" + lists + "\n}\n")
    print(f"{FILE}: {len(cases)} cases, {len(incompatible)} incompatible targets", file=sys.stderr)


if __name__ == "__main__":
    main()
