"""Planted bugs: faults of parallel training, each of which must make the comparison with one process fail.

    with plant_bug("gradients_are_not_clipped"):
        train_step(...)  # in this process, clipping does nothing inside the block

A bug is a context manager that patches dist_llm or torch in this process while it is open. The name of a bug says what
is wrong, and its docstring describes the effect. `record_trace` (law.py) plants a bug on each rank.
test_planted_bugs.py and test_optimizers.py check that each bug is detected.

A new bug is a function with the decorator `register_bug`. test_planted_bugs.py needs a layout on which it has an
effect.
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
from dist_llm.engines import native
from dist_llm.engines.native import NativeEngine
from dist_llm.models import attention, banded_attention, decoder
from dist_llm.models.attention_mask import AttentionMask
from dist_llm.models.positional_encoding import AlibiBias
from dist_llm.models.rope import compute_rotary_cos_sin
from dist_llm.objectives.batch import Batch
from dist_llm.optim import gradient_clipping
from dist_llm.optim.muon import Muon, orthogonalize
from dist_llm.optim.sgd import LocalSGD
from dist_llm.parallel import context_parallel, fsdp, mesh, parallelize, pipeline_parallel, tensor_parallel
from dist_llm.parallel.distributed_muon import DistributedOrthogonalizer
from dist_llm.training import step

BUGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {}


def plant_bug(name: str) -> AbstractContextManager[Any]:
    """Return a context manager that plants the bug with this name in this process."""
    return BUGS[name]()


def register_bug(function: Callable[[], Iterator[Any]]) -> Callable[[], Iterator[Any]]:
    """Add a bug to BUGS under the name of the function."""
    BUGS[function.__name__] = contextmanager(function)
    return function


def _local_with_zero_offset(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Return the shard of this rank, as if it were the first shard of the tensor."""
    return sharded.to_local(tensor), (0,) * tensor.ndim


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Replace a function whose effect the bug removes."""
    return None


@register_bug
def gradients_are_not_reduced_over_replicas() -> Iterator[Any]:
    """FSDP does not all-reduce gradients over dp_replicate."""

    class DistWithoutReduction:
        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name) if name != "all_reduce" else lambda *args, **kwargs: None

    with patch.object(_fsdp_collectives, "dist", DistWithoutReduction()):
        yield


@register_bug
def gradients_are_not_reduced_over_shards() -> Iterator[Any]:
    """FSDP keeps the local chunk of each gradient in place of a reduce-scatter."""

    def keep_local_chunk(output: torch.Tensor, input: torch.Tensor, op: Any, group: Any, **kwargs: Any) -> None:
        output.copy_(input.view(dist.get_world_size(group), -1)[dist.get_rank(group)])

    names = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if name in vars(dist)]

    class DistWithoutReduction:
        def __getattr__(self, name: str) -> Any:
            if name not in names:
                return getattr(dist, name)
            return lambda output, input, op=None, group=None, **kwargs: keep_local_chunk(output, input, op, group)

    with patch.object(_fsdp_collectives, "dist", DistWithoutReduction()):
        yield


@register_bug
def gradients_are_not_reduced_over_context_ranks() -> Iterator[Any]:
    """Weights are sharded over dp_shard only, so each context rank keeps the gradients of its own tokens."""
    original = fsdp.fully_shard  # type: ignore[attr-defined]

    def fully_shard_over_data(module: Any, mesh: Any, **kwargs: Any) -> None:
        original(module, mesh=mesh._get_root_mesh()["dp_replicate", "dp_shard"], **kwargs)

    with patch.object(fsdp, "fully_shard", fully_shard_over_data):
        yield


@register_bug
def gathered_input_gradients_are_not_reduce_scattered() -> Iterator[Any]:
    """Each tensor rank continues backward with the partial gradient of its own heads, hidden units or vocabulary."""
    with patch.object(tensor_parallel.TensorParallelRegion, "all_gather_sequence", _gather_local_gradients_only):
        yield


@register_bug
def vocabulary_head_gradients_are_not_reduced_over_tensor_ranks() -> Iterator[Any]:
    """The gradient of the input of the head is a partial sum over the vocabulary shard of each rank."""
    original = tensor_parallel.VocabParallelHead.forward

    def forward(self: Any, *inputs: Any) -> Any:
        with patch.object(tensor_parallel.TensorParallelRegion, "all_gather_sequence", _gather_local_gradients_only):
            return original(self, *inputs)

    with patch.object(tensor_parallel.VocabParallelHead, "forward", forward):
        yield


def _gather_local_gradients_only(region: tensor_parallel.TensorParallelRegion, x_BTD: torch.Tensor) -> torch.Tensor:
    """All-gather tokens in forward; in backward slice the local gradient in place of a reduce-scatter."""
    return mesh.differentiable_collective(x_BTD, region.all_gather_no_grad, region.local_tokens)


@register_bug
def token_slices_use_the_depth_scale_of_full_sequences() -> Iterator[Any]:
    """A bug of stochastic depth: a rank holds a slice of the tokens, which may belong to several sequences."""
    with patch.object(tensor_parallel.TensorParallelRegion, "shard_depth_scale", lambda self, block, inputs: inputs):
        yield


@register_bug
def tensor_ranks_use_the_positions_of_the_first_rank() -> Iterator[Any]:
    """A bug of learned positions: the token slice of a rank may start within a sequence."""

    def take_first_chunk(self: Any, values_BS: torch.Tensor) -> torch.Tensor:
        return values_BS.flatten(0, 1).chunk(self.tp_size)[0].unflatten(0, (len(values_BS), -1))

    with patch.object(tensor_parallel.TensorParallelRegion, "local_tokens", take_first_chunk):
        yield


@register_bug
def tied_embedding_is_not_reduced_over_stages() -> Iterator[Any]:
    """The first and the last pipeline stage update their copies of the tied embedding separately."""
    with patch.object(pipeline_parallel.TiedEmbeddingGroup, "reduce_grads", _do_nothing):
        yield


@register_bug
def norm_layer_gradients_of_token_slices_are_not_reduced() -> Iterator[Any]:
    """With sequence parallelism each tensor rank has the norm gradients of its own tokens only."""
    with patch("dist_llm.engines.native.all_reduce_replicated_grads", _do_nothing):
        yield


@register_bug
def gradients_are_averaged_over_ranks() -> Iterator[Any]:
    """FSDP divides the sum of gradients by the number of ranks, although the losses are already normalized."""
    with patch.object(FSDPModule, "set_gradient_divide_factor", _do_nothing):
        yield


@register_bug
def loss_is_the_mean_of_rank_means() -> Iterator[Any]:
    """Each data-parallel rank divides by its own number of valid tokens."""

    def skip_all_reduce(self: NativeEngine, value: Any) -> torch.Tensor:
        return torch.as_tensor(value) * self.dp_rank_and_size.size if isinstance(value, int) else original(self, value)

    original = NativeEngine.all_reduce_over_loss_axes
    with patch.object(NativeEngine, "all_reduce_over_loss_axes", skip_all_reduce):
        yield


@register_bug
def loss_is_the_mean_of_microbatch_means() -> Iterator[Any]:
    """Each microbatch is divided by its own number of valid tokens."""

    def normalize_each_microbatch(
        self: NativeEngine, batches: Any, denominator: torch.Tensor, step: int
    ) -> torch.Tensor:
        losses = [
            original(self, [batch], self.all_reduce_over_loss_axes(batch.num_valid_tokens) * len(batches), step)
            for batch in batches
        ]
        return torch.stack(losses).sum()

    original = NativeEngine._accumulate_in_sequence
    with patch.object(NativeEngine, "_accumulate_in_sequence", normalize_each_microbatch):
        yield


@register_bug
def loss_is_divided_twice() -> Iterator[Any]:
    """The loss is divided by the square of the number of valid tokens."""
    original = NativeEngine.accumulate
    with patch.object(
        NativeEngine,
        "accumulate",
        lambda self, batches, denominator, step: original(self, batches, denominator**2, step),
    ):
        yield


@register_bug
def loss_is_averaged_over_padding() -> Iterator[Any]:
    """The number of valid tokens includes targets that are ignored."""

    def count_padding(engine: Any, batches: Any, *args: Any) -> Any:
        return original(engine, [replace(batch, num_valid_tokens=batch.targets_BS.numel()) for batch in batches], *args)

    original = step.train_step
    with patch("tests.laws.law.train_step", count_padding):
        yield


@register_bug
def loss_is_divided_by_the_number_of_weighted_targets() -> Iterator[Any]:
    """The losses of targets are weighted, but the denominator counts each target as 1."""
    with patch.object(Batch, "loss_denominator", property(lambda self: self.num_valid_tokens)):
        yield


@register_bug
def context_ranks_read_the_loss_weights_of_other_tokens() -> Iterator[Any]:
    """Each context-parallel rank takes the loss weights of its tokens from the end of the sequence."""

    def flip_weights(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
        weights_BS = batch.loss_weights_BS
        flipped = replace(batch, loss_weights_BS=None if weights_BS is None else weights_BS.flip(1))
        return original(flipped, cp_rank, cp_size)

    original = context_parallel.shard_sequences
    with patch.object(native, "shard_sequences", flip_weights):
        yield


@register_bug
def the_head_of_a_stage_ignores_loss_weights() -> Iterator[Any]:
    """A pipeline does not pass the loss weights to its stages."""
    original = pipeline_parallel._stage_arguments

    def drop_weights(batch: Batch) -> dict[str, Any]:
        return original(batch) | {"loss_weights_BS": None}

    with patch.object(pipeline_parallel, "_stage_arguments", drop_weights):
        yield


@register_bug
def only_the_last_microbatch_is_accumulated() -> Iterator[Any]:
    """All other microbatches of a step are dropped."""
    original = NativeEngine.accumulate
    with patch.object(
        NativeEngine,
        "accumulate",
        lambda self, batches, denominator, step: original(self, batches[-1:], denominator, step),
    ):
        yield


@register_bug
def all_ranks_read_the_same_samples() -> Iterator[Any]:
    """All data-parallel ranks read the samples of rank 0."""
    original = NativeEngine.dp_rank_and_size
    with patch.object(NativeEngine, "dp_rank_and_size", property(lambda self: original.fget(self)._replace(rank=0))):  # type: ignore[attr-defined]
        yield


@register_bug
def gradients_are_clipped_by_the_local_norm() -> Iterator[Any]:
    """The gradient norm is not reduced over tensor ranks, so each rank clips by a different norm."""
    original = mesh.all_reduce_over_axes_

    def skip_tp_all_reduce(value: torch.Tensor, mesh: Any, axes: Any) -> torch.Tensor:
        return value if "tp" in axes else original(value, mesh, axes)  # only the norm is all-reduced over tp

    with patch("dist_llm.engines.gradient_norm.all_reduce_over_axes_", skip_tp_all_reduce):
        yield


@register_bug
def gradient_norm_counts_replicated_parameters_once_per_tensor_rank() -> Iterator[Any]:
    """The norm treats replicated parameters as sharded over tp."""
    with patch("dist_llm.engines.gradient_norm.is_replicated_over", lambda parameter, axis: False):
        yield


@register_bug
def gradient_norm_counts_the_tied_embedding_in_both_stages() -> Iterator[Any]:
    """The norm adds the tied embedding in the first and in the last pipeline stage."""

    def count_both_stages(self: NativeEngine) -> torch.Tensor:
        original_flags = [model_part.is_first_stage for model_part in self.model_parts]
        for model_part in self.model_parts:
            model_part.is_first_stage = True
        norm = original(self)
        for model_part, is_first_stage in zip(self.model_parts, original_flags, strict=True):
            model_part.is_first_stage = is_first_stage
        return norm

    original = NativeEngine._compute_grad_norm
    with patch.object(NativeEngine, "_compute_grad_norm", count_both_stages):
        yield


@register_bug
def gradients_are_not_clipped() -> Iterator[Any]:
    """The optimizer gets the gradients without clipping."""
    with patch.object(gradient_clipping, "clip_grads_", _do_nothing):
        yield


@register_bug
def context_ranks_count_positions_from_zero() -> Iterator[Any]:
    """The positions of each context rank start at 0, not at the offset of its tokens."""

    def number_from_zero(batch: Any, rank: int, ranks: int) -> Any:
        local_batch = shard_sequences(batch, rank, ranks)
        positions = torch.arange(local_batch.inputs_BS.shape[1])
        return replace(local_batch, positions_BS=positions.expand_as(local_batch.inputs_BS))

    shard_sequences = context_parallel.shard_sequences
    with patch("dist_llm.engines.native.shard_sequences", number_from_zero):
        yield


@register_bug
def causal_mask_is_aligned_to_the_first_key() -> Iterator[Any]:
    """With fewer queries than keys, is_causal of SDPA aligns the mask with the first key instead of the last."""

    def align_top_left(q: Any, k: Any, v: Any, *options: Any) -> torch.Tensor:
        heads = {"enable_gqa": q.shape[2] != k.shape[2]}
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, **heads
        )
        return out.transpose(1, 2)

    with (
        patch.object(context_parallel, "scaled_dot_product", align_top_left),
        patch.object(attention, "scaled_dot_product", align_top_left),
    ):
        yield


@register_bug
def tied_head_uses_a_copy_of_the_embedding() -> Iterator[Any]:
    """The head projects with a detached copy of the embedding, so its gradient does not reach the weight."""
    forward = tensor_parallel.VocabParallelHead.forward

    def project_with_copy(self: Any, x: Any, tied: Any, *remaining: Any) -> Any:
        return forward(self, x, None if tied is None else tied.detach(), *remaining)

    with patch.object(tensor_parallel.VocabParallelHead, "forward", project_with_copy):
        yield


@register_bug
def vocabulary_maximum_is_not_reduced_over_tensor_ranks() -> Iterator[Any]:
    """Each tensor rank subtracts the maximum of its own logits before the softmax."""

    class DistWithLocalMaximum:
        def __getattr__(self, name: str) -> Any:
            return getattr(dist, name)

        def all_reduce(self, value: Any, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
            if op != dist.ReduceOp.MAX:
                dist.all_reduce(value, op, group)

    with patch.object(tensor_parallel, "dist", DistWithLocalMaximum()):
        yield


@register_bug
def vocabulary_padding_is_in_the_softmax() -> Iterator[Any]:
    """The rows that pad the vocabulary to a multiple take part in the softmax."""
    original = tensor_parallel.VocabParallelHead._build_vocab_shard

    def include_padding_rows(self: Any, weight_WD: Any) -> Any:
        return replace(original(self, weight_WD), num_tokens=len(weight_WD))

    with patch.object(tensor_parallel.VocabParallelHead, "_build_vocab_shard", include_padding_rows):
        yield


@register_bug
def all_ranks_initialize_the_same_shard() -> Iterator[Any]:
    """Each rank draws the initial values of the first shard."""
    with patch.object(parallelize, "local_with_offset", _local_with_zero_offset):
        yield


@register_bug
def pipeline_rescales_gradients() -> Iterator[Any]:
    """The pipeline schedule divides gradients by the number of microbatches."""

    def enable_grad_scaling(kind: Any) -> Any:
        return lambda *args, **kwargs: kind(*args, **{**kwargs, "scale_grads": True})

    with patch.dict(
        pipeline_parallel.SCHEDULES,
        {name: enable_grad_scaling(kind) for name, kind in pipeline_parallel.SCHEDULES.items()},
    ):
        yield


@register_bug
def context_ranks_mask_queries_as_if_they_were_the_last() -> Iterator[Any]:
    """Document and prefix masks then describe the tokens of a different rank."""
    with patch.object(
        AttentionMask, "with_query_positions", lambda self, _, num_keys: replace(self, num_keys=num_keys)
    ):
        yield


@register_bug
def every_microbatch_uses_the_mask_of_the_first() -> Iterator[Any]:
    """A pipeline gets all microbatches at once; here all of them get the mask of the first microbatch."""
    original = Batch.concatenate

    def use_first_mask(batches: Any) -> Any:
        mask = batches[0].mask
        return replace(original([replace(batch, mask=mask) for batch in batches]))

    with patch.object(Batch, "concatenate", use_first_mask):
        yield


@register_bug
def stochastic_depth_differs_between_tensor_ranks() -> Iterator[Any]:
    """Tensor ranks drop the layers of different sequences."""
    original = decoder.stochastic_depth_scale  # type: ignore[attr-defined]
    with patch.object(
        decoder, "stochastic_depth_scale", lambda sample_hash_B, *args: original(sample_hash_B + dist.get_rank(), *args)
    ):
        yield


@register_bug
def encoder_embedding_is_not_reduced_over_stages() -> Iterator[Any]:
    """The first stage of the decoder embeds tokens with the matrix of the first stage of the encoder."""
    with patch.object(pipeline_parallel.TiedEmbeddingGroup, "reduce_grads", _do_nothing):
        yield


@register_bug
def qk_norm_gradients_are_not_reduced() -> Iterator[Any]:
    """Each tensor rank normalizes queries and keys of its own heads with replicated weights (config key qk_norm)."""
    with patch("dist_llm.engines.native.all_reduce_replicated_grads", _do_nothing):
        yield


@register_bug
def norm_over_all_heads_sees_only_the_heads_of_its_rank() -> Iterator[Any]:
    """A tensor rank normalizes by the mean square of its own queries (config key qk_norm=all)."""

    def normalize_local_heads(self: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.effective_weight(), self.eps)

    with patch.object(tensor_parallel.ShardedRMSNorm, "forward", normalize_local_heads):
        yield


@register_bug
def norm_over_all_heads_does_not_reduce_its_gradient() -> Iterator[Any]:
    """The sum of squares is reduced in forward; in backward each rank uses the gradient of its own heads."""
    original = tensor_parallel.differentiable_collective  # type: ignore[attr-defined]

    def without_backward(x: torch.Tensor, forward: Any, backward: Any) -> torch.Tensor:
        is_sum_of_squares = x.shape[-1] == 1
        return original(x, forward, torch.clone if is_sum_of_squares else backward)

    with patch.object(tensor_parallel, "differentiable_collective", without_backward):
        yield


@register_bug
def every_tensor_rank_has_the_slopes_of_the_first_heads() -> Iterator[Any]:
    """The bias of ALiBi has no parameters that tensor parallelism would shard."""
    original = AlibiBias.forward

    def use_first_heads(self: AlibiBias, *positions: torch.Tensor) -> torch.Tensor:
        self.local_heads = range(len(self.local_heads))
        return original(self, *positions)

    with patch.object(AlibiBias, "forward", use_first_heads):
        yield


@register_bug
def every_tensor_rank_has_the_sinks_of_the_first_heads() -> Iterator[Any]:
    """The sinks are a parameter of attention itself, which reads the shard of its rank (config key attention_sinks)."""

    def read_first_heads(parameter: torch.Tensor) -> torch.Tensor:
        local = sharded.to_local(parameter)
        return local if local is parameter else parameter.full_tensor()[: len(local)]  # type: ignore[attr-defined]

    with patch.object(attention, "to_local", read_first_heads):
        yield


@register_bug
def the_second_chunk_of_a_context_rank_has_no_sinks() -> Iterator[Any]:
    original: Any = context_parallel.scaled_dot_product  # type: ignore[attr-defined]

    def omit_sinks(q: torch.Tensor, k: torch.Tensor, *args: Any) -> torch.Tensor:
        is_second_chunk = k.shape[1] > q.shape[1] * dist.get_world_size()
        return original(q, k, *args[:-1], None if is_second_chunk else args[-1])

    with patch.object(context_parallel, "scaled_dot_product", omit_sinks):
        yield


@register_bug
def every_tensor_rank_has_the_gates_of_the_first_heads() -> Iterator[Any]:
    """A rank multiplies the outputs of its heads by the gates of the heads of the first rank."""
    original = attention.Attention._apply_gate

    def use_first_gates(self: Any, out: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        first_gate = gate.detach().clone()
        dist.broadcast(first_gate, 0)
        return original(self, out, gate + (first_gate - gate.detach()))

    with patch.object(attention.Attention, "_apply_gate", use_first_gates):
        yield


@register_bug
def windows_ignore_documents() -> Iterator[Any]:
    """Attention within a window also reads tokens of the previous document."""
    original = banded_attention._band_mask
    with patch.object(
        banded_attention, "_band_mask", lambda mask, *args: original(replace(mask, documents_BT=None), *args)
    ):
        yield


@register_bug
def windows_are_one_key_short_on_context_ranks() -> Iterator[Any]:
    """The attention mask of a window allows one key less."""
    original = AttentionMask.allows

    def allows_less(self: AttentionMask, *args: Any) -> torch.Tensor:
        return original(replace(self, window=self.window - 1) if self.window else self, *args)

    with patch.object(AttentionMask, "allows", allows_less):
        yield


@register_bug
def stages_use_the_rotations_of_the_first_layers() -> Iterator[Any]:
    """A pipeline stage counts the kinds of its layers from its own first layer."""

    def compute_rotations(self: decoder.Decoder, positions_BS: torch.Tensor) -> dict[int, Any]:
        layers = [int(name) for name in self.blocks]
        configs = {layer: self.config.layer_config(layer - min(layers)) for layer in layers}
        return {
            layer: compute_rotary_cos_sin(positions_BS, config) if config.positions == "rope" else None
            for layer, config in configs.items()
        }

    with patch.object(decoder.Decoder, "_rotary_cos_sin", compute_rotations):
        yield


@register_bug
def weights_stay_gathered_after_the_last_backward() -> Iterator[Any]:
    """FSDP then leaves the gradients on the unsharded parameters, which the optimizer does not read."""
    original = FSDPModule.set_reshard_after_backward
    with patch.object(FSDPModule, "set_reshard_after_backward", lambda self, *args, **kwargs: original(self, False)):
        yield


@register_bug
def shards_are_orthogonalized_separately() -> Iterator[Any]:
    """Muon orthogonalizes the shard of each rank in place of the full matrix."""

    def orthogonalize_shards(self: DistributedOrthogonalizer, updates: Any) -> Any:
        shards = [sharded.to_local(update) for update in updates]
        for shard, result in zip(shards, orthogonalize(shards), strict=True):
            shard.copy_(result)
        return updates

    with patch.object(DistributedOrthogonalizer, "__call__", orthogonalize_shards):
        yield


@register_bug
def shards_are_returned_to_the_wrong_rank() -> Iterator[Any]:
    """All shards have the same shape, so only their values are wrong."""
    original = DistributedOrthogonalizer.__init__

    def init_reversed(self: DistributedOrthogonalizer, *args: Any) -> None:
        original(self, *args)
        self.results_to_send = self.results_to_send[::-1]

    with patch.object(DistributedOrthogonalizer, "__init__", init_reversed):
        yield


@register_bug
def momentum_is_reset_before_each_step() -> Iterator[Any]:
    """SGD starts each step without momentum."""
    with _before_sgd_steps(lambda optimizer: optimizer.state.clear()):
        yield


@register_bug
def momentum_is_kept_on_the_first_rank_only() -> Iterator[Any]:
    """SGD has no momentum on ranks other than 0."""

    def reset_momentum(optimizer: LocalSGD) -> None:
        if dist.get_rank() != 0:
            optimizer.state.clear()

    with _before_sgd_steps(reset_momentum):
        yield


def _before_sgd_steps(action: Callable[[LocalSGD], None]) -> AbstractContextManager[Any]:
    """Call `action` with the optimizer before each step of SGD."""
    original = LocalSGD.step

    def step(self: LocalSGD, closure: None = None) -> None:
        action(self)
        original(self, closure)

    return patch.object(LocalSGD, "step", step)


@register_bug
def stochastic_rounding_depends_on_the_local_index() -> Iterator[Any]:
    """The random numbers of an element depend on its index in the shard, not in the full tensor."""
    with patch("dist_llm.engines.native.local_with_offset", _local_with_zero_offset):
        yield


@register_bug
def parameter_groups_ignore_their_learning_rate() -> Iterator[Any]:
    """Each group gets the rate of the schedule, without its lr_mult."""

    def set_same_rate(param_groups: Any, lr: float) -> None:
        for group in param_groups:
            group["lr"] = lr

    with patch("dist_llm.engines.optimizer_step.set_learning_rate", set_same_rate):
        yield


@register_bug
def tensor_parallel_parameters_are_not_frozen() -> Iterator[Any]:
    """Freezing before tensor parallelism has no effect, because the latter creates new parameters."""
    with patch.object(parallelize, "freeze_parameters", _do_nothing):
        yield


@register_bug
def matrices_are_orthogonalized_in_the_order_of_the_groups() -> Iterator[Any]:
    """The owner rank of a matrix then takes it for another matrix."""
    original = Muon.__call__

    def sort_by_group(self: Muon, optimizer: Any, *args: Any) -> None:
        muon_groups = [group["params"] for group in optimizer.param_groups if "momentum" in group]
        self.matrices = [parameter for group in muon_groups for parameter in group]
        original(self, optimizer, *args)

    with patch.object(Muon, "__call__", sort_by_group):
        yield
