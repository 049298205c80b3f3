"""Who holds up a run: from what ranks say, and from what they do not say. A run that goes on is left alone."""

import json
import signal
import subprocess
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from dist_llm.launch.process import identity
from dist_llm.launch.watchdog import EXIT_CODE, FIRST_BEATS, SILENT, Watchdog, kill_silent, verdict
from dist_llm.launch.world import World


def said(
    waiting: str = "gloo:all_reduce [[4]] of default_pg", what: str = "step 5", host: str = "n1"
) -> dict[str, Any]:
    return {"host": host, "what": what, "waiting": waiting, "place": "train.py, in forward"}


def test_who_waits_for_nobody_holds_up_the_others() -> None:
    assert verdict({0: said(), 1: said("", host="n2"), 2: said()}, 3) == [
        "rank 1 on n2 holds up the run, in step 5: train.py, in forward"
    ]


def test_who_says_nothing_is_stopped_or_gone() -> None:
    assert verdict({0: said(), 2: said()}, 3) == ["rank 1 does not answer: its process is stopped, or its node gone"]


def test_where_all_wait_it_is_none_of_them() -> None:
    (line,) = verdict({0: said("gloo:send [[2]] of pp"), 1: said()}, 2)
    assert line.startswith("all ranks wait for each other: 0 in gloo:send [[2]] of pp, 1 in gloo:all_reduce")


def ended(limit: float, beats: int, seconds: float, times: int = 1) -> list[int]:
    codes: list[int] = []
    with Watchdog(World(), limit, end=codes.append) as dog:
        for number in range(beats):
            dog.beat(f"step {number}", times)
        time.sleep(seconds)
    return codes


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_llm.launch.watchdog.LAST_SECONDS", 0.0)


def test_a_run_that_stands_still_is_ended() -> None:
    assert ended(0.2, FIRST_BEATS + 1, 0.8) == [EXIT_CODE]


def test_it_is_ended_though_the_store_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 holds it, and may be the one that is stopped."""

    class Stopped:
        def set(self, key: str, value: str) -> None:
            threading.Event().wait()

    monkeypatch.setattr("dist_llm.launch.watchdog.ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", Stopped)
    codes: list[int] = []
    with Watchdog(World(1, 2), 0.2, end=codes.append) as dog:
        for number in range(FIRST_BEATS + 1):
            dog.beat(f"step {number}")
        until = time.monotonic() + 10
        while not codes and time.monotonic() < until:
            time.sleep(0.05)
    assert codes == [EXIT_CODE]
    assert SILENT in caplog.messages


def test_a_run_that_goes_on_after_all_is_left_alone_and_its_next_halt_is_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A cable is put back while the verdict is spoken."""
    monkeypatch.setattr("dist_llm.launch.watchdog.LAST_SECONDS", 1.0)
    codes: list[int] = []
    with Watchdog(World(), 0.2, end=codes.append) as dog:
        for number in range(FIRST_BEATS + 1):
            dog.beat(f"step {number}")
        time.sleep(0.6)
        for _ in range(4):  # quick ones, that leave its patience short
            dog.beat("the step after")
        time.sleep(0.9)
        assert codes == []
        assert "goes on after all, with the step after" in caplog.text
        time.sleep(1.2)
    assert codes == [EXIT_CODE]


def test_a_neighbour_that_went_on_too_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A halt that ended before the other rank's watchdog looked: that one has left no word, and beats."""
    store, me = dist.HashStore(), World(0, 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr("dist_llm.launch.watchdog.unfinished", lambda: "")
    monkeypatch.setattr("dist_llm.launch.watchdog.ANSWER_SECONDS", 0.5)
    codes: list[int] = []
    with subprocess.Popen(["sleep", "60"]) as other:
        store.set("dist_llm/process/1", json.dumps((me.host, other.pid, identity(other.pid))))
        with Watchdog(me, 0.4, end=codes.append) as dog:
            for number in range(FIRST_BEATS + 1):
                dog.beat(f"step {number}")
            time.sleep(0.7)
            for _ in range(20):
                dog.beat("going on")
                time.sleep(0.1)
        assert other.poll() is None
        other.kill()
    assert codes == []
    assert store.get("dist_llm/still/0") == b"null", "its word is taken back"


@pytest.mark.parametrize(
    ("limit", "beats", "times"),
    [(0.2, 1, 1), (0.2, FIRST_BEATS + 1, 30), (0.0, FIRST_BEATS + 1, 1)],
    ids=["the first steps", "what takes long", "no limit"],
)
def test_what_may_take_longer_is_not(limit: float, beats: int, times: int) -> None:
    assert ended(limit, beats, 0.8, times) == []


def test_long_steps_may_be_ten_times_as_long() -> None:
    dog = Watchdog(World(), 1.0)
    for number in range(FIRST_BEATS):
        dog.beat(f"step {number}")
    for _ in range(3):
        dog.last -= 7.0
        dog.beat("a step")
    assert dog.patience == pytest.approx(70.0, rel=0.01)
    dog.last -= 60.0
    dog.beat("a step that met a cut link")
    assert dog.patience == pytest.approx(70.0, rel=0.01), "one does not make them long"


def test_a_process_is_killed_only_if_it_is_the_one_that_was_introduced() -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        who = identity(other.pid)
        for wrong in ([*who[:2], "1"], [who[0], "pid:[1]", who[2]]):  # at another time; in another container
            kill_silent(World(0, 3, host="n1"), {1: ["n1", other.pid, wrong]})
        kill_silent(World(0, 3, host="n2"), {1: ["n1", other.pid, who]})
        assert other.poll() is None
        # One that has ended already is no reason to leave the next one alive.
        kill_silent(World(0, 3, host="n1"), {2: ["n1", 2**22 + 1, who], 1: ["n1", other.pid, who]})
        assert other.wait(10) == -signal.SIGKILL
