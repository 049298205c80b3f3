"""Tensor parallelism: heads, hidden units and vocabulary rows split over `tp`, optionally with the sequence.

With `sequence_parallel` a rank holds a slice of the sequence between the matrices (Korthikanti et
al. 2022): norms, residuals and dropout work on the slice, and each pair of matrices costs one
all-gather and one reduce-scatter. Without, those two are one all-reduce.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from dist_llm.losses.linear import Columns, linear_cross_entropy
from dist_llm.models.decoder import Decoder, Head, capped
from dist_llm.parallel.mesh import local


def tensor_parallel(model: Decoder, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Split `model` over the one-dimensional `mesh`. Every parameter is in a plan: the global norm counts on it."""
    between: Placement = Shard(1) if sequence_parallel else Replicate()
    for block in model.blocks.values():
        _parallelize(block, mesh, _block_plan(between))
        if not sequence_parallel and model.config.dropout:
            for attention in (block.attention, block.cross):
                if attention is not None:
                    _own_dropout(attention.kernel, mesh)  # type: ignore[union-attr, arg-type]
    _parallelize(model, mesh, _plan(between))
    if model.embed is not None:
        # The look-up ends in an asynchronous collective; compiled blocks must not be handed one (their
        # gradient for it would be lost), so its result is waited for here.
        model.embed.tokens.register_forward_hook(_wait)
    if model.head is not None:
        assert isinstance(model.head, Head)
        if model.head.bias is not None:
            rows = distribute_tensor(model.head.bias, mesh, (Shard(0),), src_data_rank=None)
            model.head.bias = nn.Parameter(rows)
        model.head = VocabParallelHead(model.head, mesh, between)


def _parallelize(module: nn.Module, mesh: DeviceMesh, plan: Mapping[str, ParallelStyle]) -> None:
    """By those entries of `plan` whose modules are there."""
    there = {name for name, _ in module.named_modules()}
    parallelize_module(module, mesh, {name: style for name, style in plan.items() if name in there})


def _wait(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.clone()


def _plan(between: Placement) -> dict[str, ParallelStyle]:
    """All that is in no block. A table of relative positions has a column per head."""
    return {
        "embed.tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "embed.positions": Positions(between),
        "embed.norm": _norm(between),
        "source_embed.positions": Positions(between),
        "source_embed.norm": _norm(between),
        "source_norm": _norm(between),
        "relative.table": ColwiseParallel(),
        "source_relative.table": ColwiseParallel(),
        "head.norm": _norm(between),
        "head.dense.linear": _norm(between),  # like a norm's, its weights are whole on every rank
        "head.dense.norm": _norm(between),
        "head.out": ColwiseParallel(),
    }


def _block_plan(between: Placement) -> dict[str, ParallelStyle]:
    whole = Replicate()
    return {
        "norm_attention": _norm(between),
        "attention": PrepareModuleInput(
            input_layouts=(between, None, None, None), desired_input_layouts=(whole, None, None, None)
        ),
        **_attention_plan("attention", between),
        "norm_cross": _norm(between),
        "cross": PrepareModuleInput(
            input_layouts=(between, between, None, None), desired_input_layouts=(whole, whole, None, None)
        ),
        **_attention_plan("cross", between),
        "norm_feedforward": _norm(between),
        "feedforward": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(whole,)),
        "feedforward.gate": ColwiseParallel(),
        "feedforward.up": ColwiseParallel(),
        "feedforward.down": RowwiseParallel(output_layouts=between),
    }


def _attention_plan(name: str, between: Placement) -> dict[str, ParallelStyle]:
    return {
        f"{name}.q": ColwiseParallel(),
        f"{name}.k": ColwiseParallel(),
        f"{name}.v": ColwiseParallel(),
        # Over a head's dimensions, of the heads that a rank has: whole weights, partial gradients.
        f"{name}.norm_q": SequenceParallel(sequence_dim=2, use_local_output=True),
        f"{name}.norm_k": SequenceParallel(sequence_dim=2, use_local_output=True),
        f"{name}.out": RowwiseParallel(output_layouts=between),
    }


