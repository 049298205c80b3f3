"""Preflight (`dist-llm check`): find bad or slow nodes before a long run.

Each rank measures a `NodeReport`, and the ranks all-gather the reports. `diagnose_nodes` finds the problems in them.
The process group uses gloo, and NCCL is used last, so that a node without a working GPU can still report.
"""

import math
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console

from dist_llm.errors import ConfigError
from dist_llm.launch.node_measurements import (
    collect_versions,
    measure_all_reduce,
    measure_clock_offset,
    measure_free_gib,
    measure_matmul_tflops,
    select_backend,
)
from dist_llm.launch.node_report import NodeReport, diagnose_nodes, format_problems, format_table, group_by_node
from dist_llm.launch.process_group import process_group, select_device
from dist_llm.launch.world import World

EXIT_DELAY_SECONDS = 3.0  # torchrun ends all ranks when one exits, and the other ranks need time to print
GROUP_TIMEOUT_MARGIN_SECONDS = 60.0
LOG_COLUMNS = 120  # width of the table if the output is not a terminal


class PreflightTimeout:
    """Ends this process after `seconds` and reports the phase that hangs."""

    def __init__(self, world: World, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self.phase = "the rendezvous of all ranks"
        self.problems: list[str] = []  # on rank 0: problems that the first measurements show
        self.file: Path | None = None  # test file in --directory, which is removed at the end

    @contextmanager
    def running(self) -> Iterator[None]:
        """Limit the duration of the block."""
        timer = threading.Timer(self.seconds, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def format_report(self, problem: str) -> str:
        """Format the problems so far, and `problem` of this rank, as one message."""
        return format_problems([*self.problems, f"{self.world.host}: rank {self.world.rank} {problem}"])

    def remove_file(self) -> None:
        """Remove the test file, if there is one."""
        with suppress(OSError):
            if self.file:
                self.file.unlink(missing_ok=True)

    def _end(self) -> None:
        print(
            f"error: {self.format_report(f'is still in {self.phase} after {self.seconds:g} s')}",
            file=sys.stderr,
            flush=True,
        )
        self.remove_file()
        time.sleep(EXIT_DELAY_SECONDS)
        os._exit(2)


def run_preflight(directory: Path, seconds: float, world: World) -> None:
    """Measure all ranks within `seconds`. Rank 0 prints a table with one row per node.

    If there are problems, rank 0 raises ConfigError with one line per problem. The other ranks exit with code 2 and
    print nothing.
    """
    timeout = PreflightTimeout(world, seconds)
    with timeout.running():
        try:
            # The process group times out later than `timeout`, which reports the phase.
            group_seconds = seconds + GROUP_TIMEOUT_MARGIN_SECONDS
            with process_group(world, torch.device("cpu"), group_seconds, even_if_single=True):
                reports = measure_ranks(world, directory, timeout)
        except RuntimeError as error:
            raise ConfigError(timeout.format_report(f"failed in {timeout.phase}: {_one_line(error)}")) from error
    problems = diagnose_nodes(reports)
    if world.is_main:
        console = Console()
        console.width = console.width if console.is_terminal else LOG_COLUMNS
        console.print(format_table(reports))
        if problems:
            raise ConfigError(format_problems(problems))
        console.print(
            f"no problem found; ranks: {world.world_size}, nodes: {len(group_by_node(reports))}", highlight=False
        )
    elif problems:
        time.sleep(EXIT_DELAY_SECONDS)
        raise SystemExit(2)


def measure_ranks(world: World, directory: Path, timeout: PreflightTimeout) -> list[NodeReport]:
    """Measure on all ranks and return the reports by rank. Raises RuntimeError if a collective fails."""
    timeout.phase = "the clock"
    clock_offset = measure_clock_offset()
    timeout.phase = "--directory"
    shared_file = try_shared_file(directory, timeout)
    failures = shared_file.failures
    timeout.phase = "versions and matrix products"
    device, tflops = torch.device("cpu"), math.nan
    try:
        device = select_device(world)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        tflops = measure_matmul_tflops(device)
    except (ConfigError, RuntimeError) as error:
        failures.append(_one_line(error))
    local_report = NodeReport(
        world.rank,
        world.host,
        collect_versions(device),
        clock_offset_seconds=clock_offset,
        free_gib=measure_free_gib(directory),
        sees_shared_file=shared_file.is_visible,
        matmul_tflops=tflops,
        failures=tuple(failures),
    )
    timeout.phase = "the exchange of reports"
    reports = _all_gather(local_report)
    timeout.problems = diagnose_nodes(reports) if world.is_main else []
    if any(math.isnan(report.matmul_tflops) or report.versions["GPU"] == "none" for report in reports):
        device = torch.device("cpu")
    timeout.phase = "the all-reduce of all ranks"
    rates = measure_all_reduce(device, dist.new_group(backend=select_backend(device)))
    neighbour_rate = measure_neighbour_bandwidth(world, [report.host for report in reports], device, timeout)
    local_report = replace(
        local_report,
        all_reduce_us=rates.latency_us,
        all_reduce_gb_per_second=rates.gb_per_second,
        neighbour_gb_per_second=neighbour_rate,
    )
    return _all_gather(local_report)


class SharedFileResult(NamedTuple):
    """Whether this rank sees a file that rank 0 has written."""

    is_visible: bool | None  # None if rank 0 cannot write the file
    failures: list[str]  # on rank 0: why it cannot write the file


def try_shared_file(directory: Path, timeout: PreflightTimeout, wait_seconds: float = 10) -> SharedFileResult:
    """Write a file on rank 0 and search for it on all ranks, to find out whether `directory` is shared.

    Every rank must call this. Each rank waits up to `wait_seconds` for the file, which is then removed.
    """
    message = [secrets.token_hex(16), ""]  # content of the file, and why rank 0 cannot write it
    try:
        if dist.get_rank() == 0:
            timeout.file = directory / f".dist-llm-check-{message[0]}"
            try:
                timeout.file.write_text(message[0], encoding="utf-8")
            except OSError as error:
                message[1] = f"--directory {directory} cannot be written to: {error.strerror}"
        dist.broadcast_object_list(message)
        token, failure = message
        if failure:
            return SharedFileResult(None, [failure] if timeout.file else [])
        deadline = time.monotonic() + wait_seconds
        path = directory / f".dist-llm-check-{token}"
        while not (is_visible := _has_content(path, token)) and time.monotonic() < deadline:
            time.sleep(0.2)
        dist.barrier()
        return SharedFileResult(is_visible, [])
    finally:
        timeout.remove_file()


def _has_content(file: Path, content: str) -> bool:
    """Return whether the file exists with this content."""
    try:
        return file.read_text(encoding="utf-8") == content
    except OSError:
        return False


def measure_neighbour_bandwidth(
    world: World, hosts: Sequence[str], device: torch.device, timeout: PreflightTimeout
) -> float:
    """Measure GB/s of an all-reduce over the ranks of this node and the next node; NaN on the last node.

    `hosts` are the node names by rank. Disjoint pairs of nodes run at the same time, so a hundred nodes take as long as
    three.
    """
    pairs, rate = list(pairwise(dict.fromkeys(hosts))), math.nan
    pairs = pairs[::2] + pairs[1::2]
    ranks_by_pair = [[rank for rank, host in enumerate(hosts) if host in pair] for pair in pairs]
    groups = [dist.new_group(ranks, backend=select_backend(device)) for ranks in ranks_by_pair]
    for pair, group in zip(pairs, groups, strict=True):
        if world.host in pair:
            timeout.phase = f"the all-reduce of {pair[0]} and {pair[1]}"
            pair_rates = measure_all_reduce(device, group)
            rate = pair_rates.gb_per_second if world.host == pair[0] else rate
    return rate


def _all_gather(report: NodeReport) -> list[NodeReport]:
    """Return the reports of all ranks, by rank."""
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
