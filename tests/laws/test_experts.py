"""Models with experts on several ranks compute the training steps of one process.

The tests cover each optimizer, each recompute mode and compiled blocks. `test_layouts.py` compares all layouts,
`test_covering.py` compares pairs of settings, and `test_planted_bugs.py` plants bugs.

Shape suffixes: J rows that the padded dispatch delivers to the experts of a rank, padding rows last; D d_model;
E experts of the rank.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dist_llm.config.schema import Config
from dist_llm.models.moe import Experts
from tests.laws.law import (
    RankTrace,
    assert_matches_one_process,
    assert_traces_match,
    make_layout_config,
    merge_ranks,
    record_trace,
    trace_one_process,
)
from tests.laws.layouts import ADAMW, CLIPPED_SGD, MUON, Layout
from tests.laws.worlds import get_world

MODELS_WITH_EXPERTS = ("moe", "deepseek")
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"ranks": 2, "parallel": {"dp_shard": 2, "ep": 2}, "micro_batch": 4},
    "tensor": {"ranks": 4, "parallel": {"dp_shard": 2, "tp": 2, "ep": 2}, "micro_batch": 3},
    "pipeline": {"ranks": 4, "parallel": {"pp": 2, "dp_shard": 2, "ep": 2}, "micro_batch": 3},
}


def build_layout(name: str, model: str) -> Layout:
    return Layout(**LAYOUTS[name], model=model)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [CLIPPED_SGD, ADAMW, MUON], ids=["sgd", "adamw", "muon"])
@pytest.mark.parametrize("model", MODELS_WITH_EXPERTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_of_each_optimizer(layout: str, model: str, optim: dict[str, Any]) -> None:
    """Each step moves the selection biases of `deepseek`, and Muon orthogonalizes the matrix of each expert."""
    assert_matches_one_process(build_layout(layout, model), optim=optim, steps=20)


# Without recomputation a rank saves at least 0.00053 GiB with the model `moe`, so that some blocks must recompute.
SMALL_BUDGET_GIB = 0.0005


@pytest.mark.slow
@pytest.mark.parametrize(
    "recompute",
    [{"recompute": "full"}, {"recompute": "selective"}, {"activations_gib": SMALL_BUDGET_GIB}],
    ids=["full", "selective", "budget"],
)
@pytest.mark.parametrize("model", MODELS_WITH_EXPERTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputation_does_not_change_the_step(layout: str, model: str, recompute: dict[str, Any]) -> None:
    assert_matches_one_process(build_layout(layout, model), optim=CLIPPED_SGD, steps=3, parallel=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("model", MODELS_WITH_EXPERTS)
@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_compilation_does_not_change_the_step(layout: str, model: str, recompute: str) -> None:
    """The layout `tensor` has three sequences per microbatch on two tensor ranks, so a sequence crosses ranks.

    There, compiled code of torch 2.13 for index_add_ lost counts of tokens.
    """
    assert_matches_one_process(
        build_layout(layout, model), optim=CLIPPED_SGD, steps=3, parallel={"recompute": recompute}, compile=True
    )


class _PoisonRows(torch.autograd.Function):
    """Set the rows from `first_row` on to NaN: with `in_forward` their values, else their gradients."""

    @staticmethod
    def forward(ctx: Any, x_JD: Tensor, first_row: int, in_forward: bool) -> Tensor:
        ctx.first_row = None if in_forward else first_row
        poisoned_JD = x_JD.clone()
        if in_forward:
            poisoned_JD[first_row:] = torch.nan
        return poisoned_JD

    @staticmethod
    def backward(ctx: Any, grad_JD: Tensor) -> tuple[Tensor, None, None]:
        grad_JD = grad_JD.clone()
        if ctx.first_row is not None:
            grad_JD[ctx.first_row :] = torch.nan
        return grad_JD, None, None


def record_with_poisoned_padding(config: Config) -> RankTrace:
    """Record two steps in which the outputs and the input gradients of the experts are NaN in the padding rows."""
    forward = Experts.forward

    def poison_padding(self: Experts, x_JD: Tensor, counts_E: Tensor) -> Tensor:
        num_rows = int(counts_E.sum())
        outputs_JD = forward(self, _PoisonRows.apply(x_JD, num_rows, False), counts_E)  # type: ignore[no-untyped-call]
        return _PoisonRows.apply(outputs_JD, num_rows, True)  # type: ignore[no-untyped-call, no-any-return]

    # On a CPU the padding rows are finite, so without NaN a read of these rows could remain unnoticed.
    with patch.object(Experts, "forward", poison_padding):
        return record_trace(config, steps=2)


def test_padding_of_the_dispatch_reaches_no_output_and_no_gradient() -> None:
    """The grouped matrix products of torch leave the padding rows of outputs and gradients uninitialized."""
    layout = Layout(ranks=2, parallel={"dp_shard": 2, "ep": 2, "ep_dispatch": "padded"}, model="moe", micro_batch=4)
    config = make_layout_config(layout, optim=CLIPPED_SGD)
    trace = merge_ranks(get_world(layout.ranks).run(record_with_poisoned_padding, config))
    assert_traces_match(trace, trace_one_process(config, steps=2))
