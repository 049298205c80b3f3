"""The ranks as a grid, and what they say to each other. Every axis is always there, of size 1 where it is not used."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_llm.config.derive import AXES
from dist_llm.config.schema import ParallelConfig
from dist_llm.parallel import p2p_collectives

# Ranks that hold different tokens; ranks over which FSDP cuts a parameter into shards.
DATA_AXES = ("dp_replicate", "dp_shard", "cp")
SHARD_AXES = ("dp_shard", "cp")

functional_collectives = torch.ops._c10d_functional


def build_mesh(parallel: ParallelConfig, device_type: str) -> DeviceMesh:
    """`pp, dp_replicate, dp_shard, cp, tp`, tensor innermost: its ranks are neighbours on one node."""
    return init_device_mesh(device_type, tuple(getattr(parallel, axis) for axis in AXES), mesh_dim_names=AXES)


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """(replicas, shards): what FSDP works on.

    Context ranks hold equal weights and different tokens, as data ranks do: weights are sharded over both at once.
    """
    if mesh["cp"].size() == 1:
        return mesh["dp_replicate", "dp_shard"]
    mesh[SHARD_AXES]._flatten("dp_shard_cp")
    with warnings.catch_warnings():
        # The slice of a flattened axis is to be had in no other way that leaves both on one root mesh.
        warnings.filterwarnings("ignore", "Slicing a flattened dim from root mesh")
        return mesh["dp_replicate", "dp_shard_cp"]


def all_reduce_over(value: Tensor, mesh: DeviceMesh, axes: Iterable[str]) -> Tensor:
    """`value` added up, in place, over the ranks that differ from this one in `axes` alone."""
    for axis in axes:
        if mesh[axis].size() > 1:
            dist.all_reduce(value, group=mesh.get_group(axis))
    return value


def all_gather(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' parts [n, ...], one after another: [n p, ...]."""
    part = part.contiguous()
    if _uses_p2p(part):
        output = part.new_empty(group.size() * len(part), *part.shape[1:])
        local = output.chunk(group.size())[group.rank()].copy_(part)
        p2p_collectives.P2PAllGather()(output, local, group).wait()
        return output
    return functional_collectives.wait_tensor(
        functional_collectives.all_gather_into_tensor(part, group.size(), group.group_name)
    )


def reduce_scatter(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part [n / p, ...] of the sum of what the ranks have, [n, ...]."""
    parts = parts.contiguous()
    if _uses_p2p(parts):
        local = parts.new_empty(len(parts) // group.size(), *parts.shape[1:])
        p2p_collectives.P2PReduceScatter()(local, parts, group, dist.ReduceOp.SUM)
        return local
    return functional_collectives.wait_tensor(
        functional_collectives.reduce_scatter_tensor(parts, "sum", group.size(), group.group_name)
    )


def all_reduce(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of what the ranks have, on all of them."""
    if _uses_p2p(value) and len(value) % group.size() == 0:
        return all_gather(reduce_scatter(value, group), group)
    return functional_collectives.wait_tensor(
        functional_collectives.all_reduce(value.contiguous(), "sum", group.group_name)
    )


def differentiable_collective(
    x: Tensor, forward_fn: Callable[[Tensor], Tensor], backward_fn: Callable[[Tensor], Tensor]
) -> Tensor:
    """forth(x), what ranks say to each other; its gradient goes `back`."""
    return _DifferentiableCollective.apply(x, forward_fn, backward_fn)  # type: ignore[no-untyped-call]


class _DifferentiableCollective(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, forward_fn: Callable[[Tensor], Tensor], backward_fn: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.backward_fn = backward_fn
        return forward_fn(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.backward_fn(grad), None, None


def _uses_p2p(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and p2p_collectives.uses_p2p(
        tensor.device.type
    )  # a compiler knows no messages


def all_gather_ints(value: int, device: torch.device) -> list[int]:
    """The value of every rank of the default group."""
    local = torch.tensor([value], device=device)
    by_rank = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(by_rank, local)
    return [int(each) for each in torch.cat(by_rank).tolist()]


def to_local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_with_offset(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's share of a tensor, and where in the whole it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), offset


def stage_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """The ranks that hold the same layers."""
    if mesh["pp"].size() == 1:
        return dist.group.WORLD  # type: ignore[return-value]
    return mesh[AXES[1:]]._flatten("stage").get_group()
