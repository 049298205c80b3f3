"""Access the local shards of sharded tensors, and the coordinates of this rank in a mesh, without communication."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist_llm.compat import shard_offset


def to_local(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor on this rank, in the same memory. Return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_with_offset(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return (the shard of a tensor on this rank, the offset of the shard in the full tensor)."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    return tensor.to_local(), shard_offset(tensor)


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of the full tensor, also of a parameter that ZeRO 3 of DeepSpeed has partitioned."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, or a parameter that ZeRO 3 of DeepSpeed partitions."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def is_replicated_over(tensor: Tensor, axis: str) -> bool:
    """Return whether the ranks along a mesh dimension hold equal copies of a DTensor.

    A tensor whose mesh has no such dimension is not replicated over it.
    """
    if not isinstance(tensor, DTensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or ()
    return axis in names and tensor.placements[names.index(axis)].is_replicate()


def coordinate(mesh: DeviceMesh | None, axis: str) -> int:
    """Return the coordinate of this rank along a mesh dimension; 0 without a mesh."""
    return mesh.get_local_rank(axis) if mesh is not None else 0
