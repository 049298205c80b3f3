"""The lock of a run directory: only one run at a time writes there.

Rank 0 creates `run.lock` with O_EXCL, which shared file systems honour where they ignore flock, and touches it every
HEARTBEAT_SECONDS. The file says who holds the lock. A lock whose holder is gone is stale and is taken over:

- at once, if the same torchrun or the same Slurm job restarted the run, if the holder ran on this machine and its
  process is gone, or if `squeue` no longer knows its job;
- else after STALE_SECONDS without a touch. Only changes of the file's time are compared, so clocks may differ.

A holder whose lock was taken over ends as soon as it notices. Imports no torch.
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
STALE_SECONDS = 60.0
EXIT_CODE = 2  # of a run that lost its lock
UNNAMED_LAUNCHES = ("", "none")  # torchrun's --rdzv-id if the user did not set it
SQUEUE_SECONDS = 20


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a lock. Unknown fields are empty."""

    token: str  # unique for every lock
    host: str = ""
    process: int = 0
    machine: str = ""  # boot id and PID namespace
    start_time: str = ""  # of the process, in ticks since boot
    since: str = ""
    launch: str = ""  # torchrun's --rdzv-id, the same after its restarts
    job: str = ""  # Slurm's
    cluster: str = ""
    restarts: int = 0  # times that Slurm queued the job again

    def __str__(self) -> str:
        if not self.process:
            return "an unknown process"
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.process} on {self.host}{job}, started {self.since}"


@dataclass(frozen=True)
class LockState:
    """A lock file as read."""

    holder: LockHolder
    modified_ns: int


def describe_this_process(host: str, environ: Mapping[str, str] = os.environ) -> LockHolder:
    """Return this process as the holder of a new lock."""
    boot_id, namespace, start_time = "", "", ""
    with suppress(OSError):
        boot_id, namespace, start_time = read_process_identity(os.getpid())
    launch = environ.get("TORCHELASTIC_RUN_ID", "")
    restarts = environ.get("SLURM_RESTART_COUNT", "0")
    return LockHolder(
        token=uuid4().hex,
        host=host,
        process=os.getpid(),
        machine=f"{boot_id} {namespace}".strip(),
        start_time=start_time,
        since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        launch="" if launch in UNNAMED_LAUNCHES else launch,
        job=environ.get("SLURM_JOB_ID", ""),
        cluster=environ.get("SLURM_CLUSTER_NAME", ""),
        restarts=int(restarts) if restarts.isdigit() else 0,
    )


def has_ended(holder: LockHolder, me: LockHolder, job_ended: Callable[[str], bool]) -> bool | None:
    """Return whether a lock's holder has ended, seen from the process `me`. None: only its heartbeat can tell.

    `job_ended`: whether a Slurm job has ended, as far as is known.
    """
    if holder.launch and holder.launch == me.launch:
        return True  # a launcher restarts its ranks only after all previous ranks have ended
    same_cluster = bool(holder.job and me.job) and holder.cluster == me.cluster
    if same_cluster and holder.job == me.job and holder.restarts < me.restarts:
        return True
    if holder.machine and holder.machine == me.machine:
        return not is_running(holder.process, holder.start_time)
    # A job may outlive the run in it, so a running job proves nothing.
    if same_cluster and holder.job != me.job and job_ended(holder.job):
        return True
    return None


def slurm_job_ended(job: str) -> bool:
    """Return whether `squeue` reports that the job does not run; False if it cannot tell."""
    command = ["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode:
        return "Invalid job id" in done.stderr
    # A pending job was queued again. A completing job may still have processes.
    ended = {"PENDING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "PREEMPTED", "NODE_FAIL", "OUT_OF_MEMORY"}
    return all(state in ended for state in done.stdout.split())


class RunLock:
    """While open, this process holds the lock of `directory`, which the config key `key` names.

    Opening raises ConfigError if another run holds the lock, or the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        me: LockHolder,
        key: str = "run.dir",
        job_ended: Callable[[str], bool] = slurm_job_ended,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self.directory, self.path, self.me, self.key = directory, directory / LOCK_FILE, me, key
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
            if (lock := read_lock(self.path)) is not None and lock.holder.token == self.me.token:
                self.path.unlink()

    def heartbeat(self) -> None:
        """Touch the lock. End this process if another run took the lock over."""
        lock = read_lock(self.path)
        if lock is None:
            self._create(self.path)  # another program removed it
        elif lock.holder.token == self.me.token:
            os.utime(self.path)
        elif lock.holder.process:  # else the file is being written
            message = f"{self.key}: {self.directory} was taken over by {lock.holder}; this run ends and writes no more"
            log.error(message)
            print(message, file=sys.stderr, flush=True)
            self.exit_process(EXIT_CODE)

    def _heartbeat_loop(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the file system is temporarily unavailable
                self.heartbeat()

    def _acquire(self, path: Path) -> None:
        """Create a lock file, or replace a stale one. Raises ConfigError if its holder has not ended.

        Several processes may find the same stale lock, but only one may replace it: the one that holds a second lock,
        which is named after the stale one. The second lock then becomes the new lock by an atomic rename.
        """
        while not self._create(path):
            if (lock := read_lock(path)) is None:
                continue
            holder = lock.holder
            is_stale = has_ended(holder, self.me, self.job_ended)
            if is_stale is None:
                is_stale = self._is_untouched(path, lock)
            if not is_stale:
                raise ConfigError(self._refusal(holder))
            successor = path.with_name(f"{path.name}.{holder.token[:8]}")
            self._acquire(successor)
            current = read_lock(path)
            if current is not None and current.holder.token == holder.token:
                successor.replace(path)
                return
            successor.unlink()

    def _create(self, path: Path) -> bool:
        """Create a lock file. Return False if it exists."""
        return create_exclusively(path, json.dumps(asdict(self.me)).encode() + b"\n")

    def _is_untouched(self, path: Path, lock: LockState) -> bool:
        """Watch the lock. Return False when its holder touches it; True if it is untouched, released or replaced."""
        print(
            f"{self.key}: {self.directory} is locked by {lock.holder}; "
            f"waiting up to {STALE_SECONDS:.0f} s to see whether it still runs",
            file=sys.stderr,
            flush=True,
        )
        until = time.monotonic() + STALE_SECONDS
        while time.monotonic() < until:
            time.sleep(min(0.25, STALE_SECONDS / 4))
            current = read_lock(path)
            if current is None or current.holder.token != lock.holder.token:
                return True
            if current.modified_ns != lock.modified_ns:
                return False
        return True

    def _refusal(self, holder: LockHolder) -> str:
        stop = f"scancel --signal=TERM {holder.job}" if holder.job else f"kill -TERM {holder.process}, on {holder.host}"
        return (
            f"{self.key}: {self.directory} is in use by {holder}. Two runs would overwrite each other. "
            f"Set another {self.key}, or wait until that run ends, or let it save and stop: {stop}"
        )


def read_lock(path: Path) -> LockState | None:
    """Read the lock file. Return None if it does not exist.

    Opening the file makes NFS ask the server; `stat` alone may answer from the client's cache.
    """
    try:
        with path.open("rb") as stream:
            return LockState(parse_holder(stream.read()), os.fstat(stream.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def parse_holder(content: bytes) -> LockHolder:
    """Parse the holder from a lock file. A file truncated by a kill is identified by its hash."""
    with suppress(ValueError, TypeError, AttributeError):
        known = {field.name for field in fields(LockHolder)}
        return LockHolder(**{name: value for name, value in json.loads(content).items() if name in known})
    return LockHolder(token=hashlib.sha256(content).hexdigest())
