"""Faults planted in a layer with experts. `FAULTS` says in which layer of test_moe.py each must be detected."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dist_llm.models import moe as moe_module
from dist_llm.models.grouped_linear import GroupedLinear
from dist_llm.models.moe import MoE, Router
from dist_llm.models.router_stats import RouterStats


def patch_moe(name: str, replacement: Callable[..., Any]) -> Any:
    """Plant a fault: replace a method of MoE."""
    return patch.object(MoE, name, replacement)


def override_config(**changes: object) -> Any:
    """Plant a fault: the layer uses these values instead of those in its config."""
    forward = MoE.forward

    def forward_with_changes(self: MoE, *args: Tensor) -> tuple[Tensor, Tensor | None]:
        section, self.moe = self.moe, self.moe.model_copy(update=changes)
        try:
            return forward(self, *args)
        finally:
            self.moe = section

    return patch_moe("forward", forward_with_changes)


def change_stats(change: Callable[[RouterStats], RouterStats]) -> Any:
    """Plant a fault: change the statistics of the router."""
    compute_stats = MoE._compute_stats

    def compute_changed(self: MoE, *args: Any, **kwargs: Any) -> RouterStats:
        return change(compute_stats(self, *args, **kwargs))

    return patch_moe("_compute_stats", compute_changed)


@contextmanager
def count_load_over_all_sequences() -> Iterator[None]:
    compute_stats = MoE._compute_stats

    def compute_of_batch(self: MoE, *args: Any, num_sequences: int) -> RouterStats:
        stats = compute_stats(self, args[0], args[1], args[2], num_sequences=1)
        return replace(stats, balance=stats.balance * num_sequences, z=stats.z * num_sequences)

    with patch_moe("_compute_stats", compute_of_batch):
        yield


@contextmanager
def add_selection_bias_to_weights() -> Iterator[None]:
    compute_weights = MoE._compute_weights
    with patch_moe(
        "_compute_weights", lambda self, scores, experts: compute_weights(self, scores + self.selection_bias, experts)
    ):
        yield


@contextmanager
def ignore_router_bias() -> Iterator[None]:
    forward = Router.forward

    def forward_without_bias(self: Router, x_ND: Tensor) -> Tensor:
        assert self.bias is not None
        return forward(self, x_ND) - self.bias

    with patch.object(Router, "forward", forward_without_bias):
        yield


@contextmanager
def drop_gradients_of_later_choices() -> Iterator[None]:
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (position_R,) = ctx.saved_tensors
        return grad_RD[position_R].unflatten(0, (-1, ctx.top_k))[:, 0], None, None, None

    with patch.object(moe_module._CopyTokens, "backward", backward):
        yield


@contextmanager
def score_groups_by_best_expert() -> Iterator[None]:
    topk = Tensor.topk

    def topk_of_one(self: Tensor, k: int, dim: int = -1) -> Any:
        return topk(self, 1 if self.ndim == 3 else k, dim)

    with patch.object(Tensor, "topk", topk_of_one):
        yield


@contextmanager
def reverse_selection_bias() -> Iterator[None]:
    update = MoE.update_router_state_

    def update_reversed(self: MoE, counts_E: Tensor) -> None:
        update(self, counts_E)
        if self.selection_bias is not None:
            self.selection_bias.sub_(2 * self.moe.selection_bias_rate * torch.sign(counts_E.mean() - counts_E))

    with patch_moe("update_router_state_", update_reversed):
        yield


@contextmanager
def share_expert_biases() -> Iterator[None]:
    forward = GroupedLinear.forward

    def forward_with_mean(self: GroupedLinear, x_RI: Tensor, ends_E: Tensor) -> Tensor:
        bias, self.bias = self.bias, None
        y_RO = forward(self, x_RI, ends_E)
        self.bias = bias
        return y_RO if bias is None else y_RO + bias.mean(0)

    with patch.object(GroupedLinear, "forward", forward_with_mean):
        yield


def attach_no_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Plant a fault: the balance losses have no gradient."""
    return x


# {description of the fault: (layer of test_moe.py in which it must be detected, function that plants it)}
FAULTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "weights are not normalized": ("softmax, normalized", lambda: override_config(normalize_weights=False)),
    "weights are always normalized": ("softmax, not normalized", lambda: override_config(normalize_weights=True)),
    "weights are not scaled": ("sigmoid, normalized", lambda: override_config(weight_scale=1.0)),
    "scores are a softmax": ("sigmoid, not normalized", lambda: override_config(score="softmax")),
    "groups do not limit the choice": ("groups and shared experts", lambda: override_config(n_groups=1)),
    "a group counts as its best expert": ("groups and shared experts", score_groups_by_best_expert),
    "the load is that of the sequence": ("load of the previous step", lambda: override_config(balance_over="sequence")),
    "the load is that of all sequences": ("softmax, normalized", count_load_over_all_sequences),
    "weights contain the selection bias": ("softmax with selection bias", add_selection_bias_to_weights),
    "the router has no bias": ("all experts, all biases", ignore_router_bias),
    "only the first choice gets a gradient": ("softmax, normalized", drop_gradients_of_later_choices),
    "balance losses have no gradient": (
        "softmax, normalized",
        lambda: patch.object(moe_module, "attach_loss", attach_no_loss),
    ),
    "z is not divided by the tokens": (
        "softmax, normalized",
        lambda: change_stats(lambda stats: replace(stats, z=stats.z * 5)),  # 5 tokens in a sequence
    ),
    "the bias moves towards the load": ("sigmoid, normalized", reverse_selection_bias),
    "experts share their bias": ("groups and shared experts", share_expert_biases),
}
