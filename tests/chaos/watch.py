"""What must hold while faults come: no checkpoint is lost, and the run goes back no further than to the newest one."""

import hashlib
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from tests.chaos.job import Job

TICK_SECONDS = 0.2
TAIL_BYTES = 1 << 14


class Watch:
    """Looks at a job's checkpoints and metrics, beside it: `faults` are what it saw go wrong.

    It reads bytes, and asks nothing of the code that it watches.
    """

    def __init__(self, job: Job, checkpoints: Path) -> None:
        self.job, self.checkpoints = job, checkpoints
        self.saved = 0  # the step of the newest that is whole
        self.step = self.reached = 0  # the run's, and the highest ever
        self.retaken = 0  # steps that were taken again
        self.faults: list[str] = []
        self.lock = threading.RLock()  # whoever holds it changes what is looked at
        self._over = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Look, and keep the job running, in a thread."""
        thread = threading.Thread(target=self._run, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _run(self) -> None:
        while not self._over.wait(TICK_SECONDS):
            with self.lock:
                try:
                    self.job.keep()
                    self.look()
                except Exception as error:
                    self.faults.append(f"the watch failed: {type(error).__name__}: {error}")
                    return

    def look(self) -> None:
        """Once. The checkpoints first: what they hold was in the metrics before."""
        with self.lock:
            saved = max(self.whole(), default=0)
            if saved < self.saved:
                self.faults.append(f"the checkpoint of step {self.saved} is lost, the newest is of step {saved}")
            self.saved = saved
            step = last_step(self.job.run / "metrics.jsonl")
            if step < saved:
                self.faults.append(f"the run is at step {step}, before its checkpoint of step {saved}")
            self.retaken += max(self.step - step, 0)
            self.step, self.reached = step, max(self.reached, step)

    def whole(self) -> list[int]:
        """The steps of the checkpoints that are what their manifest says."""
        return [int(path.name.removeprefix("step_")) for path in self.checkpoints.glob("step_*") if whole(path)]

    def damage(self, file: Path, at: int, bits: int) -> None:
        """Flip bits of a byte of the newest. From then on, the one before it counts."""
        with self.lock:
            self.look()
            content = bytearray(file.read_bytes())
            content[at] ^= bits
            file.write_bytes(content)
            assert self.saved not in self.whole(), f"{file}: no damage was done"
            self.saved = max(self.whole(), default=0)


def whole(checkpoint: Path) -> bool:
    """Whether every byte of a checkpoint is there."""
    try:
        manifest = (checkpoint / "manifest.json").read_bytes()
        if (checkpoint / "COMMITTED").read_bytes() != hashlib.sha256(manifest).hexdigest().encode():
            return False
        files = json.loads(manifest)["files"]
        return all(
            f"blake3:{blake3((checkpoint / name).read_bytes()).hexdigest()}" == written["hash"]
            for name, written in files.items()
        )
    except FileNotFoundError:  # it has no marker, or is removed just now
        return False


def last_step(metrics: Path) -> int:
    """The newest whose loss is finite; 0 before there is one."""
    try:
        with metrics.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL_BYTES))
            *lines, _ = file.read().split(b"\n")  # the last is empty, or not written to its end
    except FileNotFoundError:
        return 0
    for line in reversed(lines[size > TAIL_BYTES :]):  # the first may have been cut
        row = json.loads(line)
        if math.isfinite(row.get("loss", math.nan)):
            return int(row["step"])
    return 0