def _norm(between: Placement) -> ParallelStyle:
    return SequenceParallel(use_local_output=True) if between == Shard(1) else Whole()


class Whole(ParallelStyle):
    """Parameters, inputs and outputs are equal on all ranks."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def before(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            return tuple(DTensor.from_local(each, mesh, (Replicate(),), run_check=False) for each in inputs)

        def after(module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
            return local(output)

        return distribute_module(module, device_mesh, None, before, after)  # type: ignore[arg-type]


class Positions(ParallelStyle):
    """The table of positions is equal on all ranks; each looks up those of its slice of the sequence."""

    def __init__(self, between: Placement) -> None:
        self.between = between

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def before(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            (positions_BS,) = inputs
            dim = positions_BS.ndim - 1
            placement = Shard(dim) if self.between == Shard(1) else Replicate()
            mine = DTensor.from_local(positions_BS, mesh, (Replicate(),), run_check=False).redistribute(
                mesh, (placement,)
            )
            return (mine if isinstance(module, nn.Embedding) else mine.to_local(),)  # sinusoids are plain arithmetic

        def after(module: nn.Module, output: Tensor, mesh: DeviceMesh) -> Tensor:
            return local(output)

        return distribute_module(module, device_mesh, None, before, after)  # type: ignore[arg-type]


class VocabParallelHead(Head):
    """The head with its vocabulary rows split: a rank sees its own columns of the logits, never all.

    For the loss three numbers per token travel: the largest logit, the sum of exponentials, the target's logit (and the
    sum of logits, for label smoothing).
    """

    def __init__(self, head: Head, mesh: DeviceMesh, between: Placement) -> None:
        nn.Module.__init__(self)
        self.norm, self.dense, self.out, self.bias = head.norm, head.dense, head.out, head.bias
        self.vocab_size, self.cap, self.loss = head.vocab_size, head.cap, head.loss
        self.mesh, self.between = mesh, between

    def forward(self, x_BSD: Tensor, tied_VD: Tensor | None, targets_BS: Tensor | None) -> Tensor:
        """As `Head.forward`; every rank returns the same losses, or all logits."""
        x = DTensor.from_local(self.hidden(x_BSD), self.mesh, (self.between,), run_check=False)
        # Each rank's columns give one part of the activations' gradient.
        x_BSD = x.redistribute(self.mesh, (Replicate(),)).to_local(grad_placements=(Partial(),))
        weight = tied_VD if self.out is None else self.out.weight
        assert isinstance(weight, DTensor)
        weight_WD, bias_W = weight.to_local(), None if self.bias is None else local(self.bias)
        if targets_BS is not None:
            columns = self._columns(weight_WD)
            return linear_cross_entropy(x_BSD, weight_WD, bias_W, targets_BS, self.loss, self.cap, columns)
        logits_BSW = capped(F.linear(x_BSD, weight_WD, bias_W), self.cap)
        whole = DTensor.from_local(logits_BSW, self.mesh, (Shard(2),), run_check=False).full_tensor()
        return whole[..., : self.vocab_size]

    def _columns(self, weight_WD: Tensor) -> Columns:
        """Of this rank, without the padding at the end."""
        start, group = self.mesh.get_local_rank() * len(weight_WD), self.mesh.get_group()
        width = min(len(weight_WD), max(0, self.vocab_size - start))
        return Columns(self.vocab_size, start, width, partial(_sum, group), partial(_largest, group))


def _sum(group: dist.ProcessGroup, parts: Tensor) -> Tensor:
    dist.all_reduce(parts, group=group)
    return parts


def _largest(group: dist.ProcessGroup, each: Tensor) -> Tensor:
    dist.all_reduce(each, dist.ReduceOp.MAX, group)
    return each


def _own_dropout(kernel: nn.Module, mesh: DeviceMesh) -> None:
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
