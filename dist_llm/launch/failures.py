"""Last words: where a rank failed, and which was the first to."""

import torch.distributed as dist

from dist_llm.launch.world import World

FIRST_FAILURE = "dist_llm/first_failure"


def add_last_words(error: BaseException, world: World, doing: str) -> None:
    """Let the last line of the traceback say which rank failed, in what, and whether another failed before.

    One rank that fails makes the others fail in their collectives: they know the first from the process group's store.
    """
    mine = f"rank {world.rank} on {world.host}, in {doing}: {type(error).__name__}: {error}".splitlines()[0]
    first = _first(mine)
    error.add_note(f"{mine}\nthe first to fail: {first}" if first != mine else mine)


def _first(mine: str) -> str:
    if world_of_one():
        return mine
    try:
        store = dist.distributed_c10d._get_default_store()
        return store.compare_set(FIRST_FAILURE, "", mine).decode()
    except Exception:  # the store's host is gone
        return mine


def world_of_one() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1
