"""The reports of all ranks in `dist-llm check`, and the problems derived from them. Imports no torch."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from rich.markup import escape
from rich.table import Table

MAX_CLOCK_SECONDS = 1.0
MIN_MATMUL_RATIO = 0.8  # relative to the median rank
MIN_LINK_RATIO = 0.5  # relative to the median link


@dataclass(frozen=True)
class NodeReport:
    """The measurements of one rank. A rate or time that was not measured is NaN."""

    rank: int
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    clock_offset_seconds: float = math.nan  # this clock minus rank 0's
    free_gib: float = math.nan
    sees_shared_file: bool | None = None  # the file that rank 0 wrote to --directory; None: rank 0 could not write
    matmul_tflops: float = math.nan
    all_reduce_us: float = math.nan
    all_reduce_gb_per_second: float = math.nan
    neighbour_gb_per_second: float = math.nan  # all-reduce of this node and the next; NaN on the last node
    failures: tuple[str, ...] = ()


def diagnose_nodes(reports: Sequence[NodeReport]) -> list[str]:
    """Return one line per problem, which starts with the node's name. Missing measurements are not problems."""
    problems = [f"{each.host}: rank {each.rank}: {failure}" for each in reports for failure in each.failures]
    common, nodes = _common_versions(reports), group_by_node(reports)
    for host, ranks in nodes.items():
        problems += dict.fromkeys(
            f"{host}: {name} is {each.versions.get(name, 'unknown')}, elsewhere {value}"
            for each in ranks
            for name, value in common.items()
            if each.versions.get(name, "unknown") != value
        )
        clock = max((each.clock_offset_seconds for each in ranks), key=abs)
        if abs(clock) > MAX_CLOCK_SECONDS:
            problems.append(f"{host}: its clock is {abs(clock):.1f} s {'ahead of' if clock > 0 else 'behind'} rank 0's")
        if any(each.sees_shared_file is False for each in ranks):
            problems.append(f"{host}: does not see the file that rank 0 wrote to --directory; is it not shared?")
    typical = _median(each.matmul_tflops for each in reports)
    problems += [
        f"{each.host}: rank {each.rank} reaches {each.matmul_tflops:.3g} matmul TFLOP/s, the median rank {typical:.3g}"
        for each in reports
        if each.matmul_tflops < MIN_MATMUL_RATIO * typical
    ]
    links = {(one, two): min(each.neighbour_gb_per_second for each in nodes[one]) for one, two in pairwise(nodes)}
    typical = _median(links.values())
    return problems + [
        f"{one}: all-reduce with {two} alone reaches {rate:.3g} GB/s, the median pair reaches {typical:.3g}"
        for (one, two), rate in links.items()
        if rate < MIN_LINK_RATIO * typical
    ]


def format_table(reports: Sequence[NodeReport]) -> Table:
    """Return one row per node with the worst value of its ranks. Versions that differ from the majority are hashed."""
    shown = Table("node", "ranks", "versions")
    for name in ("clock ms", "free GiB", "matmul TFLOP/s", "all-reduce us", "GB/s", "GB/s to next"):
        shown.add_column(name, justify="right")
    common = _common_versions(reports)
    for host, ranks in group_by_node(reports).items():
        other = [repr(sorted(each.versions.items())) for each in ranks if each.versions != common]
        numbers = (
            max((each.clock_offset_seconds * 1e3 for each in ranks), key=abs),
            min(each.free_gib for each in ranks),
            min(each.matmul_tflops for each in ranks),
            max(each.all_reduce_us for each in ranks),
            min(each.all_reduce_gb_per_second for each in ranks),
            min(each.neighbour_gb_per_second for each in ranks),
        )
        shown.add_row(
            escape(host),
            _format_ranks([each.rank for each in ranks]),
            hashlib.sha256(other[0].encode()).hexdigest()[:8] if other else "same",
            *("-" if math.isnan(number) else f"{number:z,.{0 if abs(number) >= 100 else 2}f}" for number in numbers),
        )
    return shown


def format_problems(problems: Sequence[str]) -> str:
    """Format all problems as one message."""
    noun = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  ".join((f"{noun} found:", *problems))


def group_by_node(reports: Sequence[NodeReport]) -> dict[str, list[NodeReport]]:
    """Return the reports of each node, ordered by its lowest rank."""
    nodes: dict[str, list[NodeReport]] = {}
    for each in reports:
        nodes.setdefault(each.host, []).append(each)
    return nodes


def _common_versions(reports: Sequence[NodeReport]) -> dict[str, str]:
    """Return the most common value of each version; of two that are equally common, the one seen first."""
    names = dict.fromkeys(name for each in reports for name in each.versions)
    counts = {name: Counter(each.versions.get(name, "unknown") for each in reports) for name in names}
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def _median(values: Iterable[float]) -> float:
    return median([value for value in values if not math.isnan(value)] or [math.nan])


def _format_ranks(ranks: Sequence[int]) -> str:
    """Format ranks as `0-7`, or as `0, 2, 4` if they are not consecutive."""
    if ranks[-1] - ranks[0] >= len(ranks):
        return ", ".join(map(str, ranks))
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
