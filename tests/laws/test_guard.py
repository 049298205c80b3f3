"""A step that the guard skips has no effect: the run continues as a run without the step."""

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
from dist_llm.config.parallel_section import ParallelConfig
from dist_llm.config.schema import Config, GuardConfig
from dist_llm.engines.native import NativeEngine
from dist_llm.sharded import to_local
from dist_llm.training.guard import Guard
from dist_llm.training.step import train_step
from tests.laws.law import (
    GLOBAL_BATCH,
    RankTrace,
    RecordingEngine,
    assert_traces_match,
    choose_comparison_dtype,
    make_batches,
    make_layout_config,
    merge_ranks,
    use_default_dtype,
)
from tests.laws.layouts import ADAMW, Layout, index_by_name
from tests.laws.worlds import get_world

# Each rank takes several microbatches, so that a NaN in one step must not remain in the accumulated gradients.
LAYOUTS = index_by_name(
    Layout(ranks=2, parallel={"dp_shard": 2}, model="tied", micro_batch=4),
    Layout(ranks=2, parallel={"dp_replicate": 2}, model="gpt", micro_batch=4),
    Layout(ranks=2, parallel={"tp": 2}, model="bert", micro_batch=8),
    Layout(ranks=2, parallel={"cp": 2}, micro_batch=8),
    Layout(ranks=2, parallel={"pp": 2}, model="tied", micro_batch=6),
    Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2}, micro_batch=4),
)
BAD_STEP = 1  # counted from 0, unlike the steps in messages


def run_steps(config: Config, steps: Sequence[int], with_planted_bug: bool = False) -> RankTrace:
    """Run the steps with these numbers; in BAD_STEP the gradients of the last rank are NaN."""
    with use_default_dtype(choose_comparison_dtype(config)):
        return _run_steps(config, steps, with_planted_bug)


def _run_steps(config: Config, steps: Sequence[int], with_planted_bug: bool) -> RankTrace:
    """Take the steps with a guard; the gradients of BAD_STEP are NaN. The trace leaves out BAD_STEP."""
    engine, rank_trace = RecordingEngine(config, torch.device("cpu")), RankTrace()
    guard = Guard(GuardConfig(not_finite="skip"), GuardState(), engine, Path("unused"))
    with zero_gradient_update() if with_planted_bug else nullcontext():
        for step in steps:
            batches = make_batches(config, engine, step)
            with nan_gradients() if step == BAD_STEP else nullcontext():
                report = train_step(engine, batches, lr=1e-3, step=step, should_apply=partial(guard.should_apply, step))
            assert bool(guard.anomaly_by_step[step]) == (step == BAD_STEP), "each rank must skip exactly the bad step"
            if step != BAD_STEP:
                rank_trace.losses.append(report.loss.item())
                rank_trace.loss_denominators.append(report.loss_denominator.item())
                rank_trace.grad_norms.append(report.grad_norm.item())
                rank_trace.record(engine)
    return rank_trace


@contextmanager
def nan_gradients() -> Iterator[None]:
    """Set the gradients of the last rank to NaN."""
    original = NativeEngine.accumulate

    def accumulate(self: Any, *args: Any) -> Tensor:
        losses = original(self, *args)
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            for _, parameter in self.named_parameters():
                to_local(parameter.grad).fill_(torch.nan)
        return losses

    with patch.object(NativeEngine, "accumulate", accumulate):
        yield


@contextmanager
def zero_gradient_update() -> Iterator[None]:
    """Planted bug: the skipped step updates the moments with zero gradients."""
    original = NativeEngine.update

    def update(self: Any, lr: float, should_apply: Any = None) -> Tensor:
        norm: Tensor = self._compute_grad_norm()
        if not should_apply(norm):
            for parameter in self.model_parts[0].parameters():
                to_local(parameter.grad).zero_()
        original(self, lr)
        return norm

    with patch.object(NativeEngine, "update", update):
        yield


def assert_skipped_without_effect(layout: Layout, with_planted_bug: bool = False) -> None:
    """Compare a layout that skips BAD_STEP with one process that never runs it."""
    config = make_layout_config(layout, optim=ADAMW)
    data = config.data.model_copy(update={"micro_batch": GLOBAL_BATCH})
    one_process = config.model_copy(update={"data": data, "parallel": ParallelConfig(dp_shard=1)})
    skipped = merge_ranks(
        get_world(layout.ranks).run(run_steps, config, steps=(0, BAD_STEP, 2, 3), with_planted_bug=with_planted_bug)
    )
    assert_traces_match(skipped, merge_ranks([run_steps(one_process, steps=(0, 2, 3))]))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_skipped_step_has_no_effect(layout: Layout) -> None:
    assert_skipped_without_effect(layout)


def test_a_planted_bug_is_detected() -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_skipped_without_effect(LAYOUTS["dp_shard2_micro4_tied"], with_planted_bug=True)
