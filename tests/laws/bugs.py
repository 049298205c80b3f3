"""Planted bugs: each is one that some trainer has had, and each must make the law fail.

A bug is a context manager that breaks our code in this process while it is open.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from dist_llm import sharded
from dist_llm.engines.native import NativeEngine
from dist_llm.models import attention, decoder
from dist_llm.models.attention_mask import AttentionMask
from dist_llm.objectives.batch import Batch
from dist_llm.optim import gradient_clipping
from dist_llm.optim.muon import orthogonalize
from dist_llm.optim.sgd import LocalSGD
from dist_llm.parallel import context_parallel, fsdp, mesh, parallelize, pipeline_parallel, tensor_parallel
from dist_llm.parallel.distributed_muon import DistributedOrthogonalize
from dist_llm.train import step

BUGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {}


def plant_bug(name: str) -> AbstractContextManager[Any]:
    return BUGS[name]()


def bug(function: Callable[[], Iterator[Any]]) -> Callable[[], Iterator[Any]]:
    BUGS[function.__name__] = contextmanager(function)
    return function


def _shard_at_zero(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    return sharded.to_local(tensor), (0,) * tensor.ndim


def _skip(*args: Any, **kwargs: Any) -> None:
    return None


@bug
def replicas_gradients_are_not_reduced() -> Iterator[Any]:
    class Silent:
        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name) if name != "all_reduce" else lambda *args, **kwargs: None

    with patch.object(_fsdp_collectives, "dist", Silent()):
        yield


@bug
def shards_gradients_are_not_reduced() -> Iterator[Any]:
    def keep_own_part(output: torch.Tensor, input: torch.Tensor, op: Any, group: Any, **kwargs: Any) -> None:
        output.copy_(input.view(dist.get_world_size(group), -1)[dist.get_rank(group)])

    names = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if name in vars(dist)]

    class Silent:
        def __getattr__(self, name: str) -> Any:
            if name not in names:
                return getattr(dist, name)
            return lambda output, input, op=None, group=None, **kwargs: keep_own_part(output, input, op, group)

    with patch.object(_fsdp_collectives, "dist", Silent()):
        yield


@bug
def context_gradients_are_not_reduced() -> Iterator[Any]:
    """Weights are sharded over dp_shard only, so context ranks keep the gradients of their own tokens."""
    real = fsdp.fully_shard

    def over_data_alone(module: Any, mesh: Any, **keywords: Any) -> None:
        real(module, mesh=mesh._get_root_mesh()["dp_replicate", "dp_shard"], **keywords)

    with patch.object(fsdp, "fully_shard", over_data_alone):
        yield


@bug
def gathered_input_gradients_are_not_reduce_scattered() -> Iterator[Any]:
    """Each tensor rank continues with the partial gradient of its own heads, hidden units or vocabulary rows."""
    with patch.object(tensor_parallel.TensorParallelRegion, "all_gather_sequence", _join_own_part):
        yield


@bug
def head_gradients_are_not_reduced_over_tensor_ranks() -> Iterator[Any]:
    """The gradient of the head's input: each rank's vocabulary rows give a partial sum."""
    real = tensor_parallel.VocabParallelHead.forward

    def forward(self: Any, *inputs: Any) -> Any:
        with patch.object(tensor_parallel.TensorParallelRegion, "all_gather_sequence", _join_own_part):
            return real(self, *inputs)

    with patch.object(tensor_parallel.VocabParallelHead, "forward", forward):
        yield


def _join_own_part(region: tensor_parallel.TensorParallelRegion, x_BTD: torch.Tensor) -> torch.Tensor:
    return mesh.differentiable_collective(x_BTD, region.all_gather_no_grad, region.local_tokens)


@bug
def token_shares_use_the_depth_scale_of_full_rows() -> Iterator[Any]:
    """Stochastic depth: a row of a rank's share is not part of one sequence."""
    with patch.object(tensor_parallel.TensorParallelRegion, "shard_depth_scale", lambda self, block, inputs: inputs):
        yield


@bug
def tensor_ranks_take_the_positions_of_the_first() -> Iterator[Any]:
    """With learned positions. A rank's share of the tokens may begin within a sequence."""

    def first(self: Any, numbers_BS: torch.Tensor) -> torch.Tensor:
        return numbers_BS.flatten(0, 1).chunk(self.ranks)[0].unflatten(0, (len(numbers_BS), -1))

    with patch.object(tensor_parallel.TensorParallelRegion, "local_tokens", first):
        yield


@bug
def tied_embedding_is_not_reduced_over_stages() -> Iterator[Any]:
    with patch.object(pipeline_parallel.TiedEmbeddingGroup, "reduce_grads", _skip):
        yield


@bug
def norm_gradients_of_sequence_slices_are_not_reduced() -> Iterator[Any]:
    with patch("dist_llm.engines.native.all_reduce_replicated_grads", _skip):
        yield


