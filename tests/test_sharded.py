"""Local shards of a DTensor on four ranks are accessible without communication."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_llm.sharded import coordinate, full_shape, is_replicated_over, is_sharded, local_with_offset, to_local

RANK = 3  # (1, 1) in a mesh of 2 x 2


@pytest.fixture
def mesh():
    """A mesh of 2 x 2 ranks, seen from RANK, without communication."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("placements", "shape", "offset", "replicated"),
    [
        ((Shard(0), Shard(1)), (3, 4), (3, 4), set()),
        ((Shard(0), Shard(0)), (1, 8), (5, 0), set()),  # two rows on the first of each two, one on this
        ((Replicate(), Shard(1)), (6, 4), (0, 4), {"dp_shard"}),
        ((Shard(0), Replicate()), (3, 8), (3, 0), {"tp"}),
        ((Replicate(), Replicate()), (6, 8), (0, 0), {"dp_shard", "tp"}),
    ],
)
def test_a_dtensor_has_a_local_shard_with_offset(placements, shape, offset, replicated, mesh):
    full = torch.arange(48.0).view(6, 8)
    local = full[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    tensor = DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())
    with CommDebugMode() as messages:
        view, start = local_with_offset(tensor)
        assert view.data_ptr() == to_local(tensor).data_ptr() == local.data_ptr()
        assert start == offset
        assert full_shape(tensor) == (6, 8)
        assert is_sharded(tensor)
        assert {axis for axis in ("dp_shard", "tp", "pp") if is_replicated_over(tensor, axis)} == replicated
        assert (coordinate(mesh, "dp_shard"), coordinate(mesh, "tp")) == (1, 1)
    assert messages.get_total_counts() == 0


def test_a_plain_tensor_is_its_own_shard():
    tensor = torch.ones(2, 3)
    assert local_with_offset(tensor) == (tensor, (0, 0))
    assert to_local(tensor) is tensor
    assert (full_shape(tensor), is_sharded(tensor), is_replicated_over(tensor, "tp")) == ((2, 3), False, False)
    assert coordinate(None, "tp") == 0


def test_a_zero_3_parameter_is_sharded():
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_id, parameter.ds_shape = 0, torch.Size((4, 5))
    assert (full_shape(parameter), is_sharded(parameter)) == ((4, 5), True)
