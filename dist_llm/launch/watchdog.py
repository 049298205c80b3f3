"""A run that stands still is ended, and told why: which rank holds up the others, and where it is.

Every rank has a thread that looks at the time of its last beat. Where ranks work in step, all stand still when one
does. Each then leaves word in the store of the process group: where it is, and whether it waits in a collective. A
rank that leaves no word is stopped or gone; one that waits for no other holds up those that do.
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

import torch
import torch.distributed as dist

from dist_llm.launch.failures import FIRST_FAILURE
from dist_llm.launch.process import identity
from dist_llm.launch.world import World

log = logging.getLogger("dist_llm")

EXIT_CODE = 70  # of a rank that ended itself
START_TIMES = 30  # before its first beat a rank may stand still so many times as long
FIRST_BEATS, FIRST_TIMES = 3, 10  # the first steps, which compile, may take so many times as long
USUAL_TIMES = 10  # and later ones so many times as the newest took, by their median
NEWEST = 32
CHECKPOINT_GROUP = "checkpoint"  # what the thread that writes one calls its group
ANSWER_SECONDS = 5.0  # that ranks have to leave word, once the first has
PROCESS, STILL = "dist_llm/process", "dist_llm/still"  # in the store of the process group
Answers = tuple[dict[int, dict[str, Any]], dict[int, Any]]
LAST_SECONDS = 4.0  # between the verdict and the end
SILENT = (
    "the store of the process group, which is on the node of rank 0, does not answer: the process of rank 0 is "
    "stopped, or its node gone"
)


class Watchdog:
    """While open, ends this process where it stands still for `limit_seconds`, or as much longer as is said below.

    0: never.
    """

    def __init__(self, world: World, limit_seconds: float, end: Callable[[int], Any] = os._exit) -> None:
        self.world, self.limit, self.end = world, limit_seconds, end
        self.beats, self.times, self.last, self.what = 0, START_TIMES, time.monotonic(), "the start"
        self.took: deque[float] = deque(maxlen=NEWEST)
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.limit:
            self.last = time.monotonic()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()

    def introduce(self) -> None:
        """Tell the others which process this is, in the store of the process group."""
        if self.world.size > 1 and dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            store.set(f"{PROCESS}/{self.world.rank}", json.dumps((self.world.host, os.getpid(), identity(os.getpid()))))
            # A launcher may keep its store over restarts, with the words of ranks that are no more.
            for key in (f"{STILL}/{self.world.rank}", *([FIRST_FAILURE] if self.world.main else [])):
                store.delete_key(key)

    def beat(self, what: str, times: int = 1) -> None:
        """This rank goes on, with `what`, which may stand still `times` as long as a step."""
        now = time.monotonic()
        if self.beats >= FIRST_BEATS and self.times == 1:
            self.took.append(now - self.last)
        self.beats, self.last, self.what, self.times = self.beats + 1, now, what, times

    @property
    def patience(self) -> float:
        """Seconds that it may stand still now."""
        first = FIRST_TIMES if self.beats <= FIRST_BEATS else 1
        usual = statistics.median(took) if (took := tuple(self.took)) else 0.0  # a copy: another thread adds to it
        return max(self.limit * max(first, self.times), USUAL_TIMES * usual)

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.limit / 4)):
            beats, patience = self.beats, self.patience  # before the time: a beat in between makes it shorter
            if (stood := time.monotonic() - self.last) > patience and self._tell(stood, beats):
                return

    def _tell(self, stood: float, beats: int) -> bool:
        """End this process, and tell why. False where it went on meanwhile."""
        world, waiting = self.world, unfinished()
        stack = traceback.format_stack(sys._current_frames().get(self._main))
        log.error(
            "rank %d on %s stands still since %.0f s, in %s, %s\n%s",
            *(world.rank, world.host, stood, self.what, f"waiting in {waiting}" if waiting else "in no collective"),
            "".join(stack),
        )
        place = " ".join(stack[-1].split()) if stack else "an unknown place"
        every, silent = _exchange(world, {"host": world.host, "what": self.what, "waiting": waiting, "place": place})
        if self._went_on(beats):  # perhaps with those that look silent: they had no reason to leave word
            return False
        speaks = min(every) if every else world.rank
        for line in verdict(every, world.size) if every else [SILENT]:
            log.error(line)
            if world.rank == speaks and not world.main:  # who has the screen is the one that is silent
                print(line, file=sys.stderr, flush=True)
        killed = kill_silent(self.world, silent)
        # The others read and speak, too, before the launcher hears of the first that ends; rank 0 may be their store.
        time.sleep(LAST_SECONDS if world.main else LAST_SECONDS / 2)
        if not killed and self._went_on(beats):
            return False
        log.error("ended after run.hang_seconds: %g; raise it where a step may take so long", self.limit)
        for handler in log.handlers:
            handler.flush()
        self.end(EXIT_CODE)
        return True

    def _went_on(self, beats: int) -> bool:
        """Whether there was a beat since, or the end. Then the word that was left must not be heard the next time."""
        if self.beats == beats and not self._over.is_set():
            return False
        log.warning("rank %d on %s goes on after all, with %s", self.world.rank, self.world.host, self.what)
        if self.world.size > 1 and dist.is_initialized():
            thread = threading.Thread(target=_say, args=(self.world, None), name="takes back", daemon=True)
            thread.start()
            thread.join(ANSWER_SECONDS)  # a store that is gone ends the run otherwise
        return True


def verdict(every: dict[int, dict[str, Any]], ranks: int) -> list[str]:
    """Who holds up the others, from what those that answered said, by rank."""
    gone = [rank for rank in range(ranks) if rank not in every]
    lines = [f"rank {rank} does not answer: its process is stopped, or its node gone" for rank in gone]
    for rank, said in every.items():
        if not said["waiting"]:
            lines.append(f"rank {rank} on {said['host']} holds up the run, in {said['what']}: {said['place']}")
    if not lines:
        places = ", ".join(f"{rank} in {said['waiting']}" for rank, said in sorted(every.items()))
        lines = [f"all ranks wait for each other: {places}; a network that fails, or collectives that do not match"]
    return lines


def kill_silent(world: World, silent: Mapping[int, Any]) -> bool:
    """End the processes on this node of ranks that do not answer: a launcher would wait for them to end by themselves.

    Torchrun asks for 30 s before it kills; one that is stopped cannot hear it. Returns whether there was one.
    """
    killed = False
    for rank, (host, process, who) in silent.items():
        with suppress(OSError):  # it has ended
            if host == world.host and identity(process) == who:
                log.error("rank %d, process %d on this node, is killed", rank, process)
                os.kill(process, signal.SIGKILL)
                killed = True
    return killed


def unfinished() -> str:
    """The newest collective that this process is in, but for those of a checkpoint's thread; empty: none.

    From torch's flight recorder (`start_recording`).
    """
    entries = _recorded()
    if not entries:
        return ""
    newest = max(entries, key=lambda entry: entry["time_created_ns"])
    return f"{newest['profiling_name']} {newest['input_sizes']} of {newest['process_group'][1]}"


def waits() -> bool:
    """Whether this process, or its device, is in a collective now. What NCCL has yet to start waits for nobody."""
    return any(not entry["profiling_name"].startswith("nccl") or entry["state"] == "started" for entry in _recorded())


def _recorded() -> list[dict[str, Any]]:
    """Collectives that are not over, but for those of a checkpoint's thread."""
    if not dist.is_initialized():
        return []
    entries = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # gloo's, and NCCL's where there is one
        with suppress(Exception):  # of a build without it
            entries += json.loads(getattr(torch._C._distributed_c10d, name)())["entries"]
    return [
        entry
        for entry in entries
        # NCCL's are retired some time after they are completed; gloo's have no such state.
        if not entry.get("retired", True)
        and entry["state"] != "completed"
        and CHECKPOINT_GROUP not in entry["process_group"]
    ]


