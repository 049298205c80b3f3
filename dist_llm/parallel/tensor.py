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
from dist_llm.parallel.mesh import exchanged, gathered, local, reduced, total

# Of a rank: T tokens between the matrices, S or S / tp  F inputs or outputs of a layer  W rows of the vocabulary


class Between:
    """How activations lie between the matrices: each rank has its share of the tokens, or all have all of them.

    Shares are cut of the tokens of all sequences in a row, so that nothing is copied to put them together. As no layer
    there looks at two tokens at once, it does not matter to it that a row of its [B, T, D] is not of one sequence.
    """

    def __init__(self, mesh: DeviceMesh, sliced: bool) -> None:
        self.mesh, self.sliced = mesh, sliced
        self.rank, self.ranks, self.group = mesh.get_local_rank(), mesh.size(), mesh.get_group()

    def join(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> all tokens, on every rank [B, S, D]; of their gradient each rank has a part of a sum."""
        return exchanged(x_BTD, self.joined, self.added)

    def add(self, part_BSD: Tensor) -> Tensor:
        """Each rank's part of a sum [B, S, D] -> the sum, [B, T, D]."""
        return exchanged(part_BSD, self.added, self.joined)

    def mine(self, numbers_BS: Tensor) -> Tensor:
        """Of numbers of all tokens [B, S, ...] those of the tokens that this rank has, [B, T, ...]."""
        return numbers_BS.flatten(0, 1).chunk(self.ranks)[self.rank].unflatten(0, (len(numbers_BS), -1))

    def join_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A hook: what splits heads or units is handed all tokens; cross-attention of both stacks."""
        count = 2 if isinstance(module, CrossAttention) else 1
        return *(self.join(each) for each in inputs[:count]), *inputs[count:]

    def share_positions(self, embedding: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A hook, where tokens are shared out."""
        tokens_BS, positions_BS = inputs
        return tokens_BS, self.mine(positions_BS.expand_as(tokens_BS))

    def share_survivors(self, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A hook, where tokens are shared out."""
        x_BTD, rotation, visible, cache, survive_BS1, *rest = inputs
        if survive_BS1 is not None:
            survive_BS1 = self.mine(survive_BS1.expand(-1, x_BTD.shape[1] * self.ranks, 1))
        return x_BTD, rotation, visible, cache, survive_BS1, *rest

    def joined(self, x_BTD: Tensor) -> Tensor:
        """`join` without its gradient."""
        if not self.sliced:
            return x_BTD.view_as(x_BTD)
        return gathered(x_BTD.flatten(0, 1), self.group).unflatten(0, (len(x_BTD), -1))

    def added(self, part_BSD: Tensor) -> Tensor:
        """`add` without its gradient."""
        sum_up = reduced if self.sliced else total
        return sum_up(part_BSD.flatten(0, 1), self.group).unflatten(0, (len(part_BSD), -1))


@torch.no_grad()
def settle_gradients(model: Decoder, mesh: DeviceMesh, device: torch.device) -> None:
    """Once a step, after its last microbatch: add up over tensor ranks, all at once, the gradients of what they share
    and each saw a part of."""
    gradients = []
    for module in model.modules():
        if isinstance(module, LocalLinear | RowLinear):
            module.rounded = None
        parameters = (getattr(module, name, None) for name in getattr(module, "summed", ()))
        gradients += [local(each.grad) for each in parameters if each is not None and each.grad is not None]
    if gradients:
        flat = torch.cat([each.flatten() for each in gradients]).to(device)
        dist.all_reduce(flat, group=mesh.get_group())
        flat = flat.to(gradients[0].device)  # under cpu_offload gradients are on the host
        for each, summed in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            each.copy_(summed.view_as(each))


def _here(parameter: Tensor) -> Tensor:
    """This rank's part."""
    assert isinstance(parameter, DTensor)
    if torch.compiler.is_compiling():
        return parameter.to_local()
    return _Here.apply(parameter)  # type: ignore[no-untyped-call]


class _Here(torch.autograd.Function):
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


def _matrix(layer: "LocalLinear | RowLinear") -> Tensor:
    """The layer's part of the weight; under autocast rounded, once a step.

    Autocast rounds a parameter once for all microbatches of a pipeline, but not a part of one.
    """
    device = layer.weight.device.type
    if not torch.is_autocast_enabled(device) or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _here(layer.weight)
    if layer.product is not F.linear or layer.weight.dtype != torch.float32:  # float8 rounds by itself; FSDP did
        return _here(layer.weight)
    if layer.rounded is None:
        layer.rounded = _here(layer.weight).to(torch.get_autocast_dtype(device))
    return layer.rounded


class LocalLinear(nn.Linear):
    """Of this rank's part of the weights, be it all of them: [..., K] -> [..., F]. So are all that are called local."""

    product: Any
    rounded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        bias_F = None if self.bias is None else _here(self.bias)
        return self.product(x, _matrix(self), bias_F)


class LocalEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, _here(self.weight))


class LocalLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        bias_D = None if self.bias is None else _here(self.bias)
        return F.layer_norm(x, self.normalized_shape, _here(self.weight), bias_D, self.eps)


class LocalRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, _here(self.weight), self.eps)


