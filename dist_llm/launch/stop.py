"""Stop on a signal to any rank: all ranks agree on it between two steps, save a checkpoint and exit.

A second signal ends the process at once, even while its main thread is blocked in a collective.
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

from dist_llm.io.atomic import replace_file

TERMINATING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # preemption, Ctrl-C, a closed terminal
STOPPING = (*TERMINATING, signal.SIGUSR1)  # SIGUSR1: Slurm's warning before the time limit
IGNORABLE = (signal.SIGINT, signal.SIGHUP)  # nohup and background jobs ignore these; we then ignore them too
MARKER = "DIST_LLM_STOPPED"  # environment variable with the path of the marker file that a batch script reads
GRACE_SECONDS = 1.0  # after a second signal, until the signal thread ends the process if the main thread has not


class StopSignals:
    """While open, record the first signal of STOPPING, also one that was blocked and pending.

    A second signal that is in TERMINATING ends the process. Each rank calls `start_sync` before and `agreed_signal`
    after each step, so that the all-reduce overlaps with the step.
    """

    def __init__(self) -> None:
        self.local_signal = 0  # received by this rank; 0: none
        self._agreed_signal = 0
        self._previous_handlers: dict[int, Any] = {}
        self._blocked: set[int] = set()
        self._signal_tensor = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None
        self._pipe = (-1, -1)
        self._previous_wakeup_fd = -1

    def __enter__(self) -> "StopSignals":
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        threading.Thread(target=_end_on_second_signal, args=self._pipe[:1], name="stop signals", daemon=True).start()
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        handled = [each for each in STOPPING if each not in IGNORABLE or signal.getsignal(each) != signal.SIG_IGN]
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in handled}
        self._blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        os.close(self._pipe[1])  # the signal thread reads end-of-file and ends

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.local_signal and number in TERMINATING:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.local_signal = self.local_signal or number

    def start_sync(self) -> None:
        """Start the all-reduce of the signals that the ranks have received so far."""
        self.agreed_signal()  # completes the all-reduce of a step that raised
        self._signal_tensor.fill_(self.local_signal)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._work = dist.all_reduce(self._signal_tensor, dist.ReduceOp.MAX, async_op=True)

    def agreed_signal(self) -> int:
        """Return a signal that a rank had received before the last `start_sync`, the same on all ranks; 0: none."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        self._agreed_signal = self._agreed_signal or int(self._signal_tensor)
        return self._agreed_signal


def _end_on_second_signal(read_fd: int) -> None:
    """Read signal numbers from the wakeup pipe, and end the process on the second one.

    Python runs a handler in the main thread only, and not while that thread is blocked in a collective.
    """
    first = True
    with os.fdopen(read_fd, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in STOPPING:
                continue
            if not first and number[0] in TERMINATING:
                time.sleep(GRACE_SECONDS)
                os._exit(128 + number[0])
            first = False


def write_stop_marker(number: int, step: int, directory: Path) -> None:
    """Write the signal and the step after which the run stopped, for a batch script."""
    content = json.dumps({"signal": signal.Signals(number).name, "step": step}) + "\n"
    replace_file(_marker_path(directory), content.encode())


def clear_stop_marker(directory: Path) -> None:
    """Remove the marker of an earlier stop."""
    _marker_path(directory).unlink(missing_ok=True)


def _marker_path(directory: Path) -> Path:
    return Path(os.environ.get(MARKER) or directory / "stopped.json")
