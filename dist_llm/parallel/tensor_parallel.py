"""Tensor-parallel layers, and the collectives on the activations between them. `tp_plan.py` applies them to a model.

With `sequence_parallel`, a rank holds a slice of the tokens between the matrix products (Korthikanti et al. 2022).
Norms, residuals and dropout work on this slice; each pair of matrices needs one all-gather and one reduce-scatter.
Without it, each pair needs one all-reduce. Parameters are DTensors, for FSDP, checkpoints and the gradient norm.
Layers compute with the local shards.

Shapes on one rank: B sequences of S tokens; T = S, or S / tp with sequence_parallel, tokens between the matrix
products; D model dimension; F inputs or outputs of a layer; V vocabulary; W vocabulary rows of this rank.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dist_llm.compat import build_dtensor, copy_dtensor_spec
from dist_llm.losses.fused_linear_cross_entropy import VocabShard, linear_cross_entropy
from dist_llm.models.attention import CrossAttention
from dist_llm.models.decoder import Decoder, Head, apply_softcap
from dist_llm.models.norm import LayerNorm, RMSNorm
from dist_llm.parallel.mesh import all_gather, all_reduce, differentiable_collective, reduce_scatter
from dist_llm.sharded import to_local


class TensorParallelRegion:
    """The collectives between matrix products, where each rank holds a slice of the tokens, or all tokens.

    The tokens of all sequences are concatenated before they are split into slices, so that an all-gather needs no copy.
    A row of a slice [B, T, D] may therefore contain tokens of several sequences. This is correct, because the layers of
    this region compute each token separately.
    """

    def __init__(self, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        self.rank, self.tp_size, self.group = mesh.get_local_rank(), mesh.size(), mesh.get_group()

    def all_gather_sequence(self, x_BTD: Tensor) -> Tensor:
        """All-gather the tokens: [B, T, D] -> [B, S, D]. In backward, the partial gradients are reduce-scattered."""
        return differentiable_collective(x_BTD, self.all_gather_no_grad, self.reduce_scatter_no_grad)

    def reduce_scatter_sequence(self, part_BSD: Tensor) -> Tensor:
        """Sum the partial results of all ranks, [B, S, D], and return the tokens of this rank, [B, T, D]."""
        return differentiable_collective(part_BSD, self.reduce_scatter_no_grad, self.all_gather_no_grad)

    def local_tokens(self, values_BS: Tensor) -> Tensor:
        """Select the values of the tokens of this rank: [B, S, ...] -> [B, T, ...]."""
        return values_BS.flatten(0, 1).chunk(self.tp_size)[self.rank].unflatten(0, (len(values_BS), -1))

    def gather_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook: all-gather the activations that enter an attention or feed-forward layer."""
        num_activations = 2 if isinstance(module, CrossAttention) else 1
        gathered = (self.all_gather_sequence(x_BTD) for x_BTD in inputs[:num_activations])
        return *gathered, *inputs[num_activations:]

    def shard_positions(self, embedding: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Forward pre-hook under sequence parallelism: pass the positions of the tokens of this rank."""
        tokens_BS, positions_BS = inputs
        return tokens_BS, self.local_tokens(positions_BS.expand_as(tokens_BS))

    def shard_depth_scale(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook under sequence parallelism: pass the stochastic-depth scale of the tokens of this rank."""
        x_BTD, context, *other_inputs = inputs
        if context.depth_scale_BS1 is not None:
            num_tokens = x_BTD.shape[1] * self.tp_size
            context = context.with_depth_scale(self.local_tokens(context.depth_scale_BS1.expand(-1, num_tokens, 1)))
        return x_BTD, context, *other_inputs

    def all_gather_no_grad(self, x_BTD: Tensor) -> Tensor:
        """Compute `all_gather_sequence` without autograd: [B, T, D] -> [B, S, D]."""
        if not self.sequence_parallel:
            return x_BTD.view_as(x_BTD)
        return all_gather(x_BTD.flatten(0, 1), self.group).unflatten(0, (len(x_BTD), -1))

    def reduce_scatter_no_grad(self, part_BSD: Tensor) -> Tensor:
        """Compute `reduce_scatter_sequence` without autograd: [B, S, D] -> [B, T, D]."""
        collective = reduce_scatter if self.sequence_parallel else all_reduce
        return collective(part_BSD.flatten(0, 1), self.group).unflatten(0, (len(part_BSD), -1))


@torch.no_grad()
def all_reduce_replicated_grads(model: Decoder, mesh: DeviceMesh, device: torch.device) -> None:
    """All-reduce the gradients of parameters that are replicated over tp but computed from partial activations.

    Call this once per step, after the last microbatch. All gradients are reduced in one flat buffer. The function also
    drops the weights that were cast for this step.
    """
    grads = []
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.cached_cast = None
        parameters = (getattr(module, name, None) for name in getattr(module, "partial_grad_params", ()))
        grads += [
            to_local(parameter.grad) for parameter in parameters if parameter is not None and parameter.grad is not None
        ]
    if grads:
        flat = torch.cat([grad.flatten() for grad in grads]).to(device)
        dist.all_reduce(flat, group=mesh.get_group())
        flat = flat.to(grads[0].device)  # under cpu_offload the gradients are in host memory
        for grad, grad_sum in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(grad_sum.view_as(grad))


def _local_param(parameter: Tensor) -> Tensor:
    """Return the shard of a parameter on this rank. Gradients flow back to the parameter."""
    assert isinstance(parameter, DTensor)
    if torch.compiler.is_compiling():
        return parameter.to_local()
    return _LocalParam.apply(parameter)  # type: ignore[no-untyped-call]


class _LocalParam(torch.autograd.Function):
    """A differentiable `to_local` that takes a tenth of the time of torch's, which is 0.3 ms per parameter on a CPU."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.spec = copy_dtensor_spec(parameter)
        shard = parameter.to_local()
        return shard.view_as(shard)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return build_dtensor(grad.contiguous(), ctx.spec)


def _compute_weight(layer: "ColumnParallelLinear | RowParallelLinear") -> Tensor:
    """Return the local shard of the weight of a layer, cast to the autocast dtype once per step.

    Autocast caches casts of parameters, but not of views such as a shard. It would cast the shard for each microbatch.
    """
    device = layer.weight.device.type
    if not torch.is_autocast_enabled(device) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _local_param(layer.weight)
    # float8_linear casts by itself; FSDP has already cast the weight.
    if layer.linear_fn is not F.linear or layer.weight.dtype != torch.float32:
        return _local_param(layer.weight)
    if layer.cached_cast is None:
        layer.cached_cast = _local_param(layer.weight).to(torch.get_autocast_dtype(device))
    return layer.cached_cast


class ColumnParallelLinear(nn.Linear):
    """A linear layer whose output features are sharded: [..., D] -> [..., F]. It does not communicate."""

    linear_fn: Any  # F.linear, or fp8.float8_linear
    cached_cast: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        bias_F = None if self.bias is None else _local_param(self.bias)
        return self.linear_fn(x, _compute_weight(self), bias_F)


class ReplicatedLinear(ColumnParallelLinear):
    """A linear layer whose parameters are replicated over tp. A rank computes with its copy, without communication."""


class ColumnParallelEmbedding(nn.Embedding):
    """An embedding whose columns are sharded: [...] -> [..., F]."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, _local_param(self.weight))


class ReplicatedEmbedding(ColumnParallelEmbedding):
    """An embedding whose parameters are replicated over tp."""


class ReplicatedLayerNorm(LayerNorm):
    """A LayerNorm whose parameters are replicated over tp."""

    def effective_weight(self) -> Tensor:
        """Return the factor of each element."""
        weight_D = _local_param(self.weight)
        return weight_D + 1 if self.plus_one else weight_D

    def effective_bias(self) -> Tensor | None:
        """Return the bias of each element; None: 0."""
        return None if self.bias is None else _local_param(self.bias)


class ReplicatedRMSNorm(RMSNorm):
    """An RMSNorm whose weight is replicated over tp."""

    def effective_weight(self) -> Tensor:
        """Return the factor of each element."""
        weight_D = _local_param(self.weight)
        return weight_D + 1 if self.plus_one else weight_D


class ShardedRMSNorm(ReplicatedRMSNorm):
    """An RMSNorm over elements that are sharded over tp: ranks sum the squares of their elements."""

    region: TensorParallelRegion

    def forward(self, x_BSF: Tensor) -> Tensor:
        """[B, S, F] -> [B, S, F]; F elements of this rank."""
        group, num_elements = self.region.group, x_BSF.shape[-1] * self.region.tp_size
        x = x_BSF.to(torch.promote_types(x_BSF.dtype, torch.float32))
        reduce = partial(all_reduce, group=group)
        mean_square = differentiable_collective(x.square().sum(-1, keepdim=True), reduce, reduce) / num_elements
        normalized = x * torch.rsqrt(mean_square + (self.eps or 0.0))
        return (normalized * self.effective_weight()).to(x_BSF.dtype)


class RowParallelLinear(nn.Linear):
    """A linear layer whose input features are sharded. The outputs are summed over ranks: [B, S, F] -> [B, T, D]."""

    linear_fn: Any  # F.linear, or fp8.float8_linear
    cached_cast: Tensor | None = None
    region: TensorParallelRegion

    def forward(self, x_BSF: Tensor) -> Tensor:
        y_BTD = self.region.reduce_scatter_sequence(self.linear_fn(x_BSF, _compute_weight(self)))
        return y_BTD if self.bias is None else y_BTD + _local_param(self.bias).to(y_BTD.dtype)


class VocabParallelEmbedding(nn.Embedding):
    """An embedding whose vocabulary rows are sharded. The outputs are summed over ranks: [B, S] -> [B, T, D]."""

    region: TensorParallelRegion

    def forward(self, ids_BS: Tensor) -> Tensor:
        weight_WD = _local_param(self.weight)
        rows_BS = ids_BS - self.region.rank * len(weight_WD)
        is_remote_BS = (rows_BS < 0) | (rows_BS >= len(weight_WD))
        x_BSD = F.embedding(rows_BS.masked_fill(is_remote_BS, 0), weight_WD)
        return self.region.reduce_scatter_sequence(x_BSD.masked_fill(is_remote_BS[..., None], 0))


class VocabParallelHead(Head):
    """The head with sharded vocabulary rows: a rank computes only the logits of its part of the vocabulary.

    For the loss, ranks all-reduce three numbers per token: the largest logit, the sum of exponentials and the logit of
    the target. Label smoothing also needs the sum of the logits.
    """

    def __init__(self, head: Head, region: TensorParallelRegion) -> None:
        nn.Module.__init__(self)
        self.norm, self.dense, self.out, self.bias = head.norm, head.dense, head.out, head.bias
        self.config = head.config
        self.vocab_size, self.softcap, self.loss = head.vocab_size, head.softcap, head.loss
        self.terms = head.terms
        self.region = region

    def forward(
        self,
        x_BTD: Tensor,
        tied_VD: Tensor | None,
        targets_BS: Tensor | None,
        loss_weights_BS: Tensor | None = None,
    ) -> Tensor:
        """Return the losses, [B], or without targets all logits, [B, S, V]; the same on every rank."""
        x_BSD = self.region.all_gather_sequence(self.compute_pre_logits(x_BTD))
        weight_VD = tied_VD if self.out is None else self.out.weight
        assert weight_VD is not None
        weight_WD, bias_W = _local_param(weight_VD), None if self.bias is None else _local_param(self.bias)
        if targets_BS is not None:
            vocab_shard = self._build_vocab_shard(weight_WD)
            loss, terms = self.select_loss()
            return linear_cross_entropy(
                x_BSD, weight_WD, bias_W, targets_BS, loss, self.softcap, vocab_shard, terms, loss_weights_BS
            )
        logits_BSW = apply_softcap(F.linear(x_BSD, weight_WD, bias_W), self.softcap)
        logits_BSV = DTensor.from_local(logits_BSW, self.region.mesh, (Shard(2),), run_check=False).full_tensor()
        return logits_BSV[..., : self.vocab_size]

    def _build_vocab_shard(self, weight_WD: Tensor) -> VocabShard:
        """Describe the part of the vocabulary on this rank, without the padding rows at its end."""
        first_id, group = self.region.rank * len(weight_WD), self.region.group
        num_ids = min(len(weight_WD), max(0, self.vocab_size - first_id))
        return VocabShard(
            self.vocab_size, first_id, num_ids, partial(_all_reduce_sum_, group), partial(_all_reduce_max_, group)
        )


def _all_reduce_sum_(group: dist.ProcessGroup, value: Tensor) -> Tensor:
    dist.all_reduce(value, group=group)
    return value


def _all_reduce_max_(group: dist.ProcessGroup, value: Tensor) -> Tensor:
    dist.all_reduce(value, dist.ReduceOp.MAX, group)
    return value


def fork_dropout_rng(kernel: nn.Module, mesh: DeviceMesh) -> None:
    """Give attention dropout a different random stream on each tensor-parallel rank.

    Heads are sharded, so their dropout must differ. All other dropout must stay equal on these ranks. The kernel draws
    from its own stream, which is seeded by one draw of the common stream. Then the common stream is restored.
    """
    rank = mesh.get_local_rank()

    saved_states: list[tuple[Tensor, Tensor | None]] = []

    def fork_rng(module: nn.Module, inputs: Any) -> None:
        seed = int(torch.randint(1 << 62, ()))
        saved_states.append((torch.get_rng_state(), torch.cuda.get_rng_state() if inputs[0].is_cuda else None))
        torch.manual_seed(seed + rank)

    def restore_rng(module: nn.Module, inputs: Any, output: Any) -> None:
        cpu_state, gpu_state = saved_states.pop()
        torch.set_rng_state(cpu_state)
        if gpu_state is not None:
            torch.cuda.set_rng_state(gpu_state)

    kernel.register_forward_pre_hook(fork_rng)
    kernel.register_forward_hook(restore_rng)