class RowLinear(nn.Linear):
    """Products with some of the inputs, added up: [B, S, F] -> [B, T, D]."""

    product: Any
    rounded: Tensor | None = None
    between: Between

    def forward(self, x_BSF: Tensor) -> Tensor:
        y_BTD = self.between.add(self.product(x_BSF, _matrix(self)))
        return y_BTD if self.bias is None else y_BTD + _here(self.bias).to(y_BTD.dtype)


class RowEmbedding(nn.Embedding):
    """The vectors of some tokens, added up: ids [B, S] -> [B, T, D]."""

    between: Between

    def forward(self, ids_BS: Tensor) -> Tensor:
        weight_WD = _here(self.weight)
        rows_BS = ids_BS - self.between.rank * len(weight_WD)
        elsewhere_BS = (rows_BS < 0) | (rows_BS >= len(weight_WD))
        x_BSD = F.embedding(rows_BS.masked_fill(elsewhere_BS, 0), weight_WD)
        return self.between.add(x_BSD.masked_fill(elsewhere_BS[..., None], 0))


class VocabParallelHead(Head):
    """The head with its vocabulary rows split: a rank sees its own columns of the logits, never all.

    For the loss three numbers per token travel: the largest logit, the sum of exponentials, the target's logit (and the
    sum of logits, for label smoothing).
    """

    def __init__(self, head: Head, between: Between) -> None:
        nn.Module.__init__(self)
        self.norm, self.dense, self.out, self.bias = head.norm, head.dense, head.out, head.bias
        self.vocab_size, self.cap, self.loss = head.vocab_size, head.cap, head.loss
        self.terms = head.terms
        self.between = between

    def forward(self, x_BTD: Tensor, tied_VD: Tensor | None, targets_BS: Tensor | None) -> Tensor:
        """As `Head.forward`; every rank returns the same losses, or all logits."""
        x_BSD = self.between.join(self.hidden(x_BTD))
        whole_VD = tied_VD if self.out is None else self.out.weight
        assert whole_VD is not None
        weight_WD, bias_W = _here(whole_VD), None if self.bias is None else _here(self.bias)
        if targets_BS is not None:
            columns = self._columns(weight_WD)
            loss, terms = self.loss_of_mode()
            return linear_cross_entropy(x_BSD, weight_WD, bias_W, targets_BS, loss, self.cap, columns, terms)
        logits_BSW = capped(F.linear(x_BSD, weight_WD, bias_W), self.cap)
        whole = DTensor.from_local(logits_BSW, self.between.mesh, (Shard(2),), run_check=False).full_tensor()
        return whole[..., : self.vocab_size]

    def _columns(self, weight_WD: Tensor) -> Columns:
        """Of this rank, without the padding at the end."""
        start, group = self.between.rank * len(weight_WD), self.between.group
        width = min(len(weight_WD), max(0, self.vocab_size - start))
        return Columns(self.vocab_size, start, width, partial(_sum, group), partial(_largest, group))


def _sum(group: dist.ProcessGroup, parts: Tensor) -> Tensor:
    dist.all_reduce(parts, group=group)
    return parts


def _largest(group: dist.ProcessGroup, each: Tensor) -> Tensor:
    dist.all_reduce(each, dist.ReduceOp.MAX, group)
    return each


def own_dropout(kernel: nn.Module, mesh: DeviceMesh) -> None:
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
