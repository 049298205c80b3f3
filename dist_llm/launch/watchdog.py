"""End a run that makes no progress, and report which rank holds up the others.

A thread on each rank checks the time of the last heartbeat. Ranks run in lockstep, so that all of them stall together.
Each stalled rank then publishes a report in the store of the process group: what it does, where, and whether it waits
in a collective. A rank without a report is stopped or gone. A rank that waits in no collective is the culprit.
"""

import json
import logging
import os
import queue
import signal
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from dist_llm.compat import default_rendezvous_store
from dist_llm.launch.failures import FIRST_FAILURE
from dist_llm.launch.flight_recorder import pending_collective
from dist_llm.launch.process_identity import read_process_identity
from dist_llm.launch.world import World

log = logging.getLogger("dist_llm")

EXIT_CODE = 70  # of a rank that the watchdog ended
START_FACTOR = 30  # timeout before the first heartbeat, in units of run.hang_seconds
FIRST_HEARTBEATS, FIRST_FACTOR = 3, 10  # the first steps compile: their timeout is longer
TYPICAL_FACTOR = 10  # a later step may also take this many times the median of recent steps
NUM_RECENT = 32
REPORT_SECONDS = 5.0  # how long a rank waits for the reports of the others
PROCESS_KEY, REPORT_KEY = "dist_llm/process", "dist_llm/stalled"  # in the store of the process group
GRACE_SECONDS = 4.0  # between the diagnosis and the end of the process
STORE_UNREACHABLE = (
    "the store of the process group, which runs on the node of rank 0, does not answer: the process of rank 0 is "
    "stopped, or its node is gone"
)
Report = dict[str, Any]
Reports = tuple[dict[int, Report], dict[int, Any]]  # (reports by rank, process identities of ranks without a report)


class Watchdog:
    """While open, ends this process if no heartbeat comes within the timeout.

    `limit_seconds`: run.hang_seconds; 0: never. `timeout_now` returns the current timeout.
    """

    def __init__(self, world: World, limit_seconds: float, exit_process: Callable[[int], Any] = os._exit) -> None:
        self.world, self.limit, self.exit_process = world, limit_seconds, exit_process
        self.num_heartbeats, self.factor, self.last_time, self.activity = 0, START_FACTOR, time.monotonic(), "the start"
        self.recent_seconds: deque[float] = deque(maxlen=NUM_RECENT)
        self._main_thread = threading.get_ident()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.limit:
            self.last_time = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._closed.set()

    def register(self) -> None:
        """Publish this process's host, pid and identity, so that another rank on the node can kill it if it stalls."""
        if self.world.world_size > 1 and dist.is_initialized():
            store = default_rendezvous_store()
            process = (self.world.host, os.getpid(), read_process_identity(os.getpid()))
            store.set(f"{PROCESS_KEY}/{self.world.rank}", json.dumps(process))
            # A launcher may keep its store over restarts, with the reports of earlier processes.
            for key in (f"{REPORT_KEY}/{self.world.rank}", *([FIRST_FAILURE] if self.world.is_main else [])):
                store.delete_key(key)

    def heartbeat(self, activity: str, factor: int = 1) -> None:
        """Record progress: this rank begins an `activity` that may take `factor` times as long as a step."""
        now = time.monotonic()
        if self.num_heartbeats >= FIRST_HEARTBEATS and self.factor == 1:
            self.recent_seconds.append(now - self.last_time)
        self.num_heartbeats += 1
        self.last_time, self.activity, self.factor = now, activity, factor

    @property
    def timeout_now(self) -> float:
        """Return the current timeout: seconds from the last heartbeat until the process is ended."""
        first = FIRST_FACTOR if self.num_heartbeats <= FIRST_HEARTBEATS else 1
        recent = tuple(self.recent_seconds)  # a copy: the main thread appends
        typical = statistics.median(recent) if recent else 0.0
        return max(self.limit * max(first, self.factor), TYPICAL_FACTOR * typical)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.limit / 4)):
            # Read the count before the time: a heartbeat in between then shortens the measured stall.
            num_heartbeats, timeout = self.num_heartbeats, self.timeout_now
            stalled_seconds = time.monotonic() - self.last_time
            if stalled_seconds > timeout and self._abort(stalled_seconds, num_heartbeats):
                return

    def _abort(self, stalled_seconds: float, num_heartbeats: int) -> bool:
        """Report the stalled rank and end this process. Return False if the run has resumed in the meantime."""
        world, collective = self.world, pending_collective()
        stack = traceback.format_stack(sys._current_frames().get(self._main_thread))
        state = f"waiting in {collective}" if collective else "in no collective"
        log.error(
            "rank %d on %s has made no progress for %.0f s, in %s, %s\n%s",
            *(world.rank, world.host, stalled_seconds, self.activity, state, "".join(stack)),
        )
        location = " ".join(stack[-1].split()) if stack else "an unknown location"
        report = {"host": world.host, "activity": self.activity, "collective": collective, "location": location}
        reports, silent = _exchange_reports(world, report)
        if self._has_resumed(num_heartbeats):  # the ranks without a report may have resumed too
            return False
        reporter = min(reports) if reports else world.rank
        for line in diagnose_stall(reports, world.world_size) if reports else [STORE_UNREACHABLE]:
            log.error(line)
            if world.rank == reporter and not world.is_main:  # rank 0, which owns the console, has not reported
                print(line, file=sys.stderr, flush=True)
        killed = kill_silent_ranks(world, silent)
        # The others also need to read and print before the launcher sees the first exit; rank 0 may hold the store.
        time.sleep(GRACE_SECONDS if world.is_main else GRACE_SECONDS / 2)
        if not killed and self._has_resumed(num_heartbeats):
            return False
        log.error("ended after run.hang_seconds=%g without progress; raise it if a step may take that long", self.limit)
        for handler in log.handlers:
            handler.flush()
        self.exit_process(EXIT_CODE)
        return True

    def _has_resumed(self, num_heartbeats: int) -> bool:
        """Return whether this rank made progress or finished since then. If so, withdraw its report."""
        if self.num_heartbeats == num_heartbeats and not self._closed.is_set():
            return False
        log.warning("rank %d on %s has resumed, with %s", self.world.rank, self.world.host, self.activity)
        if self.world.world_size > 1 and dist.is_initialized():
            thread = threading.Thread(target=_publish, args=(self.world, None), name="withdraw report", daemon=True)
            thread.start()
            thread.join(REPORT_SECONDS)  # if the store is gone, the run ends for that reason
        return True


