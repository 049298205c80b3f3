"""Identify a process by machine, PID namespace, PID and start time, because the system reuses PIDs.

This module does not import torch.
"""

import os
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def read_process_identity(pid: int) -> list[str]:
    """Return [boot id, PID namespace, start time] of a process. No other process with this PID has the same values.

    Raises OSError if there is no such process, or if it belongs to another user under hidepid.
    """
    return [BOOT_ID.read_text().strip(), os.readlink(f"/proc/{pid}/ns/pid"), _read_stat(pid)[1]]


def is_running(pid: int, start_time: str) -> bool:
    """Return whether the process with this PID and start time runs on this machine. A zombie counts as ended."""
    try:
        state, actual_start_time = _read_stat(pid)
    except OSError:
        return _is_hidden(pid)
    return actual_start_time == start_time and state not in "ZX"


def _read_stat(pid: int) -> tuple[str, str]:
    """Return (state, start time in clock ticks since boot)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]


def _is_hidden(pid: int) -> bool:
    """Return whether another user has a process with this PID, which /proc hides under hidepid."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        return False
    return False
