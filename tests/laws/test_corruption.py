"""A flipped bit in one rank's copy, or in what it computes, is found and the rank named; without one all is silent."""

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.models.block import Block
from dist_llm.objectives.batch import Batch
from dist_llm.parallel.replica_check import compute_digest, find_mismatches
from dist_llm.sharded import to_local
from dist_llm.train.replay import replay
from dist_llm.train.step import train_step
from tests.laws.engines import ENGINES, opened
from tests.laws.law import batches_of, config_of
from tests.laws.layouts import ADAMW, MODELS, Layout
from tests.laws.worlds import world

CPU = torch.device("cpu")
REPLICATED = [
    Layout(2, {"dp_replicate": 2}, "gpt", 4),
    Layout(4, {"dp_replicate": 2, "dp_shard": 2}, micro=3),
    Layout(4, {"dp_replicate": 2, "tp": 2}, "tied", 4),
    Layout(4, {"pp": 2, "dp_replicate": 2}, "tied", 3),
    Layout(2, {"tp": 2}, "bounded", 8),
    Layout(2, {"tp": 2}, "bert", 8),
]


def held(config: Config, rank: int) -> list[str]:
    """After three steps; on `rank` (-1: none) the last bit of one element of a norm is flipped before."""
    with opened(config) as engine:
        for step in range(3):
            train_step(engine, batches_of(config, engine, step), 1e-3, step)
        if torch.distributed.get_rank() == rank:
            name = next(name for name, _ in engine.named_parameters() if "norm" in name)
            (weight,) = (each for other, each in engine.named_parameters() if other == name)
            to_local(weight.detach()).view(-1).view(torch.int32)[:1] ^= 1
        return find_mismatches(engine.replicated_params, "here")


def config(layout: Layout, **more: Any) -> Config:
    data = {"micro_batch": layout.micro}
    return config_of(layout.ranks, MODELS[layout.model], optim=ADAMW, data=data, parallel=layout.parallel, **more)


@pytest.mark.parametrize("layout", REPLICATED, ids=str)
def test_copies_are_equal_bit_for_bit_until_one_bit_is_flipped(layout: Layout) -> None:
    ranks = layout.ranks
    assert world(ranks).run(held, config(layout), -1) == [[]] * ranks
    every = world(ranks).run(held, config(layout), ranks - 1)
    assert every == [every[0]] * ranks, "all ranks know"
    *lines, hosts = every[0]
    for line in lines:
        assert re.fullmatch(rf"\S+norm\S*\.weight: differs on rank .*\b{ranks - 1} of ranks .*\b{ranks - 1}", line), (
            line
        )
    assert f"rank {ranks - 1} is on here" in hosts


@pytest.mark.usefixtures("worlds_of_its_own")
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "ddp"])
def test_engines_that_hold_the_whole_model(engine: str) -> None:
    theirs = config_of(3, {}, optim=ADAMW, data={"micro_batch": 4}, **ENGINES[engine])
    assert world(3).run(held, theirs, -1) == [[]] * 3
    (line, hosts), *_ = world(3).run(held, theirs, 1)
    assert line == "blocks.0.norm_attention.weight: differs on rank 1 of ranks 0, 1, 2"
    assert "rank 1 is on here" in hosts


def test_a_digest_knows_each_bit() -> None:
    values = torch.randn(5, 7)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        bits = values.to(dtype).view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        before = int(compute_digest(bits.view(dtype)))
        for bit in range(8 * dtype.itemsize):
            flipped = bits.clone()
            flipped[11] ^= torch.tensor(1, dtype=bits.dtype) << bit
            assert int(compute_digest(flipped.view(dtype))) != before


class Samples:
    """What `replay` asks of a loader."""

    def __init__(self, config: Config, places: int) -> None:
        self.config, self.places = config, places

    def load_batches_of_rank(self, place: int, first: int) -> list[Batch]:
        return batches_of(self.config, SimpleNamespace(dp_rank_and_size=(place, self.places)), first)  # type: ignore[arg-type]


def replayed(config: Config, rank: int, where: str) -> tuple[list[str], float]:
    """(what is found in a step that `rank` computes a little wrong, the loss of a step after it)."""
    forward = Block.forward

    def wrong(self: Block, *given: Any) -> Tensor:
        out = forward(self, *given)
        if where == "forward":
            return out * 1.001
        if out.requires_grad:  # not where torch before 2.13 learns shapes
            out.register_hook(lambda gradient: gradient * 1.001)
        return out

    engine = NativeEngine(config, CPU)
    errs = torch.distributed.get_rank() == rank
    with patch.object(Block, "forward", wrong) if errs else nullcontext():
        found = replay(engine, Samples(config, engine.dp_rank_and_size[1]), 0, 0, "fp32")  # type: ignore[arg-type]
    return found, train_step(engine, batches_of(config, engine, 0), 1e-3, 0).loss.item()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, {"dp_shard": 2}, "tied", 4),
        Layout(2, {"dp_replicate": 2}, "gpt", 4),
        Layout(3, {"dp_shard": 3}, micro=4),
        Layout(4, {"dp_shard": 2, "tp": 2}, micro=4),
        Layout(4, {"dp_shard": 2, "cp": 2}, micro=4),
        Layout(4, {"pp": 2, "dp_shard": 2}, "tied", 3),
    ],
    ids=str,
)
def test_a_step_is_the_same_on_other_ranks_unless_one_errs(layout: Layout) -> None:
    ranks = layout.ranks
    every = world(ranks).run(replayed, config(layout), -1, "")
    assert [found for found, _ in every] == [[]] * ranks
    straight = every[0][1]
    for where in ("forward", "backward"):
        every = world(ranks).run(replayed, config(layout), ranks - 1, where)
        said, *losses = every[0][0]
        assert said.startswith("a step computed twice has other gradients, of ")
        assert all(found == every[0][0] for found, _ in every), "all ranks know"
        assert all(loss == straight for _, loss in every), "nothing was stepped"
        by = [re.findall(r"by (?:rank )?([\d and]+)", line) for line in losses]
        assert bool(by) == (where == "forward")
        assert all(str(ranks - 1) in f"{pair}" for pair in by), "each pair has the rank that errs in it"
        if ranks == 3 and where == "forward":
            assert by == [["0", "2"], ["2", "1"]]
