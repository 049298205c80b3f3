"""A step that is left out leaves no trace: the next ones are those of a run that never took it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import GuardState
from dist_llm.config.schema import Config, GuardConfig, ParallelConfig
from dist_llm.engines.native import NativeEngine
from dist_llm.sharded import to_local
from dist_llm.train.guard import Guard
from dist_llm.train.step import train_step
from tests.laws.law import ROWS, RankTrace, Spy, batches_of, compare, config_of, merge_ranks
from tests.laws.layouts import ADAMW, MODELS, Layout
from tests.laws.worlds import world

LAYOUTS = [
    Layout(2, {"dp_shard": 2}, "tied", 4),
    Layout(2, {"dp_replicate": 2}, "gpt", 4),
    Layout(2, {"tp": 2}, "bert", 8),
    Layout(2, {"cp": 2}, micro=8),
    Layout(2, {"pp": 2}, "tied", 6),
    Layout(4, {"dp_shard": 2, "tp": 2}, micro=4),
]
BAD = 1


def steps(config: Config, numbers: Sequence[int], bug: bool = False) -> RankTrace:
    """These steps; in BAD gradients of the last rank are not numbers."""
    engine, found = Spy(config, torch.device("cpu")), RankTrace()
    guard = Guard(GuardConfig(not_finite="skip"), GuardState(), engine, Path("unused"))
    with moments_decay() if bug else nullcontext():
        for step in numbers:
            batches = batches_of(config, engine, step)
            with poisoned() if step == BAD else nullcontext():
                report = train_step(engine, batches, 1e-3, step, should_apply=partial(guard.should_apply, step))
            assert bool(guard.checked[step]) == (step == BAD), "on all ranks, though one replica alone may have seen it"
            if step != BAD:
                found.losses.append(report.loss.item())
                found.scored.append(int(report.scored))
                found.norms.append(report.grad_norm.item())
                found.keep(engine)
    return found


@contextmanager
def poisoned() -> Iterator[None]:
    real = NativeEngine.accumulate

    def accumulate(self: Any, *args: Any) -> Tensor:
        losses = real(self, *args)
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            for _, parameter in self.named_parameters():
                to_local(parameter.grad).fill_(torch.nan)
        return losses

    with patch.object(NativeEngine, "accumulate", accumulate):
        yield


@contextmanager
def moments_decay() -> Iterator[None]:
    """The bug: a step with gradients of zero in place of none."""
    real = NativeEngine.update

    def update(self: Any, lr: float, should_apply: Any = None) -> Tensor:
        norm: Tensor = self._grad_norm()
        if not should_apply(norm):
            for parameter in self.model_parts[0].parameters():
                to_local(parameter.grad).zero_()
        real(self, lr)
        return norm

    with patch.object(NativeEngine, "update", update):
        yield


def hold(layout: Layout, bug: bool = False) -> None:
    config = config_of(
        layout.ranks,
        MODELS[layout.model],
        optim=ADAMW,
        data={"micro_batch": layout.micro},
        parallel=layout.parallel,
    )
    data = config.data.model_copy(update={"micro_batch": ROWS})
    alone = config.model_copy(update={"data": data, "parallel": ParallelConfig(dp_shard=1)})
    got = merge_ranks(world(layout.ranks).run(steps, config, (0, BAD, 2, 3), bug))
    compare(got, merge_ranks([steps(alone, (0, 2, 3))]))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_left_out_leaves_no_trace(layout: Layout) -> None:
    hold(layout)


def test_the_law_bites() -> None:
    with pytest.raises(AssertionError, match="off by"):
        hold(LAYOUTS[0], bug=True)
