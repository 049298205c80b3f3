"""Tensor-parallel layers, and the collectives on the activations between them.

With `sequence_parallel` a rank holds a share of the tokens between the matrices (Korthikanti et al. 2022). Norms,
residuals and dropout work on this share, and each pair of matrices costs one all-gather and one reduce-scatter. Without
it, both are one all-reduce.

Parameters are DTensors, from which FSDP, checkpoints and the gradient norm read the shard of a rank. Layers compute
with the local shards. `tp_plan.py` says which layer is sharded along which dimension.
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
from dist_llm.parallel.mesh import all_gather, all_reduce, differentiable_collective, reduce_scatter
from dist_llm.sharded import to_local

# On one rank: T tokens between the matrices, S or S / tp;  F inputs or outputs of a layer;  W rows of the vocabulary


class TensorParallelRegion:
    """The distribution of activations between the matrices: each rank holds a share of the tokens, or all ranks hold
    all.

    The tokens of all sequences are concatenated before they are split into shares, so that an all-gather needs no copy
    to restore them. A row of a share [B, T, D] is therefore not part of one sequence. No layer in the region notices,
    because each computes one token at a time.
    """

    def __init__(self, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        self.rank, self.ranks, self.group = mesh.get_local_rank(), mesh.size(), mesh.get_group()

    def all_gather_sequence(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> all tokens on every rank, [B, S, D].

        The gradient is reduce-scattered: each rank holds a partial sum of it.
        """
        return differentiable_collective(x_BTD, self.all_gather_no_grad, self.reduce_scatter_no_grad)

    def reduce_scatter_sequence(self, part_BSD: Tensor) -> Tensor:
        """Each rank's partial sum [B, S, D] -> this rank's tokens of the full sum, [B, T, D]."""
        return differentiable_collective(part_BSD, self.reduce_scatter_no_grad, self.all_gather_no_grad)

    def local_tokens(self, numbers_BS: Tensor) -> Tensor:
        """Select the values of this rank's tokens: [B, S, ...] -> [B, T, ...]."""
        return numbers_BS.flatten(0, 1).chunk(self.ranks)[self.rank].unflatten(0, (len(numbers_BS), -1))

    def gather_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook: all-gather the input of layers that shard heads or hidden units.

        Cross-attention has two inputs.
        """
        count = 2 if isinstance(module, CrossAttention) else 1
        return *(self.all_gather_sequence(x_BTD) for x_BTD in inputs[:count]), *inputs[count:]

    def shard_positions(self, embedding: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Forward pre-hook under sequence parallelism: pass the positions of this rank's tokens."""
        tokens_BS, positions_BS = inputs
        return tokens_BS, self.local_tokens(positions_BS.expand_as(tokens_BS))

    def shard_depth_scale(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Forward pre-hook under sequence parallelism: pass the stochastic-depth scale of this rank's tokens."""
        x_BTD, rotation, mask, cache, depth_scale_BS1, *rest = inputs
        if depth_scale_BS1 is not None:
            depth_scale_BS1 = self.local_tokens(depth_scale_BS1.expand(-1, x_BTD.shape[1] * self.ranks, 1))
        return x_BTD, rotation, mask, cache, depth_scale_BS1, *rest

    def all_gather_no_grad(self, x_BTD: Tensor) -> Tensor:
        """Compute `all_gather_sequence` without autograd."""
        if not self.sequence_parallel:
            return x_BTD.view_as(x_BTD)
        return all_gather(x_BTD.flatten(0, 1), self.group).unflatten(0, (len(x_BTD), -1))

    def reduce_scatter_no_grad(self, part_BSD: Tensor) -> Tensor:
        """Compute `reduce_scatter_sequence` without autograd."""
        collective = reduce_scatter if self.sequence_parallel else all_reduce
        return collective(part_BSD.flatten(0, 1), self.group).unflatten(0, (len(part_BSD), -1))


@torch.no_grad()
def all_reduce_replicated_grads(model: Decoder, mesh: DeviceMesh, device: torch.device) -> None:
    """Sum the gradients of parameters that all tensor ranks hold but that each computes from partial activations.

    Call this once per step, after the last microbatch. All gradients are reduced in one flat buffer. It also drops the
    weights that were cast for this step.
    """
    gradients = []
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.cached_cast = None
        parameters = (getattr(module, name, None) for name in getattr(module, "partial_grad_params", ()))
        gradients += [to_local(p.grad) for p in parameters if p is not None and p.grad is not None]
    if gradients:
        flat = torch.cat([grad.flatten() for grad in gradients]).to(device)
        dist.all_reduce(flat, group=mesh.get_group())
        flat = flat.to(gradients[0].device)  # under cpu_offload gradients are in host memory
        for grad, reduced in zip(gradients, flat.split([grad.numel() for grad in gradients]), strict=True):
            grad.copy_(reduced.view_as(grad))


def _local_param(parameter: Tensor) -> Tensor:
    """Return this rank's shard of a parameter. Gradients flow back to the parameter."""
    assert isinstance(parameter, DTensor)
    if torch.compiler.is_compiling():
        return parameter.to_local()
    return _LocalParam.apply(parameter)  # type: ignore[no-untyped-call]


class _LocalParam(torch.autograd.Function):
    """`to_local` in a tenth of the time: torch's version treats the gradient like any tensor and takes 0.3 ms per
    parameter on a CPU."""

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
    """Return the layer's shard of the weight, cast to the autocast dtype once per step.

    Autocast caches its casts of parameters, but not of views such as a shard, and would cast it again for each
    microbatch.
    """
    device = layer.weight.device.type
    if not torch.is_autocast_enabled(device) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _local_param(layer.weight)
    # float8 does its own cast; FSDP has already cast
    if layer.matmul is not F.linear or layer.weight.dtype != torch.float32:
        return _local_param(layer.weight)
    if layer.cached_cast is None:
        layer.cached_cast = _local_param(layer.weight).to(torch.get_autocast_dtype(device))
    return layer.cached_cast


class ColumnParallelLinear(nn.Linear):
    """A linear layer whose output features are sharded, or which is replicated: [..., K] -> [..., F]."""

    matmul: Any
    cached_cast: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        bias_F = None if self.bias is None else _local_param(self.bias)
        return self.matmul(x, _compute_weight(self), bias_F)


class ColumnParallelEmbedding(nn.Embedding):
    """An embedding whose columns are sharded, or which is replicated: ids [...] -> [..., F]."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, _local_param(self.weight))


class ReplicatedLayerNorm(nn.LayerNorm):
    """A LayerNorm whose parameters all tensor ranks hold."""

    def forward(self, x: Tensor) -> Tensor:
        bias_D = None if self.bias is None else _local_param(self.bias)
        return F.layer_norm(x, self.normalized_shape, _local_param(self.weight), bias_D, self.eps)


class ReplicatedRMSNorm(nn.RMSNorm):
    """An RMSNorm whose parameters all tensor ranks hold."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, _local_param(self.weight), self.eps)


class RowParallelLinear(nn.Linear):
    """A linear layer whose input features are sharded; the products are summed over ranks: [B, S, F] -> [B, T, D]."""

    matmul: Any
    cached_cast: Tensor | None = None
    region: TensorParallelRegion

    def forward(self, x_BSF: Tensor) -> Tensor:
        y_BTD = self.region.reduce_scatter_sequence(self.matmul(x_BSF, _compute_weight(self)))
        return y_BTD if self.bias is None else y_BTD + _local_param(self.bias).to(y_BTD.dtype)


class VocabParallelEmbedding(nn.Embedding):
    """An embedding whose vocabulary rows are sharded; the vectors are summed over ranks: ids [B, S] -> [B, T, D]."""

    region: TensorParallelRegion

    def forward(self, ids_BS: Tensor) -> Tensor:
        weight_WD = _local_param(self.weight)
        rows_BS = ids_BS - self.region.rank * len(weight_WD)
        not_local_BS = (rows_BS < 0) | (rows_BS >= len(weight_WD))
        x_BSD = F.embedding(rows_BS.masked_fill(not_local_BS, 0), weight_WD)
        return self.region.reduce_scatter_sequence(x_BSD.masked_fill(not_local_BS[..., None], 0))


class VocabParallelHead(Head):
    """The head with sharded vocabulary rows: a rank computes the logits of its own part of the vocabulary only.

    The loss needs three numbers per token from each rank: the largest logit, the sum of exponentials and the target's
    logit. Label smoothing also needs the sum of the logits.
    """

    def __init__(self, head: Head, region: TensorParallelRegion) -> None:
        nn.Module.__init__(self)
        self.norm, self.dense, self.out, self.bias = head.norm, head.dense, head.out, head.bias
        self.vocab_size, self.softcap, self.loss = head.vocab_size, head.softcap, head.loss
        self.terms = head.terms
        self.region = region

    def forward(self, x_BTD: Tensor, tied_VD: Tensor | None, targets_BS: Tensor | None) -> Tensor:
        """Compute `Head.forward`. Every rank returns the same losses, [B], or all logits, [B, S, V]."""
        x_BSD = self.region.all_gather_sequence(self.compute_pre_logits(x_BTD))
        weight_VD = tied_VD if self.out is None else self.out.weight
        assert weight_VD is not None
        weight_WD, bias_W = _local_param(weight_VD), None if self.bias is None else _local_param(self.bias)
        if targets_BS is not None:
            vocab_shard = self._vocab_shard(weight_WD)
            loss, terms = self.select_loss()
            return linear_cross_entropy(x_BSD, weight_WD, bias_W, targets_BS, loss, self.softcap, vocab_shard, terms)
        logits_BSW = apply_softcap(F.linear(x_BSD, weight_WD, bias_W), self.softcap)
        logits_BSV = DTensor.from_local(logits_BSW, self.region.mesh, (Shard(2),), run_check=False).full_tensor()
        return logits_BSV[..., : self.vocab_size]

    def _vocab_shard(self, weight_WD: Tensor) -> VocabShard:
        """Describe this rank's part of the vocabulary, without the padding rows at the end."""
        start, group = self.region.rank * len(weight_WD), self.region.group
        width = min(len(weight_WD), max(0, self.vocab_size - start))
        return VocabShard(
            self.vocab_size, start, width, partial(_all_reduce_sum_, group), partial(_all_reduce_max_, group)
        )


def _all_reduce_sum_(group: dist.ProcessGroup, value: Tensor) -> Tensor:
    dist.all_reduce(value, group=group)
    return value


def _all_reduce_max_(group: dist.ProcessGroup, value: Tensor) -> Tensor:
    dist.all_reduce(value, dist.ReduceOp.MAX, group)
    return value


def fork_dropout_rng(kernel: nn.Module, mesh: DeviceMesh) -> None:
    """Give attention dropout a different random stream on each tensor rank.

    All other dropout stays equal on these ranks.

    Heads are sharded, so their dropout must differ. The kernel draws from its own stream, seeded by one draw of the
    common stream, which is restored afterwards. A recomputation repeats both.
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
