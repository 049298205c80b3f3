"""Being told to stop, by a signal to any rank: all ranks agree on it, between two steps, save and end.

A second signal ends the process at once, also while its main thread waits in a collective.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # preemption, Ctrl-C, a terminal that closes: twice, at once
STOPPING = (*ENDING, signal.SIGUSR1)  # Slurm's warning before the time limit
IGNORABLE = (signal.SIGINT, signal.SIGHUP)  # started by nohup or as a background job, a run goes on
MARKER = "DIST_LLM_STOPPED"  # names the file that tells a batch script of a stop
GRACE_SECONDS = 1.0  # that the main thread has to end by a second signal itself


class StopSignals:
    """While open, the first of STOPPING is only noted, as is one that waited, blocked. A second one, if it is one of
    ENDING, ends the process.

    `share` and `agreed` are called on every rank around each step: the word goes round while the step is computed.
    """

    def __init__(self) -> None:
        self.noted = 0  # by this rank
        self.told = 0  # by some rank, as all agreed
        self._before: dict[int, Any] = {}
        self._blocked: set[int] = set()
        self._number = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None
        self._pipe = (-1, -1)
        self._wakeup_before = -1

    def __enter__(self) -> "StopSignals":
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        threading.Thread(target=_end_on_second, args=self._pipe[:1], name="stop signals", daemon=True).start()
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        heard = [each for each in STOPPING if each not in IGNORABLE or signal.getsignal(each) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        self._blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._pipe[1])  # which ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number in ENDING:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noted = self.noted or number

    def share(self) -> None:
        """Tell the others what was noted so far."""
        self.agreed()  # of a step that was broken off
        self._number.fill_(self.noted)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._work = dist.all_reduce(self._number, dist.ReduceOp.MAX, async_op=True)

    def agreed(self) -> int:
        """The signal that some rank had noted when it last shared; 0: none. The same on every rank."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        self.told = self.told or int(self._number)
        return self.told


def _end_on_second(pipe: int) -> None:
    """Read the number of each signal as it comes, and end the process on a second one.

    Python runs handlers in the main thread, and not before it leaves the collective that it waits in.
    """
    first = True
    with os.fdopen(pipe, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in STOPPING:
                continue
            if not first and number[0] in ENDING:
                time.sleep(GRACE_SECONDS)
                os._exit(128 + number[0])
            first = False


def leave_word(number: int, step: int, directory: Path) -> None:
    """For whoever started the run: that it was stopped, by which signal, after which step."""
    path = Path(os.environ.get(MARKER) or directory / "stopped.json")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"signal": signal.Signals(number).name, "step": step}) + "\n")
    temporary.replace(path)


def forget_word(directory: Path) -> None:
    """A run that goes on is not stopped any more."""
    Path(os.environ.get(MARKER) or directory / "stopped.json").unlink(missing_ok=True)
