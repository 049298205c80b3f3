"""Lock a run directory, so that only one run at a time writes there.

Rank 0 creates `run.lock` with O_EXCL, which shared file systems support even if they ignore flock. The file names the
holder, and the holder touches the file every HEARTBEAT_SECONDS. A lock is stale if its holder has ended. The next run
takes over a stale lock at once if

- the same torchrun or the same Slurm job restarted the run,
- the holder ran on this machine, and its process has ended, or
- `squeue` reports that the job of the holder has ended.

Otherwise the next run waits, and takes over the lock after STALE_SECONDS without a heartbeat. A heartbeat is a change
of the modification time, so the clocks of the machines may differ.

A holder that has lost its lock ends its process at its next heartbeat. This module does not import torch, so that the
processes of its tests start fast.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

from dist_llm.errors import ConfigError
from dist_llm.io.locks import create_exclusively
from dist_llm.launch.process_identity import is_running, read_process_identity

log = logging.getLogger("dist_llm")

LOCK_FILE = "run.lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0  # a lock without a heartbeat for this time counts as stale
LOST_LOCK_EXIT_CODE = 2  # exit code of a run that has lost its lock
DEFAULT_RDZV_IDS = ("", "none")  # values of --rdzv-id of torchrun if the user did not set it
# Field of LockHolder -> key of the lock file. All other fields have the name of their key.
KEY_OF_FIELD = {"lock_id": "token", "pid": "process", "rdzv_id": "launch", "slurm_restarts": "restarts"}
SQUEUE_TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a lock; the content of the lock file. Unknown fields are empty."""

    lock_id: str  # random, so that each lock has another
    host: str = ""
    pid: int = 0
    machine: str = ""  # boot id and PID namespace
    start_time: str = ""  # of the process, in clock ticks since boot
    since: str = ""  # date and time at which the lock was created
    rdzv_id: str = ""  # --rdzv-id of torchrun, which stays the same when torchrun restarts the ranks
    job: str = ""  # Slurm job id
    cluster: str = ""  # Slurm cluster
    slurm_restarts: int = 0  # how often Slurm has requeued the job

    def __str__(self) -> str:
        if not self.pid:
            return "an unknown process"
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, started {self.since}"


@dataclass(frozen=True)
class LockState:
    """The content of a lock file, and its modification time."""

    holder: LockHolder
    modified_ns: int


def describe_this_process(host: str, environ: Mapping[str, str] = os.environ) -> LockHolder:
    """Describe this process as the holder of a new lock."""
    boot_id, namespace, start_time = "", "", ""
    with suppress(OSError):
        boot_id, namespace, start_time = read_process_identity(os.getpid())
    rdzv_id = environ.get("TORCHELASTIC_RUN_ID", "")
    slurm_restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return LockHolder(
        lock_id=uuid4().hex,
        host=host,
        pid=os.getpid(),
        machine=f"{boot_id} {namespace}".strip(),
        start_time=start_time,
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        rdzv_id="" if rdzv_id in DEFAULT_RDZV_IDS else rdzv_id,
        job=environ.get("SLURM_JOB_ID", ""),
        cluster=environ.get("SLURM_CLUSTER_NAME", ""),
        slurm_restarts=int(slurm_restarts) if slurm_restarts.isdigit() else 0,
    )


def find_whether_ended(holder: LockHolder, this_process: LockHolder, job_ended: Callable[[str], bool]) -> bool | None:
    """Return whether the holder of a lock has ended; None if only its heartbeat can show it.

    `this_process` describes the process that calls this function. `job_ended(job)` returns True if a Slurm job is known
    to have ended.
    """
    if holder.rdzv_id and holder.rdzv_id == this_process.rdzv_id:
        return True  # torchrun restarts the ranks only after all previous ranks have ended
    same_cluster = bool(holder.job and this_process.job) and holder.cluster == this_process.cluster
    if same_cluster and holder.job == this_process.job and holder.slurm_restarts < this_process.slurm_restarts:
        return True
    if holder.machine and holder.machine == this_process.machine:
        return not is_running(holder.pid, holder.start_time)
    # A job may outlive the run in it, so a running job does not prove that the holder runs.
    if same_cluster and holder.job != this_process.job and job_ended(holder.job):
        return True
    return None


def slurm_job_ended(job: str) -> bool:
    """Return whether `squeue` reports that a job does not run; False if `squeue` fails."""
    command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if completed.returncode:
        return "Invalid job id" in completed.stderr
    # A pending job was requeued. A job in state COMPLETING may still have processes.
    ended_states = {"PENDING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY"}
    return all(state in ended_states for state in completed.stdout.split())


