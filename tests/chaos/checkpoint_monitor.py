"""Check the invariants of a job under faults: no checkpoint is lost, and the run resumes from the newest checkpoint.

monitor = CheckpointMonitor(job, checkpoints=job.run / "checkpoints")
with monitor.running():
    ...  # inject faults
assert not monitor.violations
"""

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

CHECK_INTERVAL_SECONDS = 0.2
METRICS_TAIL_BYTES = 1 << 14


class CheckpointMonitor:
    """Checks the checkpoints and metrics of a job in a thread, and restarts its failed nodes.

    `violations` lists the invariants that did not hold. The monitor reads the files without the code under test.
    """

    def __init__(self, job: Job, checkpoints: Path) -> None:
        self.job, self.checkpoints = job, checkpoints
        self.saved_step = 0  # of the newest verified checkpoint
        self.step = self.highest_step = 0  # the current step, and the highest step so far
        self.num_repeated_steps = 0  # steps that were computed again after a restart
        self.violations: list[str] = []
        self.lock = threading.RLock()  # for the thread and for tests that change the files
        self._stopped = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the thread during the block."""
        thread = threading.Thread(target=self._run, name="checkpoint monitor", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(CHECK_INTERVAL_SECONDS):
            with self.lock:
                try:
                    self.job.restart_failed()
                    self.check()
                except Exception as error:
                    self.violations.append(f"the monitor failed: {type(error).__name__}: {error}")
                    return

    def check(self) -> None:
        """Check once. Checkpoints are read first, because their steps are already in the metrics."""
        with self.lock:
            saved_step = max(self.list_verified_steps(), default=0)
            if saved_step < self.saved_step:
                self.violations.append(
                    f"the checkpoint of step {self.saved_step} is lost, the newest is of step {saved_step}"
                )
            self.saved_step = saved_step
            step = read_last_step(self.job.run / "metrics.jsonl")
            if step < saved_step:
                self.violations.append(f"the run is at step {step}, before its checkpoint of step {saved_step}")
            self.num_repeated_steps += max(self.step - step, 0)
            self.step, self.highest_step = step, max(self.highest_step, step)

    def list_verified_steps(self) -> list[int]:
        """Return the steps of the checkpoints that match their manifest."""
        return [int(path.name.removeprefix("step_")) for path in self.checkpoints.glob("step_*") if is_verified(path)]

    def damage(self, file: Path, offset: int, bit_mask: int) -> None:
        """Flip bits of one byte of the newest checkpoint; then expect a resume from the checkpoint before it."""
        with self.lock:
            self.check()
            content = bytearray(file.read_bytes())
            content[offset] ^= bit_mask
            file.write_bytes(content)
            assert self.saved_step not in self.list_verified_steps(), f"{file}: the flipped bit is not detected"
            self.saved_step = max(self.list_verified_steps(), default=0)


def is_verified(checkpoint: Path) -> bool:
    """Return whether all bytes of a checkpoint match its manifest."""
    try:
        manifest = (checkpoint / "manifest.json").read_bytes()
        if (checkpoint / "COMMITTED").read_bytes() != hashlib.sha256(manifest).hexdigest().encode():
            return False
        files = json.loads(manifest)["files"]
        return all(
            f"blake3:{blake3((checkpoint / name).read_bytes()).hexdigest()}" == entry["hash"]
            for name, entry in files.items()
        )
    except FileNotFoundError:  # the checkpoint has no marker, or is being removed
        return False


def read_last_step(metrics: Path) -> int:
    """Return the last step with a finite loss; 0 if there is none."""
    try:
        with metrics.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            file.seek(max(0, file_bytes - METRICS_TAIL_BYTES))
            *lines, _ = file.read().split(b"\n")  # the last line is empty or incomplete
    except FileNotFoundError:
        return 0
    for line in reversed(lines[file_bytes > METRICS_TAIL_BYTES :]):  # the first line may be incomplete
        row = json.loads(line)
        if math.isfinite(row.get("loss", math.nan)):
            return int(row["step"])
    return 0
