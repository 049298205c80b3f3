"""Views of sharded tensors: a rank's shard of a full tensor, and the rank's coordinates. Nothing here communicates."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dist_llm.compat import shard_offset


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, in the same memory; return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_with_offset(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's shard of a tensor and the shard's offset in the full tensor."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    return tensor.to_local(), shard_offset(tensor)


def full_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of the full tensor, also of parameters that DeepSpeed's ZeRO 3 leaves empty."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor or a parameter that DeepSpeed's ZeRO 3 partitions."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def is_sharded_over(tensor: Tensor, axis: str) -> bool:
    """Return whether the ranks of a mesh dimension hold different shards of a tensor."""
    if not isinstance(tensor, DTensor):
        return False
    names = tensor.device_mesh.mesh_dim_names or ()
    return axis in names and not tensor.placements[names.index(axis)].is_replicate()


def coordinate(mesh: DeviceMesh | None, axis: str) -> int:
    """Return this rank's coordinate in a mesh dimension; 0 without a mesh."""
    return mesh.get_local_rank(axis) if mesh is not None else 0