@bug
def gradients_are_averaged_over_ranks() -> Iterator[Any]:
    with patch.object(FSDPModule, "set_gradient_divide_factor", _skip):
        yield


@bug
def mean_of_rank_means() -> Iterator[Any]:
    def own_count(self: NativeEngine, value: Any) -> torch.Tensor:
        return torch.as_tensor(value) * self.dp_rank_and_size[1] if isinstance(value, int) else real(self, value)

    real = NativeEngine.all_reduce_over_data
    with patch.object(NativeEngine, "all_reduce_over_data", own_count):
        yield


@bug
def mean_of_microbatch_means() -> Iterator[Any]:
    def each_by_its_own(self: NativeEngine, batches: Any, scored: torch.Tensor, step: int) -> torch.Tensor:
        losses = [
            real(self, [batch], self.all_reduce_over_data(batch.num_valid_tokens) * len(batches), step)
            for batch in batches
        ]
        return torch.stack(losses).sum()

    real = NativeEngine._accumulate
    with patch.object(NativeEngine, "_accumulate", each_by_its_own):
        yield


@bug
def loss_divided_twice() -> Iterator[Any]:
    real = NativeEngine.accumulate
    with patch.object(NativeEngine, "accumulate", lambda self, b, scored, s: real(self, b, scored * scored, s)):
        yield


@bug
def loss_averaged_over_padding() -> Iterator[Any]:
    def count_all(engine: Any, batches: Any, *rest: Any) -> Any:
        return real(engine, [replace(batch, num_valid_tokens=batch.targets_BS.numel()) for batch in batches], *rest)

    real = step.train_step
    with patch("tests.laws.law.train_step", count_all):
        yield


@bug
def last_microbatch_only() -> Iterator[Any]:
    real = NativeEngine.accumulate
    with patch.object(NativeEngine, "accumulate", lambda self, b, scored, s: real(self, b[-1:], scored, s)):
        yield


@bug
def all_ranks_read_the_same_samples() -> Iterator[Any]:
    real = NativeEngine.dp_rank_and_size
    with patch.object(NativeEngine, "dp_rank_and_size", property(lambda self: (0, real.fget(self)[1]))):  # type: ignore[attr-defined]
        yield


@bug
def clipping_by_the_local_norm() -> Iterator[Any]:
    real = mesh.all_reduce_over

    def norm_stays_local(value: torch.Tensor, mesh: Any, axes: Any) -> torch.Tensor:
        return value if "tp" in axes else real(value, mesh, axes)  # only the norm is summed over tp

    with patch("dist_llm.engines.gradient_norm.all_reduce_over", norm_stays_local):
        yield


@bug
def replicated_parameters_counted_once_per_tensor_rank() -> Iterator[Any]:
    with patch("dist_llm.engines.gradient_norm.is_sharded_over", lambda parameter, axis: True):
        yield


@bug
def tied_embedding_counted_by_both_stages() -> Iterator[Any]:
    def norm_of_all(self: NativeEngine) -> torch.Tensor:
        ends = [part.is_first_stage for part in self.model_parts]
        for part in self.model_parts:
            part.is_first_stage = True
        norm = real(self)
        for part, first in zip(self.model_parts, ends, strict=True):
            part.is_first_stage = first
        return norm

    real = NativeEngine._grad_norm
    with patch.object(NativeEngine, "_grad_norm", norm_of_all):
        yield


@bug
def clipping_never_happens() -> Iterator[Any]:
    with patch.object(gradient_clipping, "clip_grads_", _skip):
        yield


@bug
def context_ranks_count_positions_from_zero() -> Iterator[Any]:
    def from_zero(batch: Any, rank: int, ranks: int) -> Any:
        cut = real_part(batch, rank, ranks)
        return replace(cut, positions_BS=torch.arange(cut.inputs_BS.shape[1]).expand_as(cut.inputs_BS))

    real_part = context_parallel.shard_sequences
    with patch("dist_llm.engines.native.shard_sequences", from_zero):
        yield


@bug
def causal_mask_aligned_to_the_start() -> Iterator[Any]:
    """SDPA's is_causal with fewer queries than keys is aligned top-left."""

    def top_left(q: Any, k: Any, v: Any, mask: Any, dropout: float, scale: Any) -> torch.Tensor:
        heads = {"enable_gqa": q.shape[2] != k.shape[2]}
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, **heads
        )
        return out.transpose(1, 2)

    with (
        patch.object(context_parallel, "scaled_dot_product", top_left),
        patch.object(attention, "scaled_dot_product", top_left),
    ):
        yield


@bug
def tied_head_untied_by_the_tensor_split() -> Iterator[Any]:
    """The head projects with a copy of the embedding: its gradient never reaches the weight."""
    forward = tensor_parallel.VocabParallelHead.forward

    def with_a_copy(self: Any, x: Any, tied: Any, targets: Any) -> Any:
        return forward(self, x, None if tied is None else tied.detach(), targets)

    with patch.object(tensor_parallel.VocabParallelHead, "forward", with_a_copy):
        yield


