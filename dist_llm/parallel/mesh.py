"""The device mesh of all ranks, and the collectives over its axes.

"Axis" means a dimension of the mesh, as in the config rules. All axes of config/derive.py:AXES exist; an unused axis
has size 1. The constants `..._AXES` say along which axes ranks differ, for each purpose. Two meshes are derived from
the mesh of all ranks:

- `get_fsdp_mesh`: replicas and shards of the weights, for FSDP (fsdp.py).
- `get_stage_group`: the ranks of one pipeline stage, for Muon (distributed_muon.py).

Experts have a second mesh over the same ranks, `build_expert_mesh`.

As in torch, a function whose name ends in `_` changes its argument. The other functions return a new tensor.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
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

BATCH_AXES = ("dp_replicate", "dp_shard")  # ranks read different samples
TOKEN_AXES = (*BATCH_AXES, "cp")  # ranks hold different tokens
LOSS_AXES = ("pp", *TOKEN_AXES)  # the loss is a sum over these ranks, of which those without the last stage have none
ROUTER_AXES = (*LOSS_AXES, "tp")  # ranks route different tokens, or hold different layers
FSDP_AXES = ("dp_shard", "cp")  # FSDP shards parameters over these ranks
PARAMETER_AXES = ("pp", *FSDP_AXES, "tp")  # ranks hold different parameters, or different shards of them
STAGE_AXES = (*TOKEN_AXES, "tp")  # ranks hold the same layers
EXPERT_SHARD_AXIS = "expert_shard"  # the axis of the expert mesh along which FSDP shards the experts of a rank


def build_mesh(parallel: ParallelConfig, device_type: str) -> DeviceMesh:
    """Build the mesh (pp, dp_replicate, dp_shard, cp, tp). tp is innermost, so its ranks share a node if possible."""
    return init_device_mesh(device_type, tuple(getattr(parallel, axis) for axis in AXES), mesh_dim_names=AXES)


def build_expert_mesh(parallel: ParallelConfig, device_type: str) -> DeviceMesh:
    """Build the mesh (pp, dp_replicate, expert_shard, ep) of the experts, over the same ranks as `build_mesh`.

    The dp_shard x cp x tp ranks of a stage are split into groups of ep neighbors. The ranks of a group hold different
    experts, and FSDP shards the experts of a rank over expert_shard, the groups.
    """
    num_ranks = parallel.dp_shard * parallel.cp * parallel.tp
    sizes = (parallel.pp, parallel.dp_replicate, num_ranks // parallel.ep, parallel.ep)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("pp", "dp_replicate", EXPERT_SHARD_AXIS, "ep"))


def get_fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the mesh for FSDP, with the axes (replicas, shards).

    Context-parallel ranks hold equal weights and different tokens, like data-parallel ranks, so weights are sharded
    over both.
    """
    if mesh["cp"].size() == 1:
        return mesh["dp_replicate", "dp_shard"]
    flatten_mesh(mesh[FSDP_AXES], "dp_shard_cp")
    with warnings.catch_warnings():
        # FSDP requires that both axes come from one root mesh. To slice a flattened axis from the root mesh is the only
        # way to get there, but torch warns about it.
        warnings.filterwarnings("ignore", "Slicing a flattened dim from root mesh")
        return mesh["dp_replicate", "dp_shard_cp"]


def rank_and_size(mesh: DeviceMesh | None, axes: Sequence[str]) -> tuple[int, int]:
    """Return (the rank of this process among the ranks along `axes`, their number). The last axis varies fastest."""
    rank, size = 0, 1
    if mesh is None:
        return rank, size
    for axis in axes:
        axis_size = mesh[axis].size()
        rank, size = rank * axis_size + mesh.get_local_rank(axis), size * axis_size
    return rank, size


def all_reduce_over_axes_(value: Tensor, mesh: DeviceMesh, axes: Iterable[str]) -> Tensor:
    """Sum `value` in place over `axes`, and return it.

    The sum is over the ranks whose coordinates on all other axes equal those of this rank.
    """
    for axis in axes:
        if mesh[axis].size() > 1:
            dist.all_reduce(value, group=mesh.get_group(axis))
    return value


def number_to_tensor(number: float, device: torch.device) -> Tensor:
    """Return a number as a tensor, [], in int64 or fp64.

    torch.full fills on the device. A copy of a host tensor would synchronize.
    """
    return torch.full((), number, dtype=torch.int64 if isinstance(number, int) else torch.float64, device=device)


def all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Concatenate the tensors [n, ...] of the p ranks of a group to [n p, ...], on all ranks of the group."""
    tensor = tensor.contiguous()
    if _can_send_p2p(tensor):
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
    if _can_send_p2p(tensor):
        local = tensor.new_empty(len(tensor) // group.size(), *tensor.shape[1:])
        p2p_collectives.P2PReduceScatter()(local, tensor, group, dist.ReduceOp.SUM)
        return local
    return functional_collectives.wait_tensor(
        functional_collectives.reduce_scatter_tensor(tensor, "sum", group.size(), group.group_name)
    )


def all_reduce(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of the tensors of all ranks of a group, without changing the input."""
    if _can_send_p2p(value) and len(value) % group.size() == 0:
        return all_gather(reduce_scatter(value, group), group)
    return functional_collectives.wait_tensor(
        functional_collectives.all_reduce(value.contiguous(), "sum", group.group_name)
    )


def all_to_all_rows(x: Tensor, num_sent: list[int], num_received: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send the next num_sent[rank] rows of `x` to each rank; return num_received[rank] rows of each rank."""
    if torch.compiler.is_compiling():
        # On torch 2.11 a compiled `dist.all_to_all_single`, which writes in place, gives zero gradients.
        output: Tensor = functional_collectives.wait_tensor(
            functional_collectives.all_to_all_single(x.contiguous(), num_received, num_sent, group.group_name)
        )
        return output
    received = x.new_empty(sum(num_received), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), num_received, num_sent, group=group)
    return received


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


def _can_send_p2p(tensor: Tensor) -> bool:
    """Return whether collectives of `tensor` are point-to-point messages. The compiler cannot trace messages."""
    return not torch.compiler.is_compiling() and p2p_collectives.uses_p2p(tensor.device.type)


def all_gather_ints(value: int, device: torch.device) -> list[int]:
    """Return the values of all ranks of the default process group, by rank."""
    local = torch.tensor([value], device=device)
    by_rank = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(by_rank, local)
    return [int(rank_value) for rank_value in torch.cat(by_rank).tolist()]


def get_stage_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return the process group of the ranks that hold the same layers."""
    if mesh["pp"].size() == 1:
        return dist.group.WORLD  # type: ignore[return-value]
    return flatten_mesh(mesh[STAGE_AXES], "stage").get_group()
