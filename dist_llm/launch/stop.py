"""Being told to stop, by a signal to any rank: all ranks agree on it, between two steps."""

import json
import os
import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # Slurm's preemption, and its time limit's warning
MARKER = "DIST_LLM_STOPPED"  # names the file that tells a batch script of a stop


class StopSignals:
    """While open, a first SIGTERM or SIGUSR1 is only noted, as is one that waited, blocked; a second SIGTERM ends the
    process.

    `share` and `agreed` are called on every rank around each step: the word goes round while the step is computed.
    """

    def __init__(self) -> None:
        self.noted = 0  # by this rank
        self.told = 0  # by some rank, as all agreed
        self._before: dict[int, Any] = {}
        self._blocked: set[int] = set()
        self._number = torch.zeros((), dtype=torch.int64)
        self._work: dist.Work | None = None

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        self._blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted and number == signal.SIGTERM:
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


def leave_word(number: int, step: int, directory: Path) -> None:
    """For whoever started the run: that it was stopped, by which signal, after which step."""
    path = Path(os.environ.get(MARKER) or directory / "stopped.json")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({"signal": signal.Signals(number).name, "step": step}) + "\n")
    temporary.replace(path)


def forget_word(directory: Path) -> None:
    """A run that goes on is not stopped any more."""
    Path(os.environ.get(MARKER) or directory / "stopped.json").unlink(missing_ok=True)
