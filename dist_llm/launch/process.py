"""Which process is meant by a number: the machine, the PID namespace and the start time tell. Imports no torch."""

import os
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def identity(process: int) -> list[str]:
    """[boot id, PID namespace, start time]: what no other process has that goes by this number.

    Raises OSError where there is no such process, or where it may not be looked at.
    """
    return [BOOT_ID.read_text().strip(), os.readlink(f"/proc/{process}/ns/pid"), _stat(process)[1]]


def is_running(process: int, start_time: str) -> bool:
    """Whether the process with this number and start time runs on this machine. A zombie does not run."""
    try:
        state, found = _stat(process)
    except OSError:
        return _is_hidden(process)
    return found == start_time and state not in "ZX"


def _stat(process: int) -> tuple[str, str]:
    """(state, start time in clock ticks since boot)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def _is_hidden(process: int) -> bool:
    """Whether there is such a process of another user: /proc may be mounted with hidepid."""
    try:
        os.kill(process, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False
