"""The reports of all ranks in `dist-llm check` (preflight), and the problems that follow from them.

This module does not import torch.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from rich.markup import escape
from rich.table import Table

MAX_CLOCK_OFFSET_SECONDS = 1.0
MIN_MATMUL_RATIO = 0.8  # lower bound of (matmul rate of a rank) / (median over ranks)
MIN_LINK_RATIO = 0.5  # lower bound of (bandwidth of a pair of nodes) / (median over pairs)


@dataclass(frozen=True)
class NodeReport:
    """The measurements of one rank. A number that was not measured is NaN."""

    rank: int
    host: str
    versions: dict[str, str] = field(default_factory=dict)
    clock_offset_seconds: float = math.nan  # clock of this rank minus clock of rank 0
    free_gib: float = math.nan
    sees_shared_file: bool | None = None  # sees the file of rank 0 in --directory; None: rank 0 cannot write
    matmul_tflops: float = math.nan
    all_reduce_us: float = math.nan
    all_reduce_gb_per_second: float = math.nan
    neighbour_gb_per_second: float = math.nan  # of an all-reduce over this node and the next; NaN on the last node
    failures: tuple[str, ...] = ()


def diagnose_nodes(reports: Sequence[NodeReport]) -> list[str]:
    """Return one line per problem, beginning with the name of the node. A missing measurement is not a problem."""
    problems = [f"{report.host}: rank {report.rank}: {failure}" for report in reports for failure in report.failures]
    common_versions, nodes = _common_versions(reports), group_by_node(reports)
    for host, node_reports in nodes.items():
        problems += dict.fromkeys(
            f"{host}: {name} is {report.versions.get(name, 'unknown')}, elsewhere {value}"
            for report in node_reports
            for name, value in common_versions.items()
            if report.versions.get(name, "unknown") != value
        )
        clock_offset = max((report.clock_offset_seconds for report in node_reports), key=abs)
        if abs(clock_offset) > MAX_CLOCK_OFFSET_SECONDS:
            direction = "ahead of" if clock_offset > 0 else "behind"
            problems.append(f"{host}: its clock is {abs(clock_offset):.1f} s {direction} rank 0's")
        if any(report.sees_shared_file is False for report in node_reports):
            problems.append(
                f"{host}: does not see the file that rank 0 wrote to the shared directory; check --directory"
            )
    median_tflops = _median(report.matmul_tflops for report in reports)
    problems += [
        f"{report.host}: rank {report.rank} reaches {report.matmul_tflops:.3g} matmul TFLOP/s, "
        f"the median rank {median_tflops:.3g}"
        for report in reports
        if report.matmul_tflops < MIN_MATMUL_RATIO * median_tflops
    ]
    links = {
        (host, next_host): min(report.neighbour_gb_per_second for report in nodes[host])
        for host, next_host in pairwise(nodes)
    }
    median_rate = _median(links.values())
    return problems + [
        f"{host}: all-reduce with {next_host} alone reaches {rate:.3g} GB/s, the median pair reaches {median_rate:.3g}"
        for (host, next_host), rate in links.items()
        if rate < MIN_LINK_RATIO * median_rate
    ]


def format_table(reports: Sequence[NodeReport]) -> Table:
    """Build a table with one row per node and the worst values of its ranks.

    If the versions of a node differ from the most common versions, the row shows a hash of the versions of the node.
    """
    table = Table("node", "ranks", "versions")
    for name in ("clock ms", "free GiB", "matmul TFLOP/s", "all-reduce us", "GB/s", "GB/s to next"):
        table.add_column(name, justify="right")
    common_versions = _common_versions(reports)
    for host, node_reports in group_by_node(reports).items():
        other_versions = [
            repr(sorted(report.versions.items())) for report in node_reports if report.versions != common_versions
        ]
        numbers = (
            max((report.clock_offset_seconds * 1e3 for report in node_reports), key=abs),
            min(report.free_gib for report in node_reports),
            min(report.matmul_tflops for report in node_reports),
            max(report.all_reduce_us for report in node_reports),
            min(report.all_reduce_gb_per_second for report in node_reports),
            min(report.neighbour_gb_per_second for report in node_reports),
        )
        table.add_row(
            escape(host),
            _format_ranks([report.rank for report in node_reports]),
            hashlib.sha256(other_versions[0].encode()).hexdigest()[:8] if other_versions else "same",
            *("-" if math.isnan(number) else f"{number:z,.{0 if abs(number) >= 100 else 2}f}" for number in numbers),
        )
    return table


def format_problems(problems: Sequence[str]) -> str:
    """Format all problems as one message."""
    noun = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n  ".join((f"{noun} found:", *problems))


def group_by_node(reports: Sequence[NodeReport]) -> dict[str, list[NodeReport]]:
    """Return the reports of each node, by host name. Nodes are ordered by their lowest rank."""
    nodes: dict[str, list[NodeReport]] = {}
    for report in reports:
        nodes.setdefault(report.host, []).append(report)
    return nodes


def _common_versions(reports: Sequence[NodeReport]) -> dict[str, str]:
    """Return the most common version of each software. If two are equally common, return that of the lower rank."""
    names = dict.fromkeys(name for report in reports for name in report.versions)
    counts = {name: Counter(report.versions.get(name, "unknown") for report in reports) for name in names}
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def _median(values: Iterable[float]) -> float:
    return median([value for value in values if not math.isnan(value)] or [math.nan])


def _format_ranks(ranks: Sequence[int]) -> str:
    """Format ranks as `0-7`, or as `0, 2, 4` if they are not consecutive."""
    if ranks[-1] - ranks[0] >= len(ranks):
        return ", ".join(map(str, ranks))
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
