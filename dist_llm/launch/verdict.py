"""What the ranks of `check` found, as `Facts`, and what is wrong by them. Imports no torch: facts can be made up."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from rich.markup import escape
from rich.table import Table

MOST_CLOCK_SECONDS = 1.0
LEAST_MATMUL = 0.8  # of the median rank's rate
LEAST_LINK = 0.5  # of the median link's rate


@dataclass(frozen=True)
class Facts:
    """What one rank found. A rate or time that was not measured is NaN."""

    rank: int
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    clock_seconds: float = math.nan  # this clock minus rank 0's
    free_gib: float = math.nan
    sees_file: bool | None = None  # that rank 0 wrote to the directory; None where it could not
    matmul_tflops: float = math.nan
    all_reduce_us: float = math.nan
    all_reduce_gb_per_second: float = math.nan
    next_gb_per_second: float = math.nan  # of this node and the next alone; the last has none
    failures: tuple[str, ...] = ()


def judge(facts: Sequence[Facts]) -> list[str]:
    """What is wrong, a line each that starts with the node's name. What was not measured is not judged."""
    problems = [f"{each.host}: rank {each.rank}: {failure}" for each in facts for failure in each.failures]
    usual, nodes = _usual(facts), by_node(facts)
    for host, ranks in nodes.items():
        problems += dict.fromkeys(
            f"{host}: {name} is {each.versions.get(name, 'unknown')}, elsewhere {value}"
            for each in ranks
            for name, value in usual.items()
            if each.versions.get(name, "unknown") != value
        )
        clock = max((each.clock_seconds for each in ranks), key=abs)
        if abs(clock) > MOST_CLOCK_SECONDS:
            problems.append(f"{host}: its clock is {abs(clock):.1f} s {'ahead of' if clock > 0 else 'behind'} rank 0's")
        if any(each.sees_file is False for each in ranks):
            problems.append(f"{host}: does not see the file that rank 0 wrote to --directory; is it not shared?")
    typical = _median(each.matmul_tflops for each in facts)
    problems += [
        f"{each.host}: rank {each.rank} multiplies at {each.matmul_tflops:.3g} TFLOP/s, the median is {typical:.3g}"
        for each in facts
        if each.matmul_tflops < LEAST_MATMUL * typical
    ]
    links = {(one, two): min(each.next_gb_per_second for each in nodes[one]) for one, two in pairwise(nodes)}
    typical = _median(links.values())
    return problems + [
        f"{one}: all-reduce with {two} alone reaches {rate:.3g} GB/s, the median of neighbours is {typical:.3g}"
        for (one, two), rate in links.items()
        if rate < LEAST_LINK * typical
    ]


def table(facts: Sequence[Facts]) -> Table:
    """A row per node, with the worst of its ranks. Other versions than most ranks' show as a hash."""
    shown = Table("node", "ranks", "versions")
    for name in ("clock ms", "free GiB", "matmul TFLOP/s", "all-reduce us", "GB/s", "GB/s to next"):
        shown.add_column(name, justify="right")
    usual = _usual(facts)
    for host, ranks in by_node(facts).items():
        other = [repr(sorted(each.versions.items())) for each in ranks if each.versions != usual]
        numbers = (
            max((each.clock_seconds * 1e3 for each in ranks), key=abs),
            min(each.free_gib for each in ranks),
            min(each.matmul_tflops for each in ranks),
            max(each.all_reduce_us for each in ranks),
            min(each.all_reduce_gb_per_second for each in ranks),
            min(each.next_gb_per_second for each in ranks),
        )
        shown.add_row(
            escape(host),
            _spans([each.rank for each in ranks]),
            hashlib.sha256(other[0].encode()).hexdigest()[:8] if other else "same",
            *("-" if math.isnan(number) else f"{number:z,.{0 if abs(number) >= 100 else 2}f}" for number in numbers),
        )
    return shown


def listed(problems: Sequence[str]) -> str:
    """As one message."""
    noun = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  ".join((f"{noun} found by the check:", *problems))


def by_node(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    """The facts of each node, in the order of its first rank."""
    nodes: dict[str, list[Facts]] = {}
    for each in facts:
        nodes.setdefault(each.host, []).append(each)
    return nodes


def _usual(facts: Sequence[Facts]) -> dict[str, str]:
    """Each version as most ranks have it; as the first of them, where two are as common."""
    names = dict.fromkeys(name for each in facts for name in each.versions)
    counts = {name: Counter(each.versions.get(name, "unknown") for each in facts) for name in names}
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def _median(values: Iterable[float]) -> float:
    return median([value for value in values if not math.isnan(value)] or [math.nan])


def _spans(ranks: Sequence[int]) -> str:
    """`0-7`, or `0, 2, 4` where they do not follow each other."""
    if ranks[-1] - ranks[0] >= len(ranks):
        return ", ".join(map(str, ranks))
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
