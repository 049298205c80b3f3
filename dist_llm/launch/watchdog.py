"""End a run that makes no progress, and report which rank holds up the others.

A thread on each rank checks the time since the last heartbeat, which is a call of `Watchdog.heartbeat` in the training
loop. If one rank stalls, all ranks stall, because they wait for each other. Each stalled rank then publishes a report
in the rendezvous store: its activity, the line of code, and whether it waits in a collective. A rank without a report
has been stopped, or its node has failed. A rank that waits in no collective holds up the others.
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
from typing import Any, NamedTuple

import torch.distributed as dist

from dist_llm.compat import get_default_rendezvous_store
from dist_llm.launch.failures import FIRST_FAILURE
from dist_llm.launch.flight_recorder import find_pending_collective
from dist_llm.launch.process_identity import read_process_identity
from dist_llm.launch.world import World

log = logging.getLogger("dist_llm")

EXIT_CODE = 70  # exit code of a rank that the watchdog ends
START_TIMEOUT_FACTOR = 30  # multiplies run.hang_seconds before the first heartbeat
NUM_FIRST_HEARTBEATS = 3  # of the first steps, which may compile
FIRST_STEPS_TIMEOUT_FACTOR = 10  # multiplies run.hang_seconds during the first steps
MEDIAN_STEP_TIMEOUT_FACTOR = 10  # the timeout is at least this many times the median duration of recent steps
NUM_RECENT_STEPS = 32  # number of steps in the median
STORE_POLL_SECONDS = 0.2  # pause between two reads of the reports
REPORT_TIMEOUT_SECONDS = 5.0  # a rank waits at most this long for the reports of other ranks
PROCESS_KEY, REPORT_KEY = "dist_llm/process", "dist_llm/stalled"  # prefixes of keys in the rendezvous store
GRACE_SECONDS = 4.0  # time between the diagnosis and the end of the process
STORE_UNREACHABLE = (
    "the store of the process group, which runs on the node of rank 0, does not answer: the process of rank 0 is "
    "stopped, or its node is gone"
)
Report = dict[str, Any]  # host, activity, collective and location of a stalled rank


class _StallReports(NamedTuple):
    """What the ranks have published in the rendezvous store."""

    by_rank: dict[int, Report]
    silent_processes: dict[int, Any]  # (host, PID, identity) of each rank without a report


class Watchdog:
    """While open, ends this process if no heartbeat comes within the timeout.

    `hang_seconds` is the config key run.hang_seconds; None disables the watchdog. The timeout is longer at the start,
    for slow activities, and if recent steps took long, see `current_timeout_seconds`.
    """

    def __init__(self, world: World, hang_seconds: float | None, exit_process: Callable[[int], Any] = os._exit) -> None:
        self.world, self.hang_seconds, self.exit_process = world, hang_seconds or 0.0, exit_process
        self.num_heartbeats, self.timeout_factor = 0, START_TIMEOUT_FACTOR
        self.last_time, self.activity = time.monotonic(), "the start"
        self.recent_seconds: deque[float] = deque(maxlen=NUM_RECENT_STEPS)
        self._main_thread = threading.get_ident()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.hang_seconds:
            self.last_time = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._closed.set()

    def register(self) -> None:
        """Publish host, PID and identity of this process, so that a rank on the node can kill it if it is silent."""
        if self.world.world_size > 1 and dist.is_initialized():
            rendezvous_store = get_default_rendezvous_store()
            process = (self.world.host, os.getpid(), read_process_identity(os.getpid()))
            rendezvous_store.set(f"{PROCESS_KEY}/{self.world.rank}", json.dumps(process))
            # After a restart, the store of the launcher may contain the reports of earlier processes.
            for key in (f"{REPORT_KEY}/{self.world.rank}", *([FIRST_FAILURE] if self.world.is_main else [])):
                rendezvous_store.delete_key(key)

    def heartbeat(self, activity: str, timeout_factor: int = 1) -> None:
        """Record progress: this rank begins `activity`. Its timeout is `timeout_factor` times that of a step."""
        now = time.monotonic()
        if self.num_heartbeats >= NUM_FIRST_HEARTBEATS and self.timeout_factor == 1:
            self.recent_seconds.append(now - self.last_time)
        self.num_heartbeats += 1
        self.last_time, self.activity, self.timeout_factor = now, activity, timeout_factor

    @property
    def current_timeout_seconds(self) -> float:
        """Seconds from the last heartbeat until this process is ended."""
        first_steps_factor = FIRST_STEPS_TIMEOUT_FACTOR if self.num_heartbeats <= NUM_FIRST_HEARTBEATS else 1
        recent_seconds = tuple(self.recent_seconds)  # a copy, because the main thread appends
        median_seconds = statistics.median(recent_seconds) if recent_seconds else 0.0
        timeout = self.hang_seconds * max(first_steps_factor, self.timeout_factor)
        return max(timeout, MEDIAN_STEP_TIMEOUT_FACTOR * median_seconds)

    def _watch(self) -> None:
        """Compare the time since the last heartbeat with the timeout, about once a second."""
        while not self._closed.wait(min(1.0, self.hang_seconds / 4)):
            # Read the count before the time. If a heartbeat comes in between, the stall looks short, and nothing is
            # aborted.
            num_heartbeats, timeout = self.num_heartbeats, self.current_timeout_seconds
            stalled_seconds = time.monotonic() - self.last_time
            if stalled_seconds > timeout and self._abort(stalled_seconds, num_heartbeats):
                return

    def _abort(self, stalled_seconds: float, num_heartbeats: int) -> bool:
        """Report the stalled rank and end this process. Return False if the run has resumed in the meantime."""
        world, collective = self.world, find_pending_collective()
        stack = traceback.format_stack(sys._current_frames().get(self._main_thread))
        state = f"waiting in {collective}" if collective else "in no collective"
        log.error(
            "rank %d on %s has made no progress for %.0f s, in %s, %s\n%s",
            *(world.rank, world.host, stalled_seconds, self.activity, state, "".join(stack)),
        )
        location = " ".join(stack[-1].split()) if stack else "an unknown location"
        report = {"host": world.host, "activity": self.activity, "collective": collective, "location": location}
        reports, silent_processes = _exchange_reports(world, report)
        if self._has_resumed(num_heartbeats):  # ranks without a report may also have resumed
            return False
        reporter = min(reports) if reports else world.rank
        for line in diagnose_stall(reports, world.world_size) if reports else [STORE_UNREACHABLE]:
            log.error(line)
            # Only the log of rank 0 is printed. Without its report, the lowest rank that reported prints instead.
            if world.rank == reporter and not world.is_main:
                print(line, file=sys.stderr, flush=True)
        has_killed = kill_silent_ranks(world, silent_processes)
        # Other ranks need time to read the reports before the launcher sees the first exit. Rank 0 may host the store.
        time.sleep(GRACE_SECONDS if world.is_main else GRACE_SECONDS / 2)
        if not has_killed and self._has_resumed(num_heartbeats):
            return False
        log.error(
            "ended after run.hang_seconds=%g without progress; raise it if a step may take that long",
            self.hang_seconds,
        )
        for handler in log.handlers:
            handler.flush()
        self.exit_process(EXIT_CODE)
        return True

    def _has_resumed(self, num_heartbeats: int) -> bool:
        """Return whether this rank has made progress since heartbeat `num_heartbeats`. If so, withdraw its report."""
        if self.num_heartbeats == num_heartbeats and not self._closed.is_set():
            return False
        log.warning("rank %d on %s has resumed, with %s", self.world.rank, self.world.host, self.activity)
        if self.world.world_size > 1 and dist.is_initialized():
            thread = threading.Thread(target=_publish, args=(self.world, None), name="withdraw report", daemon=True)
            thread.start()
            thread.join(REPORT_TIMEOUT_SECONDS)  # if the store has failed, the run ends soon
        return True


def diagnose_stall(reports: Mapping[int, Report], num_ranks: int) -> list[str]:
    """Return one line for each rank that holds up the other ranks, given the reports by rank."""
    silent_ranks = [rank for rank in range(num_ranks) if rank not in reports]
    lines = [f"rank {rank} does not answer: its process is stopped, or its node is gone" for rank in silent_ranks]
    for rank, report in reports.items():
        if not report["collective"]:
            location = f"in {report['activity']}: {report['location']}"
            lines.append(f"rank {rank} on {report['host']} holds up the run, {location}")
    if not lines:
        waiting = ", ".join(f"{rank} in {report['collective']}" for rank, report in sorted(reports.items()))
        lines = [f"all ranks wait for each other: {waiting}; the network fails, or the collectives do not match"]
    return lines


def kill_silent_ranks(world: World, processes: Mapping[int, Any]) -> bool:
    """Kill the ranks without a report whose processes run on this node. Return whether one was killed.

    `processes` has (host, PID, identity) by rank. Without this function, torchrun would send SIGTERM, which a stopped
    process does not receive, and would send SIGKILL only 30 s later.
    """
    has_killed = False
    for rank, (host, pid, identity) in processes.items():
        with suppress(OSError):  # the process has already ended
            if host == world.host and read_process_identity(pid) == tuple(identity):  # JSON made it a list
                log.error("killing rank %d, process %d on this node", rank, pid)
                os.kill(pid, signal.SIGKILL)
                has_killed = True
    return has_killed


def _exchange_reports(world: World, report: Report) -> _StallReports:
    """Publish the report of this rank and wait for those of other ranks. The result is empty if the store fails.

    The store may run in a stopped process of rank 0. A request then blocks without a timeout, so a daemon thread sends
    the requests.
    """
    if world.world_size == 1 or not dist.is_initialized():
        return _StallReports({world.rank: report}, {})
    updates: queue.SimpleQueue[_StallReports] = queue.SimpleQueue()
    threading.Thread(target=_collect_reports, args=(world, report, updates), name="reports", daemon=True).start()
    latest = _StallReports({}, {})
    with suppress(queue.Empty):
        # The thread stops collecting after REPORT_TIMEOUT_SECONDS, and then reads the silent processes once.
        deadline = time.monotonic() + REPORT_TIMEOUT_SECONDS + 1.0
        while len(latest.by_rank) + len(latest.silent_processes) < world.world_size:
            latest = updates.get(timeout=max(0.0, deadline - time.monotonic()))
    return latest


def _collect_reports(world: World, report: Report, updates: "queue.SimpleQueue[_StallReports]") -> None:
    """Publish the report. Each time the store answers, put all reports so far into `updates`."""
    reports, ranks = {world.rank: report}, set(range(world.world_size))
    try:
        rendezvous_store = _publish(world, report)
        deadline = time.monotonic() + REPORT_TIMEOUT_SECONDS
        while time.monotonic() < deadline and len(reports) < world.world_size:
            reports |= _read_values(rendezvous_store, REPORT_KEY, ranks - reports.keys())
            updates.put(_StallReports(dict(reports), {}))
            time.sleep(STORE_POLL_SECONDS)
        silent_processes = _read_values(rendezvous_store, PROCESS_KEY, ranks - reports.keys())
        updates.put(_StallReports(dict(reports), silent_processes))
    except Exception as error:  # the node that hosts the store has failed
        log.error("rank %d cannot read the reports of the other ranks: %s", world.rank, error)


def _publish(world: World, report: Report | None) -> Any:
    """Set the report of this rank in the rendezvous store, and return the store.

    None withdraws the report. The key is not deleted, because a read of a missing key blocks.
    """
    rendezvous_store = get_default_rendezvous_store()
    rendezvous_store.set(f"{REPORT_KEY}/{world.rank}", json.dumps(report))
    return rendezvous_store


def _read_values(rendezvous_store: Any, prefix: str, ranks: Iterable[int]) -> dict[int, Any]:
    """Read the values at `prefix/rank` for the ranks that have one."""
    keys = {rank: f"{prefix}/{rank}" for rank in ranks}
    values = {
        rank: json.loads(rendezvous_store.get(key)) for rank, key in keys.items() if rendezvous_store.check([key])
    }
    return {rank: value for rank, value in values.items() if value is not None}
