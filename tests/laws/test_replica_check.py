"""A flipped bit in a replica, or a wrong result of a rank, is detected, and the message names the rank."""

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dist_llm.config.schema import Config
from dist_llm.engines.base import DataParallelRank
from dist_llm.engines.native import NativeEngine
from dist_llm.models.block import Block
from dist_llm.objectives.batch import Batch
from dist_llm.parallel.replica_check import compute_digest, find_mismatches
from dist_llm.sharded import to_local
from dist_llm.training.replay import replay_step
from dist_llm.training.step import train_step
from tests.laws.engines import ENGINE_SECTIONS, open_engine
from tests.laws.law import make_batches, make_config, make_layout_config
from tests.laws.layouts import ADAMW, Layout
from tests.laws.worlds import get_world

CPU = torch.device("cpu")
NO_RANK = -1
ERROR_FACTOR = 1.001  # of the wrong values of a faulty rank
REPLICATED = [
    Layout(ranks=2, parallel={"dp_replicate": 2}, model="gpt", micro_batch=4),
    Layout(ranks=4, parallel={"dp_replicate": 2, "dp_shard": 2}, micro_batch=3),
    Layout(ranks=4, parallel={"dp_replicate": 2, "tp": 2}, model="tied", micro_batch=4),
    Layout(ranks=4, parallel={"pp": 2, "dp_replicate": 2}, model="tied", micro_batch=3),
    Layout(ranks=2, parallel={"tp": 2}, model="bounded", micro_batch=8),
    Layout(ranks=2, parallel={"tp": 2}, model="bert", micro_batch=8),
]


def find_mismatches_after_steps(config: Config, faulty_rank: int) -> list[str]:
    """Take three steps, flip a bit of a norm weight on `faulty_rank`, and return the mismatches."""
    with open_engine(config) as engine:
        for step in range(3):
            train_step(engine, make_batches(config, engine, step), lr=1e-3, step=step)
        if torch.distributed.get_rank() == faulty_rank:
            weight = next(parameter for name, parameter in engine.named_parameters() if "norm" in name)
            to_local(weight.detach()).view(-1).view(torch.int32)[:1] ^= 1
        return find_mismatches(engine.replica_groups, "here")


@pytest.mark.parametrize("layout", REPLICATED, ids=str)
def test_replicas_are_bitwise_equal_until_a_bit_is_flipped(layout: Layout) -> None:
    ranks, config = layout.ranks, make_layout_config(layout, optim=ADAMW)
    assert get_world(ranks).run(find_mismatches_after_steps, config, faulty_rank=NO_RANK) == [[]] * ranks
    by_rank = get_world(ranks).run(find_mismatches_after_steps, config, faulty_rank=ranks - 1)
    assert by_rank == [by_rank[0]] * ranks, "ranks report different results"
    *lines, hosts = by_rank[0]
    for line in lines:
        assert re.fullmatch(rf"\S+norm\S*\.weight: differs on rank .*\b{ranks - 1} of ranks .*\b{ranks - 1}", line), (
            line
        )
    assert f"rank {ranks - 1} is on here" in hosts


@pytest.mark.usefixtures("restart_worlds_afterwards")
@pytest.mark.parametrize("engine", ["zero0", "zero1", "zero2", "ddp"])
def test_replicas_of_third_party_engines_are_compared(engine: str) -> None:
    engine_config = make_config(ranks=3, optim=ADAMW, data={"micro_batch": 4}, **ENGINE_SECTIONS[engine])
    assert get_world(3).run(find_mismatches_after_steps, engine_config, faulty_rank=NO_RANK) == [[]] * 3
    (line, hosts), *_ = get_world(3).run(find_mismatches_after_steps, engine_config, faulty_rank=1)
    assert line == "blocks.0.norm_attention.weight: differs on rank 1 of ranks 0, 1, 2"
    assert "rank 1 is on here" in hosts


