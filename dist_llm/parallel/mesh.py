"""The device mesh of all ranks, and the collectives on its dimensions. An unused dimension has size 1."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dist_llm.compat import flatten_mesh, functional_collectives
from dist_llm.config.derive import AXES
from dist_llm.config.parallel_section import ParallelConfig
from dist_llm.parallel import p2p_collectives

# DATA_AXES: ranks that hold different tokens. SHARD_AXES: ranks over which FSDP shards a parameter.
DATA_AXES = ("dp_replicate", "dp_shard", "cp")
SHARD_AXES = ("dp_shard", "cp")


def build_mesh(parallel: ParallelConfig, device_type: str) -> DeviceMesh:
    """Build the mesh (pp, dp_replicate, dp_shard, cp, tp). tp is innermost, so its ranks share a node if possible."""
    return init_device_mesh(device_type, tuple(getattr(parallel, axis) for axis in AXES), mesh_dim_names=AXES)


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the two-dimensional mesh (replicas, shards) for FSDP.

    Context-parallel ranks hold equal weights and different tokens, like data-parallel ranks, so weights are sharded
    over both.
    """
    if mesh["cp"].size() == 1:
        return mesh["dp_replicate", "dp_shard"]
    flatten_mesh(mesh[SHARD_AXES], "dp_shard_cp")
    with warnings.catch_warnings():
        # torch offers no other way to slice a flattened dimension that keeps both dimensions on one root mesh.
        warnings.filterwarnings("ignore", "Slicing a flattened dim from root mesh")
        return mesh["dp_replicate", "dp_shard_cp"]


def all_reduce_over(value: Tensor, mesh: DeviceMesh, axes: Iterable[str]) -> Tensor:
    """Sum `value` in place over the ranks whose coordinates differ from those of this rank only in `axes`."""
    for axis in axes:
        if mesh[axis].size() > 1:
            dist.all_reduce(value, group=mesh.get_group(axis))
    return value


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the tensors [n, ...] of the p ranks of a group to [n p, ...], on all ranks of the group."""
    tensor = tensor.contiguous()
    if _uses_p2p(tensor):
        output = tensor.new_empty(group.size() * len(tensor), *tensor.shape[1:])
        local = output.chunk(group.size())[group.rank()].copy_(tensor)  # P2PAllGather gathers in place
        p2p_collectives.P2PAllGather()(output, local, group).wait()
        return output
    return functional_collectives.wait_tensor(
        functional_collectives.all_gather_into_tensor(tensor, group.size(), group.group_name)
    )


def reduce_scatter(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum the tensors [n, ...] of the p ranks of a group and return the shard of this rank, [n / p, ...]."""
    tensor = tensor.contiguous()
    if _uses_p2p(tensor):
        local = tensor.new_empty(len(tensor) // group.size(), *tensor.shape[1:])
        p2p_collectives.P2PReduceScatter()(local, tensor, group, dist.ReduceOp.SUM)
        return local
    return functional_collectives.wait_tensor(
        functional_collectives.reduce_scatter_tensor(tensor, "sum", group.size(), group.group_name)
    )


def all_reduce(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of the tensors of all ranks of a group, without changing the input."""
    if _uses_p2p(value) and len(value) % group.size() == 0:
        return all_gather(reduce_scatter(value, group), group)
    return functional_collectives.wait_tensor(
        functional_collectives.all_reduce(value.contiguous(), "sum", group.group_name)
    )


def differentiable_collective(
    x: Tensor, forward_fn: Callable[[Tensor], Tensor], backward_fn: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return `forward_fn(x)`, a collective.

    In backward, `backward_fn` maps the gradient of the output to that of `x`.
    """
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
    # The compiler cannot trace point-to-point messages.
    return not torch.compiler.is_compiling() and p2p_collectives.uses_p2p(tensor.device.type)


def all_gather_ints(value: int, device: torch.device) -> list[int]:
    """Return the values of all ranks of the default process group, by rank."""
    local = torch.tensor([value], device=device)
    by_rank = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(by_rank, local)
    return [int(rank_value) for rank_value in torch.cat(by_rank).tolist()]


def stage_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the process group of the ranks that hold the same layers."""
    if mesh["pp"].size() == 1:
        return dist.group.WORLD  # type: ignore[return-value]
    return flatten_mesh(mesh[AXES[1:]], "stage").get_group()
