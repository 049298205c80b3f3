"""Invariants that hold under faults: no checkpoint is lost, and the run resumes from the newest checkpoint."""

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


class CheckpointMonitor:
    """Checks a job's checkpoints and metrics in a thread; `faults` lists the violations.

    It reads the files directly, without the code under test.
    """

    def __init__(self, job: Job, checkpoints: Path) -> None:
        self.job, self.checkpoints = job, checkpoints
        self.saved = 0  # the step of the newest verified checkpoint
        self.step = self.reached = 0  # the current step, and the highest step so far
        self.num_repeated_steps = 0  # steps that were computed again
        self.faults: list[str] = []
        self.lock = threading.RLock()  # held while the files are changed
        self._stopped = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Check, and restart the job's failed nodes, in a thread."""
        thread = threading.Thread(target=self._run, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(TICK_SECONDS):
            with self.lock:
                try:
                    self.job.restart_failed()
                    self.check()
                except Exception as error:
                    self.faults.append(f"the monitor failed: {type(error).__name__}: {error}")
                    return

    def check(self) -> None:
        """Check once. Checkpoints are read first, because their steps are already in the metrics."""
        with self.lock:
            saved = max(self.verified_steps(), default=0)
            if saved < self.saved:
                self.faults.append(f"the checkpoint of step {self.saved} is lost, the newest is of step {saved}")
            self.saved = saved
            step = last_step(self.job.run / "metrics.jsonl")
            if step < saved:
                self.faults.append(f"the run is at step {step}, before its checkpoint of step {saved}")
            self.num_repeated_steps += max(self.step - step, 0)
            self.step, self.reached = step, max(self.reached, step)

    def verified_steps(self) -> list[int]:
        """Return the steps of the checkpoints that match their manifest."""
        return [int(path.name.removeprefix("step_")) for path in self.checkpoints.glob("step_*") if is_verified(path)]

    def damage(self, file: Path, position: int, bits: int) -> None:
        """Flip bits of a byte of the newest checkpoint. The one before it becomes the expected one."""
        with self.lock:
            self.check()
            content = bytearray(file.read_bytes())
            content[position] ^= bits
            file.write_bytes(content)
            assert self.saved not in self.verified_steps(), f"{file}: the flipped bit is not detected"
            self.saved = max(self.verified_steps(), default=0)


def is_verified(checkpoint: Path) -> bool:
    """Whether every byte of a checkpoint matches its manifest."""
    try:
        manifest = (checkpoint / "manifest.json").read_bytes()
        if (checkpoint / "COMMITTED").read_bytes() != hashlib.sha256(manifest).hexdigest().encode():
            return False
        files = json.loads(manifest)["files"]
        return all(
            f"blake3:{blake3((checkpoint / name).read_bytes()).hexdigest()}" == entry["hash"]
            for name, entry in files.items()
        )
    except FileNotFoundError:  # it has no marker, or is being removed
        return False


def last_step(metrics: Path) -> int:
    """Return the newest step with a finite loss; 0 if there is none."""
    try:
        with metrics.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL_BYTES))
            *lines, _ = file.read().split(b"\n")  # the last line is empty or incomplete
    except FileNotFoundError:
        return 0
    for line in reversed(lines[size > TAIL_BYTES :]):  # the first line may be incomplete
        row = json.loads(line)
        if math.isfinite(row.get("loss", math.nan)):
            return int(row["step"])
    return 0
