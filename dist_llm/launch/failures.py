"""Annotate the exception of a failed rank with the rank that failed first."""

import torch.distributed as dist

from dist_llm.compat import get_default_rendezvous_store
from dist_llm.launch.world import World

FIRST_FAILURE = "dist_llm/first_failure"  # key in the rendezvous store


def annotate_failure(error: BaseException, world: World, activity: str) -> None:
    """Add a note to the exception: this rank, its activity, and the rank that failed first.

    When one rank fails, the other ranks fail in their collectives. The rendezvous store records the first failure.
    """
    summary = f"rank {world.rank} on {world.host}, in {activity}: {type(error).__name__}: {error}".splitlines()[0]
    first_failure = _record_failure(summary)
    error.add_note(f"{summary}\nthe first to fail: {first_failure}" if first_failure != summary else summary)


def _record_failure(summary: str) -> str:
    """Record the failure of this rank, unless a failure is already recorded. Return the recorded failure."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return summary
    try:
        return get_default_rendezvous_store().compare_set(FIRST_FAILURE, "", summary).decode()
    except Exception:  # the node that hosts the store has failed
        return summary
