"""What tensor ranks compute: layers of which a rank has a part, and what they say to each other between them.

With `sequence_parallel` a rank holds its share of the tokens between the matrices (Korthikanti et
al. 2022): norms, residuals and dropout work on the share, and each pair of matrices costs one
all-gather and one reduce-scatter. Without, those two are one all-reduce.

Parameters are DTensors, where FSDP, checkpoints and the norm read what a rank has of them. Layers compute with their
local parts. Which layer is split how says `split.py`.
"""

from copy import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dist_llm.losses.linear import Columns, linear_cross_entropy
from dist_llm.models.attention import CrossAttention
from dist_llm.models.decoder import Decoder, Head, capped
from dist_llm.parallel.mesh import all_gather, all_reduce, differentiable_collective, reduce_scatter, to_local

# Of a rank: T tokens between the matrices, S or S / tp  F inputs or outputs of a layer  W rows of the vocabulary


class TensorParallelRegion:
    """How activations lie between the matrices: each rank has its share of the tokens, or all have all of them.

    Shares are cut of the tokens of all sequences in a row, so that nothing is copied to put them together. As no layer
    there looks at two tokens at once, it does not matter to it that a row of its [B, T, D] is not of one sequence.
    """

    def __init__(self, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        self.rank, self.ranks, self.group = mesh.get_local_rank(), mesh.size(), mesh.get_group()

    def all_gather_sequence(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> all tokens, on every rank [B, S, D]; of their gradient each rank has a part of a sum."""
        return differentiable_collective(x_BTD, self.all_gather_no_grad, self.reduce_scatter_no_grad)

    def reduce_scatter_sequence(self, part_BSD: Tensor) -> Tensor:
        """Each rank's part of a sum [B, S, D] -> the sum, [B, T, D]."""
        return differentiable_collective(part_BSD, self.reduce_scatter_no_grad, self.all_gather_no_grad)

    def local_tokens(self, numbers_BS: Tensor) -> Tensor:
        """Of numbers of all tokens [B, S, ...] those of the tokens that this rank has, [B, T, ...]."""
        return numbers_BS.flatten(0, 1).chunk(self.ranks)[self.rank].unflatten(0, (len(numbers_BS), -1))

    def gather_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A hook: what splits heads or units is handed all tokens; cross-attention of both stacks."""
        count = 2 if isinstance(module, CrossAttention) else 1
        return *(self.all_gather_sequence(each) for each in inputs[:count]), *inputs[count:]

    def shard_positions(self, embedding: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A hook, where tokens are shared out."""
        tokens_BS, positions_BS = inputs
        return tokens_BS, self.local_tokens(positions_BS.expand_as(tokens_BS))

    def shard_depth_scale(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A hook, where tokens are shared out."""
        x_BTD, rotation, visible, cache, survive_BS1, *rest = inputs
        if survive_BS1 is not None:
            survive_BS1 = self.local_tokens(survive_BS1.expand(-1, x_BTD.shape[1] * self.ranks, 1))
        return x_BTD, rotation, visible, cache, survive_BS1, *rest

    def all_gather_no_grad(self, x_BTD: Tensor) -> Tensor:
        """`join` without its gradient."""
        if not self.sequence_parallel:
            return x_BTD.view_as(x_BTD)
        return all_gather(x_BTD.flatten(0, 1), self.group).unflatten(0, (len(x_BTD), -1))

    def reduce_scatter_no_grad(self, part_BSD: Tensor) -> Tensor:
        """`add` without its gradient."""
        sum_up = reduce_scatter if self.sequence_parallel else all_reduce
        return sum_up(part_BSD.flatten(0, 1), self.group).unflatten(0, (len(part_BSD), -1))


@torch.no_grad()
def all_reduce_replicated_grads(model: Decoder, mesh: DeviceMesh, device: torch.device) -> None:
    """Once a step, after its last microbatch: add up over tensor ranks, all at once, the gradients of what they share
    and each saw a part of."""
    gradients = []
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.cached_cast = None
        parameters = (getattr(module, name, None) for name in getattr(module, "partial_grad_params", ()))
        gradients += [to_local(each.grad) for each in parameters if each is not None and each.grad is not None]
    if gradients:
        flat = torch.cat([each.flatten() for each in gradients]).to(device)
        dist.all_reduce(flat, group=mesh.get_group())
        flat = flat.to(gradients[0].device)  # under cpu_offload gradients are on the host
        for each, summed in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            each.copy_(summed.view_as(each))


def _local_param(parameter: Tensor) -> Tensor:
    """This rank's part."""
    assert isinstance(parameter, DTensor)
    if torch.compiler.is_compiling():
        return parameter.to_local()
    return _LocalParam.apply(parameter)  # type: ignore[no-untyped-call]


class _LocalParam(torch.autograd.Function):
    """`to_local` in a tenth of the time: torch's own looks at a gradient as at any tensor, 0.3 ms for each on a CPU."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor) -> Tensor:
        ctx.spec = copy(parameter._spec)
        part = parameter.to_local()
        return part.view_as(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return DTensor(grad.contiguous(), ctx.spec, requires_grad=False)


def _compute_weight(layer: "ColumnParallelLinear | RowParallelLinear") -> Tensor:
    """The layer's part of the weight; under autocast rounded, once a step.

    Autocast rounds a parameter once for all microbatches of a pipeline, but not a part of one.
    """
    device = layer.weight.device.type
    if not torch.is_autocast_enabled(device) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _local_param(layer.weight)
    if layer.matmul is not F.linear or layer.weight.dtype != torch.float32:  # float8 rounds by itself; FSDP did
        return _local_param(layer.weight)
    if layer.cached_cast is None:
        layer.cached_cast = _local_param(layer.weight).to(torch.get_autocast_dtype(device))
    return layer.cached_cast


class ColumnParallelLinear(nn.Linear):
    """Of this rank's part of the weights, be it all of them: [..., K] -> [..., F]. So are all that are called local."""

    matmul: Any
    cached_cast: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        bias_F = None if self.bias is None else _local_param(self.bias)
        return self.matmul(x, _compute_weight(self), bias_F)


class ColumnParallelEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, _local_param(self.weight))


class ReplicatedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        bias_D = None if self.bias is None else _local_param(self.bias)
        return F.layer_norm(x, self.normalized_shape, _local_param(self.weight), bias_D, self.eps)


class ReplicatedRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, _local_param(self.weight), self.eps)


class RowParallelLinear(nn.Linear):
    """Products with some of the inputs, added up: [B, S, F] -> [B, T, D]."""

    matmul: Any
    cached_cast: Tensor | None = None
    region: TensorParallelRegion

    def forward(self, x_BSF: Tensor) -> Tensor:
        y_BTD = self.region.reduce_scatter_sequence(self.matmul(x_BSF, _compute_weight(self)))
        return y_BTD if self.bias is None else y_BTD + _local_param(self.bias).to(y_BTD.dtype)


class VocabParallelEmbedding(nn.Embedding):
    """The vectors of some tokens, added up: ids [B, S] -> [B, T, D]."""

    region: TensorParallelRegion

    def forward(self, ids_BS: Tensor) -> Tensor:
        weight_WD = _local_param(self.weight)
        rows_BS = ids_BS - self.region.rank * len(weight_WD)
        elsewhere_BS = (rows_BS < 0) | (rows_BS >= len(weight_WD))
        x_BSD = F.embedding(rows_BS.masked_fill(elsewhere_BS, 0), weight_WD)
        return self.region.reduce_scatter_sequence(x_BSD.masked_fill(elsewhere_BS[..., None], 0))


class VocabParallelHead(Head):
    """The head with its vocabulary rows split: a rank sees its own columns of the logits, never all.

    For the loss three numbers per token travel: the largest logit, the sum of exponentials, the target's logit (and the
    sum of logits, for label smoothing).
    """

    def __init__(self, head: Head, region: TensorParallelRegion) -> None:
        nn.Module.__init__(self)
        self.norm, self.dense, self.out, self.bias = head.norm, head.dense, head.out, head.bias
        self.vocab_size, self.cap, self.loss = head.vocab_size, head.cap, head.loss
        self.terms = head.terms
        self.region = region

    def forward(self, x_BTD: Tensor, tied_VD: Tensor | None, targets_BS: Tensor | None) -> Tensor:
        """As `Head.forward`; every rank returns the same losses, or all logits."""
        x_BSD = self.region.all_gather_sequence(self.hidden(x_BTD))
        whole_VD = tied_VD if self.out is None else self.out.weight
        assert whole_VD is not None
        weight_WD, bias_W = _local_param(whole_VD), None if self.bias is None else _local_param(self.bias)
        if targets_BS is not None:
            columns = self._vocab_shard(weight_WD)
            loss, terms = self.loss_of_mode()
            return linear_cross_entropy(x_BSD, weight_WD, bias_W, targets_BS, loss, self.cap, columns, terms)
        logits_BSW = capped(F.linear(x_BSD, weight_WD, bias_W), self.cap)
        whole = DTensor.from_local(logits_BSW, self.region.mesh, (Shard(2),), run_check=False).full_tensor()
        return whole[..., : self.vocab_size]

    def _vocab_shard(self, weight_WD: Tensor) -> Columns:
        """Of this rank, without the padding at the end."""
        start, group = self.region.rank * len(weight_WD), self.region.group
        width = min(len(weight_WD), max(0, self.vocab_size - start))
        return Columns(
            self.vocab_size, start, width, partial(_all_reduce_sum_, group), partial(_all_reduce_max_, group)
        )


def _all_reduce_sum_(group: dist.ProcessGroup, parts: Tensor) -> Tensor:
    dist.all_reduce(parts, group=group)
    return parts


def _all_reduce_max_(group: dist.ProcessGroup, each: Tensor) -> Tensor:
    dist.all_reduce(each, dist.ReduceOp.MAX, group)
    return each


def fork_dropout_rng(kernel: nn.Module, mesh: DeviceMesh) -> None:
    """Heads are split, so their dropout must differ by rank, while all around it must not.

    The kernel draws from a stream of its own, seeded by one draw of the common stream, which then
    goes on as if nothing had happened; a recomputation repeats both.
    """
    rank = mesh.get_local_rank()

    streams: list[tuple[Tensor, Tensor | None]] = []

    def before(module: nn.Module, inputs: Any) -> None:
        seed = int(torch.randint(1 << 62, ()))
        streams.append((torch.get_rng_state(), torch.cuda.get_rng_state() if inputs[0].is_cuda else None))
        torch.manual_seed(seed + rank)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        cpu, gpu = streams.pop()
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)

    kernel.register_forward_pre_hook(before)
    kernel.register_forward_hook(after)
