"""A covering array of the law's cases: each pair of values that can go together, and each triple of axes, is in one.

`covering.json` keeps the cases, and the pairs that no run can have. Written by

  python -m tests.laws.covering

which takes some minutes: after a change of the factors in `space.py`, or of the config rules.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.laws.space import AXES, FACTORS, Case, complete, describe, random_case, ranks_of, violations

FILE = Path(__file__).with_suffix(".json")
CANDIDATES = 60

Target = tuple[tuple[str, Any], ...]  # values that one case must have together


def targets() -> Iterator[Target]:
    """All pairs of values of two factors, and all triples of axes in use, the rarest first."""
    yield from (tuple((axis, 2) for axis in axes) for axes in combinations(AXES, 3))
    for one, other in combinations(FACTORS, 2):
        yield from (((one, a), (other, b)) for a in FACTORS[one] for b in FACTORS[other])


def covered(target: Target, cases: Iterable[Case]) -> bool:
    return any(all(case[factor] == value for factor, value in target) for case in cases)


def load() -> tuple[list[Case], list[Target]]:
    """The cases, and the targets that no run can have."""
    content = json.loads(FILE.read_text())
    defaults = {factor: values[0] for factor, values in FACTORS.items()}
    return [defaults | case for case in content["cases"]], [_as_target(each) for each in content["incompatible"]]


def _as_target(values: dict[str, Any]) -> Target:
    return tuple(values.items())


def cost(case: Case) -> float:
    """Seconds of a case, roughly, on two cores."""
    return 0.5 + ranks_of(case) * (0.6 + 8 * case["compile"])


def build(seed: int = 0) -> tuple[list[Case], list[Target]]:
    """Greedily: each case is the candidate that covers the most for its cost."""
    rng = random.Random(seed)
    cases: list[Case] = []
    incompatible: list[Target] = []
    left = dict.fromkeys(targets())
    while left:
        target = next(iter(left))
        found = list(_candidates(target, left, rng))
        if not found:
            incompatible.append(target)
            del left[target]
            continue
        best = max(found, key=lambda case: sum(covered(each, [case]) for each in left) / cost(case))
        cases.append(best)
        for each in [each for each in left if covered(each, [best])]:
            del left[each]
        print(f"{len(cases)} cases, {len(left)} targets left: {describe(best)}", file=sys.stderr)
    return _without_needless(cases, incompatible), incompatible


def _candidates(target: Target, left: Iterable[Target], rng: random.Random) -> Iterator[Case]:
    fixed, pool = dict(target), list(left)
    for number in range(CANDIDATES):
        wanted = dict(value for each in rng.sample(pool, min(6, len(pool))) for value in each)
        # Each rank compiles for itself: on few ranks.
        cheap = dict.fromkeys(AXES, 1) if number % 2 else {"compile": False}
        case = complete(fixed, rng, wanted | cheap)
        if not any(violations(case)):
            yield case
    if (rare := random_case(rng, fixed, prefer={"compile": False})) is not None:
        yield rare


def _without_needless(cases: list[Case], incompatible: list[Target]) -> list[Case]:
    """The cases less those whose targets others cover, the dearest first."""
    wanted = [each for each in targets() if each not in incompatible]
    kept = list(cases)
    for case in sorted(cases, key=cost, reverse=True):
        others = [each for each in kept if each is not case]
        if all(covered(each, others) for each in wanted if covered(each, [case])):
            kept = others
    return kept


def main() -> None:
    cases, incompatible = build()
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
