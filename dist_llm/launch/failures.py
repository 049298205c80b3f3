"""Say which rank failed and where, and which rank was the first to fail."""

import torch.distributed as dist

from dist_llm.compat import default_rendezvous_store
from dist_llm.launch.world import World

FIRST_FAILURE = "dist_llm/first_failure"  # key in the store of the process group


def annotate_failure(error: BaseException, world: World, activity: str) -> None:
    """Add a note to the traceback: this rank, its activity, and the rank that failed first.

    When one rank fails, the others fail in their collectives. The store of the process group records the first.
    """
    summary = f"rank {world.rank} on {world.host}, in {activity}: {type(error).__name__}: {error}".splitlines()[0]
    first = _record_failure(summary)
    error.add_note(f"{summary}\nthe first to fail: {first}" if first != summary else summary)


def _record_failure(summary: str) -> str:
    """Record this rank's failure unless one is recorded already. Return the recorded one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return summary
    try:
        store = default_rendezvous_store()
        return store.compare_set(FIRST_FAILURE, "", summary).decode()
    except Exception:  # the node that runs the store is gone
        return summary
