"""The ranks as a grid. Every axis is always there, of size 1 where it is not used."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dist_llm.config.check import AXES
from dist_llm.config.schema import ParallelConfig


def build_mesh(parallel: ParallelConfig, device_type: str) -> DeviceMesh:
    """`pp, dp_replicate, dp_shard, cp, tp`, tensor innermost: its ranks are neighbours on one node."""
    return init_device_mesh(device_type, tuple(getattr(parallel, axis) for axis in AXES), mesh_dim_names=AXES)
