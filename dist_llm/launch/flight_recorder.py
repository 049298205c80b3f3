"""Which collective this process is in, read from torch's flight recorder."""

import os
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.compat import read_flight_recorder

CHECKPOINT_GROUP = "checkpoint"  # the process group of the thread that writes checkpoints; it is ignored here


def start_recording(device: torch.device) -> None:
    """Make torch record its newest collectives. Call it before the process group is created.

    Reading an entry takes about 15 us. A GPU's host runs up to a step ahead of the device, so more entries are needed.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1024" if device.type == "cuda" else "64")
    os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")  # without it no NCCL collective is marked as started


def pending_collective() -> str:
    """Return the newest collective that is not complete, as `name sizes of group`; empty if there is none."""
    entries = _pending_entries()
    if not entries:
        return ""
    newest = max(entries, key=lambda entry: entry["time_created_ns"])
    return f"{newest['profiling_name']} {newest['input_sizes']} of {newest['process_group'][1]}"


def in_collective() -> bool:
    """Return whether this process, or its device, is in a collective. One that NCCL has only queued does not count."""
    return any(
        not entry["profiling_name"].startswith("nccl") or entry["state"] == "started" for entry in _pending_entries()
    )


def _pending_entries() -> list[dict[str, Any]]:
    """Return the recorded collectives that are not complete."""
    if not dist.is_initialized():
        return []
    return [
        entry
        for entry in read_flight_recorder()
        # NCCL retires an entry some time after it has completed; gloo has no completed state.
        if not entry.get("retired", True)
        and entry["state"] != "completed"
        and CHECKPOINT_GROUP not in entry["process_group"]
    ]
