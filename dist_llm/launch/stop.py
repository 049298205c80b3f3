"""Stop a run on a signal to any rank. All ranks agree on the signal between two steps, save a checkpoint and exit.

A second signal ends the process at once, also while its main thread is blocked in a collective.
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
STOP_MARKER_VARIABLE = "DIST_LLM_STOPPED"  # environment variable: path of the stop marker, for a batch script
GRACE_SECONDS = 1.0  # time after a second signal in which the main thread may end the process by itself


class StopSignals:
    """While open, records the first signal of STOPPING that this rank receives, including a pending blocked signal.

    A second signal, if it is in TERMINATING, ends the process. Each rank calls `start_sync` before each step and
    `agreed_signal` after it, so that the all-reduce of the signals overlaps with the step.
    """

    def __init__(self) -> None:
        self.local_signal = 0  # first signal that this rank received; 0: none
        self._agreed_signal = 0
        self._previous_handlers: dict[int, Any] = {}
        self._previous_mask: set[int] = set()
        self._signal_tensor = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None
        self._pipe = (-1, -1)  # (read end, write end) of the wakeup pipe
        self._previous_wakeup_fd = -1

    def __enter__(self) -> "StopSignals":
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        threading.Thread(target=_end_on_second_signal, args=self._pipe[:1], name="stop signals", daemon=True).start()
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        handled = [
            signum for signum in STOPPING if signum not in IGNORABLE or signal.getsignal(signum) != signal.SIG_IGN
        ]
        self._previous_handlers = {signum: signal.signal(signum, self._handle) for signum in handled}
        self._previous_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous_mask)
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        os.close(self._pipe[1])  # the signal thread reads end-of-file and ends

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.local_signal and signum in TERMINATING:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.local_signal = self.local_signal or signum

    def start_sync(self) -> None:
        """Start the all-reduce of the signals that the ranks have received so far."""
        self.agreed_signal()  # completes the all-reduce of a previous step that raised an exception
        self._signal_tensor.fill_(self.local_signal)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._work = dist.all_reduce(self._signal_tensor, dist.ReduceOp.MAX, async_op=True)

    def agreed_signal(self) -> int:
        """Return a signal that any rank had received before the last `start_sync`, the same on all ranks; 0: none."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        self._agreed_signal = self._agreed_signal or int(self._signal_tensor)
        return self._agreed_signal


def _end_on_second_signal(read_fd: int) -> None:
    """Read signal numbers from the wakeup pipe, and end the process on the second signal.

    Python runs signal handlers only in the main thread, and not while it is blocked in a collective.
    """
    is_first = True
    with os.fdopen(read_fd, "rb", buffering=0) as pipe:
        while content := pipe.read(1):
            signum = content[0]
            if signum not in STOPPING:
                continue
            if not is_first and signum in TERMINATING:
                time.sleep(GRACE_SECONDS)
                os._exit(128 + signum)
            is_first = False


def write_stop_marker(signum: int, step: int, directory: Path) -> None:
    """Write the signal, and the step after which the run stopped, to the stop marker, which a batch script reads."""
    content = json.dumps({"signal": signal.Signals(signum).name, "step": step}) + "\n"
    replace_file(_stop_marker_path(directory), content.encode())


def clear_stop_marker(directory: Path) -> None:
    """Remove the stop marker of an earlier stop."""
    _stop_marker_path(directory).unlink(missing_ok=True)


def _stop_marker_path(directory: Path) -> Path:
    return Path(os.environ.get(STOP_MARKER_VARIABLE) or directory / "stopped.json")
