"""Identify a process by PID, boot id, PID namespace and start time, because the kernel reuses PIDs."""

import os
from pathlib import Path
from typing import NamedTuple

BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")


class ProcessIdentity(NamedTuple):
    """What distinguishes a process from all others with the same PID, on any machine and at any time."""

    boot_id: str  # a new random id at each boot of a machine
    pid_namespace: str  # a container has its own PIDs
    start_time: str  # in clock ticks since boot


def read_process_identity(pid: int) -> ProcessIdentity:
    """Read the identity of a process of this machine from /proc.

    Raises OSError if no process has this PID, or if /proc is mounted with hidepid and hides the process because it
    belongs to another user.
    """
    start_time = _read_stat(pid).start_time
    return ProcessIdentity(BOOT_ID_FILE.read_text().strip(), os.readlink(f"/proc/{pid}/ns/pid"), start_time)


def is_running(pid: int, start_time: str) -> bool:
    """Return whether the process with this PID and start time runs on this machine.

    A zombie has ended. A hidden process of another user counts as running, because its start time is unknown.
    """
    try:
        process = _read_stat(pid)
    except OSError:
        return _is_hidden(pid)
    has_ended = process.state in "ZX"  # Z: zombie; X: dead
    return process.start_time == start_time and not has_ended


class _ProcessStat(NamedTuple):
    """Fields of /proc/PID/stat."""

    state: str  # field 3, one letter
    start_time: str  # field 22, in clock ticks since boot


def _read_stat(pid: int) -> _ProcessStat:
    """Read the state of a process. Raises OSError if /proc does not show the process."""
    # Field 2 is the name of the program in parentheses. It may contain spaces, so the fields after it are split.
    fields_from_3 = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return _ProcessStat(fields_from_3[0], fields_from_3[22 - 3])


def _is_hidden(pid: int) -> bool:
    """Return whether a process with this PID exists that /proc hides, because it belongs to another user."""
    try:
        os.kill(pid, 0)  # sends no signal, but raises PermissionError for a process of another user
    except PermissionError:
        return True
    except OSError:
        return False
    return False
