"""Planted bugs of a mixture of experts and of expert parallelism. They are registered in BUGS of bugs.py.

Public trainers have had most of them. Each patches the ranks of a layout; the comparison is with one process, which is
not patched.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_llm import sharded
from dist_llm.engines import gradient_norm, native, optimizer_step, router_balance
from dist_llm.engines.native import NativeEngine
from dist_llm.engines.router_balance import RouterBalancer
from dist_llm.models import moe
from dist_llm.models.moe import MoE, Router
from dist_llm.models.router_stats import RouterLog, RouterStats
from dist_llm.models.token_dispatcher import LocalTokenDispatcher
from dist_llm.parallel import expert_parallel, parallelize
from dist_llm.parallel.expert_parallel import AllToAllTokenDispatcher
from dist_llm.param_spec import ParamSpec
from tests.laws.bugs import register_bug

accumulate = NativeEngine.accumulate
compute_stats = MoE._compute_stats
compute_weights = MoE._compute_weights
apply_experts = MoE._apply_experts
start_step = RouterBalancer.start_step
pop_latest = RouterLog.pop_latest


def is_on_expert_mesh(tensor: Tensor) -> bool:
    """Return whether a parameter is one of experts that are spread over ranks."""
    return isinstance(tensor, DTensor) and "ep" in (tensor.device_mesh.mesh_dim_names or ())


def scale_expert_gradients(factor: Callable[[NativeEngine], float]) -> Any:
    """Patch the engine to multiply the gradients of experts by a factor."""

    def accumulate_scaled(self: NativeEngine, *args: Any) -> Tensor:
        losses = accumulate(self, *args)
        for _, parameter in self.named_parameters():
            if is_on_expert_mesh(parameter) and parameter.grad is not None:
                sharded.to_local(parameter.grad).mul_(factor(self))
        return losses

    return patch.object(NativeEngine, "accumulate", accumulate_scaled)


def scale_balance_losses(factor: float) -> Any:
    """Patch the engine to multiply the weight of the balance losses by a factor."""
    return patch.object(RouterBalancer, "start_step", lambda self, scale: start_step(self, scale * factor))


def change_stats(change: Callable[[MoE, RouterStats], RouterStats]) -> Any:
    """Patch the router to change its losses."""
    return patch.object(
        MoE, "_compute_stats", lambda self, *args, **kwargs: change(self, compute_stats(self, *args, **kwargs))
    )


@register_bug
def expert_gradients_are_multiplied_by_ep() -> Iterator[Any]:
    with scale_expert_gradients(lambda engine: engine.config.parallel.ep):
        yield


@register_bug
def expert_gradients_are_averaged_over_expert_shards() -> Iterator[Any]:
    parallel = "dp_shard", "cp", "tp"

    def factor(engine: NativeEngine) -> float:
        sizes = [getattr(engine.config.parallel, axis) for axis in parallel]
        return engine.config.parallel.ep / (sizes[0] * sizes[1] * sizes[2])

    with scale_expert_gradients(factor):
        yield


@register_bug
def expert_gradients_are_averaged_over_data_ranks() -> Iterator[Any]:
    with scale_expert_gradients(lambda engine: 1 / engine.dp_rank_and_size.size):
        yield


@register_bug
def no_gradient_flows_through_the_weights_of_experts() -> Iterator[Any]:
    with patch.object(MoE, "_compute_weights", lambda *args: compute_weights(*args).detach()):
        yield


@register_bug
def balance_losses_are_divided_by_the_number_of_microbatches() -> Iterator[Any]:
    with scale_balance_losses(1 / 3):
        yield


@register_bug
def balance_losses_are_means_over_the_sequences_of_a_rank() -> Iterator[Any]:
    with scale_balance_losses(2):
        yield


@register_bug
def balance_losses_are_divided_by_the_number_of_valid_tokens() -> Iterator[Any]:
    def accumulate_with_valid_tokens(self: NativeEngine, batches: Sequence[Any], denominator: Tensor, step: int) -> Any:
        share = float(denominator) / (self.config.data.global_batch * self.config.data.seq_len)
        with scale_balance_losses(1 / share):
            return accumulate(self, batches, denominator, step)

    with patch.object(NativeEngine, "accumulate", accumulate_with_valid_tokens):
        yield


@register_bug
def the_load_is_averaged_over_a_microbatch() -> Iterator[Any]:
    """The load of an expert is its share in a microbatch, where the balance loss needs its share in each sequence."""

    def compute_stats_of_microbatch(
        self: MoE, logits_NE: Tensor, scores_NE: Tensor, is_chosen_NE: Tensor, num_sequences: int
    ) -> RouterStats:
        stats = compute_stats(self, logits_NE, scores_NE, is_chosen_NE, num_sequences=1)
        return replace(stats, balance=stats.balance * num_sequences, z=stats.z * num_sequences)

    with patch.object(MoE, "_compute_stats", compute_stats_of_microbatch):
        yield


@register_bug
def the_counts_of_a_sequence_are_not_summed_over_its_ranks() -> Iterator[Any]:
    with patch.object(AllToAllTokenDispatcher, "all_reduce_counts", lambda self, counts_BE: counts_BE):
        yield


@register_bug
def the_router_z_loss_is_a_mean_over_the_tokens_of_a_rank() -> Iterator[Any]:
    with change_stats(lambda layer, stats: replace(stats, z=stats.z * layer.dispatcher.num_sequence_shards)):
        yield


@register_bug
def the_selection_bias_follows_the_counts_of_one_rank() -> Iterator[Any]:
    with patch.object(router_balance, "all_reduce_over_axes_", lambda value, *args: value):
        yield


@register_bug
def the_selection_bias_counts_the_forward_that_infers_shapes() -> Iterator[Any]:
    """In the first step of a pipeline, an additional forward pass infers the shapes of activations."""
    with patch.object(RouterLog, "pop_latest", lambda self, num_microbatches: pop_latest(self, 1 << 16)):
        yield


@register_bug
def the_selection_bias_follows_the_last_microbatch() -> Iterator[Any]:
    with patch.object(RouterLog, "pop_latest", lambda self, num_microbatches: pop_latest(self, 1)):
        yield


@register_bug
def recomputation_counts_tokens_twice() -> Iterator[Any]:
    """The router counts tokens by a side effect instead of an output."""
    stats_of_layer: dict[int, list[Tensor]] = {}
    finish_step = RouterBalancer.finish_step

    def compute_stats_with_side_effect(self: MoE, *args: Any, **kwargs: Any) -> RouterStats:
        stats = compute_stats(self, *args, **kwargs)
        stats_of_layer.setdefault(id(self), []).append(stats.pack())
        return stats

    def finish_step_with_side_effects(self: RouterBalancer, num_microbatches: int, is_applied: bool) -> Any:
        for model_part in self.model_parts:
            model_part.router_log.pop_latest(num_microbatches)
            for name, block in model_part.blocks.items():
                for packed in stats_of_layer.pop(id(block.feedforward), []):
                    model_part.router_log.add(int(name), packed)
        return finish_step(self, 1 << 16, is_applied)

    with (
        patch.object(MoE, "_compute_stats", compute_stats_with_side_effect),
        patch.object(RouterBalancer, "finish_step", finish_step_with_side_effects),
    ):
        yield


@register_bug
def the_selection_bias_is_part_of_the_weights() -> Iterator[Any]:
    def compute_biased_weights(self: MoE, scores_NE: Tensor, experts_NK: Tensor) -> Tensor:
        assert self.selection_bias is not None
        return compute_weights(self, scores_NE + self.selection_bias, experts_NK)

    with patch.object(MoE, "_compute_weights", compute_biased_weights):
        yield


@register_bug
def shared_experts_are_left_out() -> Iterator[Any]:
    forward = MoE.forward

    def forward_without_shared_experts(self: MoE, *args: Any) -> tuple[Tensor, Tensor | None]:
        shared, self.shared = self.shared, None
        try:
            return forward(self, *args)
        finally:
            self.shared = shared

    with patch.object(MoE, "forward", forward_without_shared_experts):
        yield


@register_bug
def outputs_of_experts_are_weighted_twice() -> Iterator[Any]:
    def apply_experts_twice(self: MoE, x: Tensor, experts_NK: Tensor, weights_NK: Tensor, counts_E: Tensor) -> Tensor:
        return apply_experts(self, x, experts_NK, weights_NK.square(), counts_E)

    with patch.object(MoE, "_apply_experts", apply_experts_twice):
        yield


@register_bug
def router_gradients_are_not_reduced_over_tensor_ranks() -> Iterator[Any]:
    param_specs = Router.param_specs

    def replicated_specs(self: Router) -> dict[str, ParamSpec]:
        return {name: replace(spec, is_partial_under_tp=False) for name, spec in param_specs(self).items()}

    with patch.object(Router, "param_specs", replicated_specs):
        yield


@register_bug
def received_rows_are_not_sorted_by_expert() -> Iterator[Any]:
    with patch.object(expert_parallel, "permute_rows", lambda x_RD, *args: x_RD):
        yield


@register_bug
def outputs_return_to_other_tokens() -> Iterator[Any]:
    with patch.object(moe, "permute_rows", lambda x_RD, *args: x_RD):
        yield


@register_bug
def the_gradient_norm_lacks_the_experts_of_other_tensor_ranks() -> Iterator[Any]:
    original = sharded.is_replicated_over

    def is_replicated_over(parameter: Tensor, axis: str) -> bool:
        return is_on_expert_mesh(parameter) or original(parameter, axis)

    with patch.object(gradient_norm, "is_replicated_over", is_replicated_over):
        yield


@register_bug
def expert_gradients_are_not_clipped() -> Iterator[Any]:
    original = optimizer_step.clip_and_unscale_

    def clip_other_gradients(parameters: Iterator[nn.Parameter], *args: Any) -> None:
        original([parameter for parameter in parameters if not is_on_expert_mesh(parameter)], *args)

    with patch.object(native, "clip_and_unscale_", clip_other_gradients):
        yield


@register_bug
def all_ranks_initialize_the_same_experts() -> Iterator[Any]:
    original = sharded.local_with_offset

    def local_with_offset(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        return (sharded.to_local(tensor), (0, 0, 0)) if tensor.ndim == 3 else original(tensor)

    with patch.object(parallelize, "local_with_offset", local_with_offset):
        yield


@register_bug
def every_tensor_rank_routes_all_tokens() -> Iterator[Any]:
    with (
        patch.object(AllToAllTokenDispatcher, "shard_tokens", lambda self, x_BSD: x_BSD.flatten(0, 1)),
        patch.object(AllToAllTokenDispatcher, "gather_tokens", lambda self, y_ND, x_BSD: y_ND.view_as(x_BSD)),
        patch.object(AllToAllTokenDispatcher, "sequence_ids", LocalTokenDispatcher.sequence_ids),
    ):
        yield


@register_bug
def tokens_choose_among_the_experts_of_their_rank() -> Iterator[Any]:
    choose_experts = MoE.choose_experts

    def choose_local_experts(self: MoE, scores_NE: Tensor) -> Tensor:
        assert isinstance(self.dispatcher, AllToAllTokenDispatcher)
        is_local_PE = torch.zeros(self.dispatcher.ep_size, scores_NE.shape[1] // self.dispatcher.ep_size)
        is_local_PE[self.dispatcher.ep_group.rank()] = 1
        return choose_experts(self, scores_NE + is_local_PE.flatten())

    with patch.object(MoE, "choose_experts", choose_local_experts):
        yield


@register_bug
def groups_of_experts_do_not_limit_the_choice() -> Iterator[Any]:
    def choose_from_all_groups(self: MoE, scores_NE: Tensor) -> Tensor:
        assert self.selection_bias is not None
        return (scores_NE + self.selection_bias).topk(self.moe.top_k, dim=-1).indices

    with patch.object(MoE, "choose_experts", choose_from_all_groups):
        yield