def start_recording(device: torch.device) -> None:
    """Have torch note its newest collectives; reading them takes some 15 us each. Before the process group is made.

    A GPU's host runs a step ahead of it, so that the one that runs is far from the newest.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1024" if device.type == "cuda" else "64")
    os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")  # else none is known to have started


def _exchange(world: World, mine: dict[str, Any]) -> tuple[dict[int, dict[str, Any]], dict[int, Any]]:
    """(what the ranks that stand still say: those that answer in time; of those that do not, which process they are).

    Nothing of either where there is none to ask. Rank 0 may hold the store in which they leave word. Where it is
    stopped, a question to it never returns, and has no limit of its own: a thread asks, which is left behind.
    """
    if world.size == 1 or not dist.is_initialized():
        return {world.rank: mine}, {}
    answers: queue.SimpleQueue[Answers] = queue.SimpleQueue()
    threading.Thread(target=_ask, args=(world, mine, answers), name="asks", daemon=True).start()
    found: Answers = ({}, {})
    with suppress(queue.Empty):
        until = time.monotonic() + ANSWER_SECONDS + 1.0
        while len(found[0]) + len(found[1]) < world.size:
            found = answers.get(timeout=max(0.0, until - time.monotonic()))
    return found


def _ask(world: World, mine: dict[str, Any], answers: "queue.SimpleQueue[Answers]") -> None:
    """Leave word in the store, and hand on what others left there, each time that the store answers."""
    found, every = {world.rank: mine}, set(range(world.size))
    try:
        store = _say(world, mine)
        until = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < until and len(found) < world.size:
            found |= _words(store, STILL, every - found.keys())
            answers.put((dict(found), {}))
            time.sleep(0.2)
        answers.put((dict(found), _words(store, PROCESS, every - found.keys())))
    except Exception as error:  # the store's host is gone
        log.error("rank %d cannot ask the others: %s", world.rank, error)


def _say(world: World, word: dict[str, Any] | None) -> Any:
    """Leave this rank's word in the store, or None in its place: one that is deleted may be waited for."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{STILL}/{world.rank}", json.dumps(word))
    return store


def _words(store: Any, about: str, ranks: Iterable[int]) -> dict[int, Any]:
    """What these ranks left there, of those that did."""
    keys = {rank: f"{about}/{rank}" for rank in ranks}
    left = {rank: json.loads(store.get(key)) for rank, key in keys.items() if store.check([key])}
    return {rank: word for rank, word in left.items() if word is not None}