def test_a_digest_depends_on_each_bit() -> None:
    values = torch.randn(5, 7)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        bits = values.to(dtype).view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
        before = int(compute_digest(bits.view(dtype)))
        for bit in range(8 * dtype.itemsize):
            flipped = bits.clone()
            flipped[11] ^= torch.tensor(1, dtype=bits.dtype) << bit
            assert int(compute_digest(flipped.view(dtype))) != before


class StepLoader:
    """A fake data loader. It has the only method that `replay_step` calls."""

    def __init__(self, config: Config, dp_size: int) -> None:
        self.config, self.dp_size = config, dp_size

    def load_batches_of_rank(self, dp_rank: int, first_sample: int) -> list[Batch]:
        """Return the microbatches of a data-parallel rank; `first_sample` is taken as the number of the step."""
        engine = SimpleNamespace(dp_rank_and_size=DataParallelRank(dp_rank, self.dp_size))
        return make_batches(self.config, engine, first_sample)  # type: ignore[arg-type]


def replay_and_step(config: Config, faulty_rank: int, fault_in: str) -> tuple[list[str], float]:
    """Replay a step in which `faulty_rank` computes slightly wrong values in forward or backward, then take a step.

    Returns the mismatches of the replay and the loss of the step.
    """
    forward = Block.forward

    def corrupt_forward(self: Block, *args: Any) -> tuple[Tensor, Tensor | None]:
        out, router_stats = forward(self, *args)
        if fault_in == "forward":
            return out * ERROR_FACTOR, router_stats
        if out.requires_grad:  # torch before 2.13 infers the shapes of pipeline stages without gradients
            out.register_hook(lambda gradient: gradient * ERROR_FACTOR)
        return out, router_stats

    engine = NativeEngine(config, CPU)
    is_faulty = torch.distributed.get_rank() == faulty_rank
    with patch.object(Block, "forward", corrupt_forward) if is_faulty else nullcontext():
        loader = StepLoader(config, engine.dp_rank_and_size.size)
        mismatches = replay_step(engine, loader, first_sample=0, step=0, precision="fp32")  # type: ignore[arg-type]
    return mismatches, train_step(engine, make_batches(config, engine, step=0), lr=1e-3, step=0).loss.item()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(ranks=2, parallel={"dp_shard": 2}, model="tied", micro_batch=4),
        Layout(ranks=2, parallel={"dp_replicate": 2}, model="gpt", micro_batch=4),
        Layout(ranks=3, parallel={"dp_shard": 3}, micro_batch=4),
        Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2}, micro_batch=4),
        Layout(ranks=4, parallel={"dp_shard": 2, "cp": 2}, micro_batch=4),
        Layout(ranks=4, parallel={"pp": 2, "dp_shard": 2}, model="tied", micro_batch=3),
    ],
    ids=str,
)
def test_a_replayed_step_differs_only_if_a_rank_is_faulty(layout: Layout) -> None:
    ranks, config = layout.ranks, make_layout_config(layout, optim=ADAMW)
    by_rank = get_world(ranks).run(replay_and_step, config, faulty_rank=NO_RANK, fault_in="")
    assert [mismatches for mismatches, _ in by_rank] == [[]] * ranks
    loss_without_fault = by_rank[0][1]
    for fault_in in ("forward", "backward"):
        by_rank = get_world(ranks).run(replay_and_step, config, faulty_rank=ranks - 1, fault_in=fault_in)
        summary, *losses = by_rank[0][0]
        assert summary.startswith("a step computed twice has different gradients, of ")
        assert all(mismatches == by_rank[0][0] for mismatches, _ in by_rank), "ranks report different results"
        assert all(loss == loss_without_fault for _, loss in by_rank), "the replay must not change the loss"
        rank_pairs = [re.findall(r"by (?:rank )?([\d and]+)", line) for line in losses]
        assert bool(rank_pairs) == (fault_in == "forward")
        assert all(str(ranks - 1) in f"{pair}" for pair in rank_pairs), "a pair lacks the faulty rank"
        if ranks == 3 and fault_in == "forward":
            assert rank_pairs == [["0", "2"], ["2", "1"]]
