"""Find out in which collective this process waits, from the flight recorder of torch."""

import os
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.compat import read_flight_recorder

CHECKPOINT_GROUP = "checkpoint"  # process group of the thread that writes checkpoints, which is ignored here


def start_recording(device: torch.device) -> None:
    """Make torch record its latest collectives. Call this before the process group is created.

    The number of entries is small, because reading an entry takes about 15 us. With a GPU, the host runs up to a step
    ahead of the GPU, so more entries are needed.
    """
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "1024" if device.type == "cuda" else "64")
    os.environ.setdefault("TORCH_NCCL_ENABLE_TIMING", "1")  # without this, NCCL collectives are not marked as started


def find_pending_collective() -> str:
    """Return the latest collective that is not complete, as `name sizes of group`; an empty string if there is none."""
    entries = _pending_entries()
    if not entries:
        return ""
    latest = max(entries, key=lambda entry: entry["time_created_ns"])
    return f"{latest['profiling_name']} {latest['input_sizes']} of {latest['process_group'][1]}"


def is_in_collective() -> bool:
    """Return whether this process or its device is in a collective.

    A collective that NCCL only queued does not count.
    """
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