class RunLock:
    """While open, this process holds the lock of `directory`. Error messages name the config key `key`.

    Opening raises ConfigError if another run holds the lock, or the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        this_process: LockHolder,
        key: str = "run.dir",
        job_ended: Callable[[str], bool] = slurm_job_ended,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self.directory, self.path, self.key = directory, directory / LOCK_FILE, key
        self.this_process = this_process
        self.job_ended, self.exit_process = job_ended, exit_process
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat_loop, name="run lock", daemon=True)

    def __enter__(self) -> "RunLock":
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._acquire(self.path)
        except OSError as error:
            raise ConfigError(
                f"{self.key}: {error.filename or self.directory} cannot be written: {error.strerror}; "
                f"make it writable, or set another {self.key}"
            ) from None
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._closed.set()
        self._thread.join(HEARTBEAT_SECONDS)  # with a timeout, because the file system may hang
        with suppress(OSError):
            if (lock := read_lock(self.path)) is not None and lock.holder.lock_id == self.this_process.lock_id:
                self.path.unlink()

    def heartbeat(self) -> None:
        """Touch the lock file. End this process if another run has taken over the lock."""
        lock = read_lock(self.path)
        if lock is None:
            self._create(self.path)  # another program removed the file
        elif lock.holder.lock_id == self.this_process.lock_id:
            os.utime(self.path)
        elif lock.holder.pid:  # without a pid, the file is incomplete, because another process is writing it
            message = f"{self.key}: {self.directory} was taken over by {lock.holder}; this run ends and writes no more"
            log.error(message)
            print(message, file=sys.stderr, flush=True)
            self.exit_process(LOST_LOCK_EXIT_CODE)

    def _heartbeat_loop(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the file system is temporarily unavailable
                self.heartbeat()

    def _acquire(self, path: Path) -> None:
        """Create a lock file, or replace a stale one. Raises ConfigError if the holder has not ended.

        Several processes may find the same stale lock, but only one may replace it: the process that creates a second
        lock file, the successor. Its name contains the id of the stale lock. An atomic rename of the successor then
        replaces the stale lock.
        """
        while not self._create(path):
            if (lock := read_lock(path)) is None:
                continue  # the holder has removed the file since `_create`
            holder = lock.holder
            is_stale = find_whether_ended(holder, self.this_process, self.job_ended)
            if is_stale is None:
                is_stale = self._is_untouched(path, lock)
            if not is_stale:
                raise ConfigError(self._format_conflict(holder))
            successor = path.with_name(f"{path.name}.{holder.lock_id[:8]}")
            self._acquire(successor)
            current = read_lock(path)
            if current is not None and current.holder.lock_id == holder.lock_id:
                successor.replace(path)
                return
            successor.unlink()

    def _create(self, path: Path) -> bool:
        """Create a lock file. Return False if it exists."""
        return create_exclusively(path, dump_holder(self.this_process))

    def _is_untouched(self, path: Path, lock: LockState) -> bool:
        """Watch the lock file for STALE_SECONDS. Return False if its holder touches the file, else True.

        A file that was removed or replaced counts as untouched.
        """
        print(
            f"{self.key}: {self.directory} is locked by {lock.holder}; "
            f"waiting up to {STALE_SECONDS:.0f} s to see whether it still runs",
            file=sys.stderr,
            flush=True,
        )
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(0.25, STALE_SECONDS / 4))
            current = read_lock(path)
            if current is None or current.holder.lock_id != lock.holder.lock_id:
                return True
            if current.modified_ns != lock.modified_ns:
                return False
        return True

    def _format_conflict(self, holder: LockHolder) -> str:
        stop_command = (
            f"scancel --signal=TERM {holder.job}" if holder.job else f"kill -TERM {holder.pid}, on {holder.host}"
        )
        return (
            f"{self.key}: {self.directory} is in use by {holder}. Two runs would overwrite each other. "
            f"Set another {self.key}, or wait until that run ends, or let it save and stop: {stop_command}"
        )


def read_lock(path: Path) -> LockState | None:
    """Read a lock file. Return None if it does not exist.

    The file is opened, because an NFS client then asks the server. `stat` alone may return values that the client has
    cached.
    """
    try:
        with path.open("rb") as stream:
            return LockState(parse_holder(stream.read()), os.fstat(stream.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def dump_holder(holder: LockHolder) -> bytes:
    """Return the content of a lock file."""
    values = {KEY_OF_FIELD.get(name, name): value for name, value in asdict(holder).items()}
    return json.dumps(values).encode() + b"\n"


def parse_holder(content: bytes) -> LockHolder:
    """Parse the content of a lock file.

    A file is incomplete if another process is writing it, or was killed while it wrote. Its holder is unknown, and the
    hash of its content is the lock id.
    """
    with suppress(ValueError, TypeError, AttributeError):
        values = json.loads(content)
        keys = {field.name: KEY_OF_FIELD.get(field.name, field.name) for field in fields(LockHolder)}
        return LockHolder(**{name: values[key] for name, key in keys.items() if key in values})
    return LockHolder(lock_id=hashlib.sha256(content).hexdigest())