@bug
def vocabulary_maximum_is_not_shared() -> Iterator[Any]:
    class Local:
        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

        def all_reduce(self, value: Any, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
            if op != dist.ReduceOp.MAX:
                dist.all_reduce(value, op, group)

    with patch.object(tensor_parallel, "dist", Local()):
        yield


@bug
def vocabulary_padding_is_scored() -> Iterator[Any]:
    real = tensor_parallel.VocabParallelHead._vocab_shard

    def all_rows(self: Any, weight_WD: Any) -> Any:
        return replace(real(self, weight_WD), width=len(weight_WD))

    with patch.object(tensor_parallel.VocabParallelHead, "_vocab_shard", all_rows):
        yield


@bug
def every_rank_initialised_with_the_same_shard() -> Iterator[Any]:
    with patch.object(parallelize, "local_with_offset", _shard_at_zero):
        yield


@bug
def pipeline_rescales_gradients() -> Iterator[Any]:
    def scaling(kind: Any) -> Any:
        return lambda *args, **kwargs: kind(*args, **{**kwargs, "scale_grads": True})

    with patch.dict(
        pipeline_parallel.SCHEDULES, {name: scaling(kind) for name, kind in pipeline_parallel.SCHEDULES.items()}
    ):
        yield


@bug
def context_ranks_treat_their_queries_as_the_last() -> Iterator[Any]:
    """Document and prefix masks then describe other tokens than this rank's."""
    with patch.object(
        AttentionMask, "with_query_positions", lambda self, _, num_keys: replace(self, num_keys=num_keys)
    ):
        yield


@bug
def every_microbatch_uses_the_mask_of_the_first() -> Iterator[Any]:
    """A pipeline gets all microbatches at once, with the mask of the first."""
    real = Batch.concatenate

    def with_the_first(batches: Any) -> Any:
        mask = batches[0].mask
        return replace(real([replace(batch, mask=mask) for batch in batches]))

    with patch.object(Batch, "concatenate", with_the_first):
        yield


@bug
def stochastic_depth_differs_between_tensor_ranks() -> Iterator[Any]:
    real = decoder.stochastic_depth_scale
    with patch.object(
        decoder, "stochastic_depth_scale", lambda sample_hash_B, *rest: real(sample_hash_B + dist.get_rank(), *rest)
    ):
        yield


@bug
def encoders_table_is_not_reduced_over_stages() -> Iterator[Any]:
    """The stage where the decoder begins embeds tokens with the same matrix as the first stage."""
    with patch.object(pipeline_parallel.TiedEmbeddingGroup, "reduce_grads", _skip):
        yield


@bug
def gradients_of_head_norms_are_not_reduced() -> Iterator[Any]:
    """Each tensor rank normalizes the queries and keys of its own heads with weights that all ranks hold."""
    with patch("dist_llm.engines.native.all_reduce_replicated_grads", _skip):
        yield


@bug
def weights_stay_gathered_after_the_last_backward() -> Iterator[Any]:
    """FSDP then leaves the gradients on the unsharded parameters, where the optimizer does not see them."""
    real = FSDPModule.set_reshard_after_backward
    with patch.object(FSDPModule, "set_reshard_after_backward", lambda self, *rest, **named: real(self, False)):
        yield


@bug
def shards_orthogonalized_separately() -> Iterator[Any]:
    def alone(self: DistributedOrthogonalize, updates: Any) -> Any:
        parts = [sharded.to_local(update) for update in updates]
        for part, made in zip(parts, orthogonalize(parts), strict=True):
            part.copy_(made)
        return updates

    with patch.object(DistributedOrthogonalize, "__call__", alone):
        yield


@bug
def shards_returned_to_the_wrong_rank() -> Iterator[Any]:
    """All shards have the same shape, so only the values are wrong."""
    real = DistributedOrthogonalize.__init__

    def swapped(self: DistributedOrthogonalize, *args: Any) -> None:
        real(self, *args)
        self.send_out = self.send_out[::-1]

    with patch.object(DistributedOrthogonalize, "__init__", swapped):
        yield


@bug
def momentum_begins_anew_with_each_step() -> Iterator[Any]:
    with _before_sgd_steps(lambda optimizer: optimizer.state.clear()):
        yield


@bug
def momentum_is_the_first_ranks_alone() -> Iterator[Any]:
    with _before_sgd_steps(lambda optimizer: optimizer.state.clear() if dist.get_rank() else None):
        yield


def _before_sgd_steps(action: Callable[[LocalSGD], None]) -> AbstractContextManager[Any]:
    real = LocalSGD.step

    def step(self: LocalSGD, closure: None = None) -> None:
        action(self)
        real(self, closure)

    return patch.object(LocalSGD, "step", step)


@bug
def moments_rounded_by_the_local_index() -> Iterator[Any]:
    with patch("dist_llm.engines.native.local_with_offset", _shard_at_zero):
        yield
