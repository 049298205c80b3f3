"""The watchdog uses the reports of all ranks to name the rank that blocks a run. It does not end a run that resumes."""

import json
import signal
import subprocess
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from dist_llm.launch.process_identity import read_process_identity
from dist_llm.launch.watchdog import (
    EXIT_CODE,
    NUM_FIRST_HEARTBEATS,
    STORE_UNREACHABLE,
    Watchdog,
    diagnose_stall,
    kill_silent_ranks,
)
from dist_llm.launch.world import World


def make_report(
    collective: str = "gloo:all_reduce [[4]] of default_pg", activity: str = "step 5", host: str = "n1"
) -> dict[str, Any]:
    """Return what the watchdog thread of a rank publishes."""
    return {"host": host, "activity": activity, "collective": collective, "location": "train.py, in forward"}


def test_a_rank_outside_collectives_holds_up_the_others() -> None:
    assert diagnose_stall({0: make_report(), 1: make_report("", host="n2"), 2: make_report()}, num_ranks=3) == [
        "rank 1 on n2 holds up the run, in step 5: train.py, in forward"
    ]


def test_a_rank_without_a_report_is_named() -> None:
    assert diagnose_stall({0: make_report(), 2: make_report()}, num_ranks=3) == [
        "rank 1 does not answer: its process is stopped, or its node is gone"
    ]


def test_no_rank_is_named_if_all_ranks_wait() -> None:
    (line,) = diagnose_stall({0: make_report("gloo:send [[2]] of pp"), 1: make_report()}, num_ranks=2)
    assert line.startswith("all ranks wait for each other: 0 in gloo:send [[2]] of pp, 1 in gloo:all_reduce")


def run_watchdog(hang_seconds: float, num_heartbeats: int, run_seconds: float, factor: int = 1) -> list[int]:
    """Send heartbeats, then none for `run_seconds`; return the exit codes with which the watchdog ended the process."""
    exit_codes: list[int] = []
    with Watchdog(World(), hang_seconds, exit_process=exit_codes.append) as watchdog:
        for step in range(num_heartbeats):
            watchdog.heartbeat(f"step {step}", factor)
        time.sleep(run_seconds)
    return exit_codes


@pytest.fixture(autouse=True)
def disable_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """End processes at once."""
    monkeypatch.setattr("dist_llm.launch.watchdog.GRACE_SECONDS", 0.0)


def test_a_run_without_progress_is_ended() -> None:
    assert run_watchdog(hang_seconds=0.2, num_heartbeats=NUM_FIRST_HEARTBEATS + 1, run_seconds=0.8) == [EXIT_CODE]


def test_a_run_is_ended_if_the_store_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 hosts the store, and may be the stopped rank."""

    class StoppedStore:
        def set(self, key: str, value: str) -> None:
            threading.Event().wait()

    monkeypatch.setattr("dist_llm.launch.watchdog.REPORT_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", StoppedStore)
    exit_codes: list[int] = []
    with Watchdog(World(rank=1, world_size=2), hang_seconds=0.2, exit_process=exit_codes.append) as watchdog:
        for step in range(NUM_FIRST_HEARTBEATS + 1):
            watchdog.heartbeat(f"step {step}")
        deadline = time.monotonic() + 10
        while not exit_codes and time.monotonic() < deadline:
            time.sleep(0.05)
    assert exit_codes == [EXIT_CODE]
    assert STORE_UNREACHABLE in caplog.messages


def test_a_run_that_resumes_is_not_ended(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The network recovers while the diagnosis is collected."""
    monkeypatch.setattr("dist_llm.launch.watchdog.GRACE_SECONDS", 1.0)
    exit_codes: list[int] = []
    with Watchdog(World(), hang_seconds=0.2, exit_process=exit_codes.append) as watchdog:
        for step in range(NUM_FIRST_HEARTBEATS + 1):
            watchdog.heartbeat(f"step {step}")
        time.sleep(0.6)
        for _ in range(4):  # short steps keep the timeout short
            watchdog.heartbeat("the step after")
        time.sleep(0.9)
        assert exit_codes == []
        assert "has resumed, with the step after" in caplog.text
        time.sleep(1.2)
    assert exit_codes == [EXIT_CODE]


def test_a_resumed_rank_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stall ended before the other rank's watchdog checked: that rank has no report, but has heartbeats."""
    store, own_world = dist.HashStore(), World(rank=0, world_size=2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr("dist_llm.launch.watchdog.find_pending_collective", lambda: "")
    monkeypatch.setattr("dist_llm.launch.watchdog.REPORT_TIMEOUT_SECONDS", 0.5)
    exit_codes: list[int] = []
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        store.set("dist_llm/process/1", json.dumps((own_world.host, sleeper.pid, read_process_identity(sleeper.pid))))
        with Watchdog(own_world, hang_seconds=0.4, exit_process=exit_codes.append) as watchdog:
            for step in range(NUM_FIRST_HEARTBEATS + 1):
                watchdog.heartbeat(f"step {step}")
            time.sleep(0.7)
            for _ in range(20):
                watchdog.heartbeat("going on")
                time.sleep(0.1)
        assert sleeper.poll() is None
        sleeper.kill()
    assert exit_codes == []
    assert store.get("dist_llm/stalled/0") == b"null", "the report is not withdrawn"


@pytest.mark.parametrize(
    ("limit", "heartbeats", "factor"),
    [(0.2, 1, 1), (0.2, NUM_FIRST_HEARTBEATS + 1, 30), (0.0, NUM_FIRST_HEARTBEATS + 1, 1)],
    ids=["the first steps", "a long activity", "no limit"],
)
def test_a_longer_timeout_applies_to_slow_activities(limit: float, heartbeats: int, factor: int) -> None:
    assert run_watchdog(limit, heartbeats, run_seconds=0.8, factor=factor) == []


def test_the_timeout_is_ten_times_the_median_of_long_steps() -> None:
    watchdog = Watchdog(World(), hang_seconds=1.0)
    for step in range(NUM_FIRST_HEARTBEATS):
        watchdog.heartbeat(f"step {step}")
    for _ in range(3):
        watchdog.last_time -= 7.0
        watchdog.heartbeat("a step")
    assert watchdog.current_timeout_seconds == pytest.approx(70.0, rel=0.01)
    watchdog.last_time -= 60.0
    watchdog.heartbeat("a step that met a cut link")
    assert watchdog.current_timeout_seconds == pytest.approx(70.0, rel=0.01), "one long step changed the timeout"


def test_only_the_registered_process_is_killed() -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        identity = read_process_identity(sleeper.pid)
        for wrong_identity in (
            [*identity[:2], "1"],
            [identity[0], "pid:[1]", identity[2]],
        ):  # another start time; another container
            kill_silent_ranks(World(rank=0, world_size=3, host="n1"), {1: ["n1", sleeper.pid, wrong_identity]})
        kill_silent_ranks(World(rank=0, world_size=3, host="n2"), {1: ["n1", sleeper.pid, identity]})
        assert sleeper.poll() is None
        # A process that has already ended must not prevent the kill of the next one.
        kill_silent_ranks(
            World(rank=0, world_size=3, host="n1"), {2: ["n1", 2**22 + 1, identity], 1: ["n1", sleeper.pid, identity]}
        )
        assert sleeper.wait(10) == -signal.SIGKILL