def diagnose_stall(reports: Mapping[int, Report], num_ranks: int) -> list[str]:
    """Return one line for each rank that holds up the others, given the reports by rank."""
    silent = [rank for rank in range(num_ranks) if rank not in reports]
    lines = [f"rank {rank} does not answer: its process is stopped, or its node is gone" for rank in silent]
    for rank, report in reports.items():
        if not report["collective"]:
            where = f"in {report['activity']}: {report['location']}"
            lines.append(f"rank {rank} on {report['host']} holds up the run, {where}")
    if not lines:
        waiting = ", ".join(f"{rank} in {report['collective']}" for rank, report in sorted(reports.items()))
        lines = [f"all ranks wait for each other: {waiting}; the network fails, or the collectives do not match"]
    return lines


def kill_silent_ranks(world: World, silent: Mapping[int, Any]) -> bool:
    """Kill silent ranks (without a report) whose processes run on this node. Return whether there was one.

    Torchrun sends SIGTERM and waits 30 s before it kills; a stopped process does not receive SIGTERM.
    """
    killed = False
    for rank, (host, pid, identity) in silent.items():
        with suppress(OSError):  # the process has already ended
            if host == world.host and read_process_identity(pid) == identity:
                log.error("killing rank %d, process %d on this node", rank, pid)
                os.kill(pid, signal.SIGKILL)
                killed = True
    return killed


def _exchange_reports(world: World, report: Report) -> Reports:
    """Publish this rank's report and wait for the others'. Both results are empty if the store is gone.

    A stopped rank 0 may host the store. A request to it then blocks without a timeout, so a daemon thread sends the
    requests and is abandoned.
    """
    if world.world_size == 1 or not dist.is_initialized():
        return {world.rank: report}, {}
    updates: queue.SimpleQueue[Reports] = queue.SimpleQueue()
    threading.Thread(target=_collect_reports, args=(world, report, updates), name="reports", daemon=True).start()
    newest: Reports = ({}, {})
    with suppress(queue.Empty):
        deadline = time.monotonic() + REPORT_SECONDS + 1.0
        while len(newest[0]) + len(newest[1]) < world.world_size:
            newest = updates.get(timeout=max(0.0, deadline - time.monotonic()))
    return newest


def _collect_reports(world: World, report: Report, updates: "queue.SimpleQueue[Reports]") -> None:
    """Publish the report. Put all reports so far into `updates` each time that the store answers."""
    reports, ranks = {world.rank: report}, set(range(world.world_size))
    try:
        store = _publish(world, report)
        deadline = time.monotonic() + REPORT_SECONDS
        while time.monotonic() < deadline and len(reports) < world.world_size:
            reports |= _read_values(store, REPORT_KEY, ranks - reports.keys())
            updates.put((dict(reports), {}))
            time.sleep(0.2)
        updates.put((dict(reports), _read_values(store, PROCESS_KEY, ranks - reports.keys())))
    except Exception as error:  # the node that runs the store is gone
        log.error("rank %d cannot read the reports of the other ranks: %s", world.rank, error)


def _publish(world: World, report: Report | None) -> Any:
    """Set this rank's report in the store; None deletes it. Return the store. Reads of a deleted key block."""
    store = default_rendezvous_store()
    store.set(f"{REPORT_KEY}/{world.rank}", json.dumps(report))
    return store


def _read_values(store: Any, prefix: str, ranks: Iterable[int]) -> dict[int, Any]:
    """Read the values at `prefix/rank` for the ranks that have one."""
    keys = {rank: f"{prefix}/{rank}" for rank in ranks}
    values = {rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}
    return {rank: value for rank, value in values.items() if value is not None}
