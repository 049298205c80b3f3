"""A covering array of the law's cases: each compatible pair of values and each triple of axes is in at least one case.

`covering.json` contains the cases and the incompatible pairs, which no run can have. After a change of the factors in
`space.py` or of the config rules, write it again, which takes some minutes:

  python -m tests.laws.covering
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.laws.space import AXES, FACTORS, Case, complete_case, count_ranks, describe, draw_valid_case, find_violations

FILE = Path(__file__).with_suffix(".json")
CANDIDATES = 60

Target = tuple[tuple[str, Any], ...]  # values that at least one case must combine


def iter_targets() -> Iterator[Target]:
    """Yield all triples of axes and all pairs of values of two factors, the rarest first."""
    yield from (tuple((axis, 2) for axis in axes) for axes in combinations(AXES, 3))
    for first, second in combinations(FACTORS, 2):
        yield from (((first, a), (second, b)) for a in FACTORS[first] for b in FACTORS[second])


def is_covered(target: Target, cases: Iterable[Case]) -> bool:
    """Whether at least one case combines the values of the target."""
    return any(all(case[factor] == value for factor, value in target) for case in cases)


def load_array() -> tuple[list[Case], list[Target]]:
    """Return the cases, and the targets that no run can have."""
    content = json.loads(FILE.read_text())
    defaults = {factor: values[0] for factor, values in FACTORS.items()}
    return [defaults | case for case in content["cases"]], [_to_target(target) for target in content["incompatible"]]


def _to_target(values: dict[str, Any]) -> Target:
    return tuple(values.items())


def estimate_seconds(case: Case) -> float:
    """Return a rough estimate of a case's seconds on two cores."""
    return 0.5 + count_ranks(case) * (0.6 + 8 * case["compile"])


def build_array(seed: int = 0) -> tuple[list[Case], list[Target]]:
    """Build the array greedily: each step adds the candidate that covers most targets for its cost."""
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
        best = max(
            candidates,
            key=lambda case: (
                sum(is_covered(candidate_target, [case]) for candidate_target in remaining) / estimate_seconds(case)
            ),
        )
        cases.append(best)
        for candidate_target in [
            candidate_target for candidate_target in remaining if is_covered(candidate_target, [best])
        ]:
            del remaining[candidate_target]
        print(f"{len(cases)} cases, {len(remaining)} targets left: {describe(best)}", file=sys.stderr)
    return _drop_redundant(cases, incompatible), incompatible


def _iter_candidates(target: Target, remaining: Iterable[Target], rng: random.Random) -> Iterator[Case]:
    fixed, pool = dict(target), list(remaining)
    for number in range(CANDIDATES):
        preferred = dict(value for each in rng.sample(pool, min(6, len(pool))) for value in each)
        # Each rank compiles on its own, so compiled cases use few ranks.
        cheap = dict.fromkeys(AXES, 1) if number % 2 else {"compile": False}
        case = complete_case(fixed, rng, preferred | cheap)
        if not any(find_violations(case)):
            yield case
    if (rare := draw_valid_case(rng, fixed, prefer={"compile": False})) is not None:
        yield rare


def _drop_redundant(cases: list[Case], incompatible: list[Target]) -> list[Case]:
    """Drop each case whose targets other cases cover, the most expensive case first."""
    compatible = [each for each in iter_targets() if each not in incompatible]
    needed = list(cases)
    for case in sorted(cases, key=estimate_seconds, reverse=True):
        rest = [each for each in needed if each is not case]
        if all(is_covered(each, rest) for each in compatible if is_covered(each, [case])):
            needed = rest
    return needed


def main() -> None:
    cases, incompatible = build_array()
    defaults = {factor: values[0] for factor, values in FACTORS.items()}
    content = {
        "cases": [{key: value for key, value in case.items() if value != defaults[key]} for case in cases],
        "incompatible": [dict(each) for each in incompatible],
    }
    rows = ",\n".join(f'"{name}": [\n' + ",\n".join(map(json.dumps, each)) + "\n]" for name, each in content.items())
    FILE.write_text("{\n" + rows + "\n}\n")
    print(f"{FILE}: {len(cases)} cases, {len(incompatible)} incompatible pairs", file=sys.stderr)


if __name__ == "__main__":
    main()
