"""A flat range becomes boxes that contain each element once, and other world sizes can read the shards."""

from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.flat_shard import FlatShard, flat_range_to_boxes, local_chunks
from dist_llm.checkpoint.load_checkpoint import fill_tensors, load_checkpoint
from dist_llm.checkpoint.store import CheckpointStore
from tests.laws.worlds import get_world

SHAPES = {"model.a": (7, 5), "model.b": (3, 2, 4), "model.c": (11,), "model.d": ()}


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_cover_the_range_exactly(shape: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, prod(shape)))
    stop = data.draw(st.integers(start, prod(shape)))
    flat = torch.arange(start, stop)
    full = torch.full(shape, -1)
    for offset, chunk in local_chunks(FlatShard.from_flat(tuple(shape), flat, start)):
        box = tuple(slice(first, first + size) for first, size in zip(offset, chunk.shape, strict=True))
        assert (full[box] == -1).all(), "an element occurs twice"
        full[box] = chunk
    expected = np.full(prod(shape), -1)
    expected[start:stop] = np.arange(start, stop)
    assert full.flatten().tolist() == expected.tolist()
    assert len(list(flat_range_to_boxes(tuple(shape), start, stop))) <= max(1, 2 * len(shape) - 1)


def test_chunks_are_views_of_the_partition() -> None:
    flat = torch.zeros(9)
    for _, chunk in local_chunks(FlatShard.from_flat((4, 4), flat, start=3)):
        chunk.fill_(1)
    assert flat.tolist() == [1.0] * 9


class FlatState:
    """The concatenated tensors, split into equal shards, one per rank."""

    def __init__(self, fill: bool) -> None:
        rank, ranks, values = dist.get_rank(), dist.get_world_size(), make_tensors()
        flat = torch.cat([value.flatten() for value in values.values()])
        size = -(-len(flat) // ranks)
        first = rank * size
        self.flat = flat[first : first + size].clone() if fill else torch.full((min(size, len(flat) - first),), -1.0)
        self.shards, start = {}, 0
        for name, value in values.items():
            start_in_row, end = max(start, first), max(min(start + value.numel(), first + size), start, first)
            local_part = self.flat[start_in_row - first : end - first]
            self.shards[name] = FlatShard.from_flat(tuple(value.shape), local_part, start_in_row - start)
            start += value.numel()

    def weights(self) -> dict[str, FlatShard]:
        return self.shards

    def moments(self) -> dict[str, Tensor]:
        return {}

    def after_load(self) -> None:
        pass


def make_tensors() -> dict[str, Tensor]:
    """Return full tensors of SHAPES whose elements all differ."""
    return {
        name: torch.arange(prod(shape)).view(shape) + 100.0 * number
        for number, (name, shape) in enumerate(SHAPES.items())
    }


def save_flat_state(directory: Path, background: bool) -> None:
    """Save a checkpoint of FlatState on this rank, in the background or not."""
    checkpoints = CheckpointStore(directory)
    checkpoints.config = checkpoints.config.model_copy(update={"background": background})
    checkpoints.save(FlatState(fill=True), Progress(1), {})
    checkpoints.finish()


def load_flat_state(directory: Path) -> bool:
    """Load the checkpoint on this rank; return whether each element of the shard has its saved value."""
    shards = FlatState(fill=False)
    load_checkpoint(directory, shards, with_moments=False)
    return torch.equal(shards.flat, FlatState(fill=True).flat)


@pytest.mark.parametrize("background", [True, False])
def test_other_world_sizes_read_flat_shards(background: bool, tmp_path: Path) -> None:
    get_world(3).run(save_flat_state, tmp_path, background)
    newest = CheckpointStore(tmp_path).list_committed()[-1]
    assert newest.local_path is not None
    assert all(get_world(2).run(load_flat_state, newest.local_path))
    full = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    fill_tensors(newest, dict(full))
    for name, value in make_tensors().items():
        assert torch.equal(full[name], value), name
