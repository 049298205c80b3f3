"""The private interfaces of torch that the package uses. No other module may use a private interface.

They hold for torch 2.11 to 2.13 unless a comment says otherwise; `tests/test_compat.py` checks the name and the
signature of each in the installed torch. DeepSpeed's are in `dist_llm/engines/deepspeed_compat.py`, because only its
engine imports it. Heavy parts of torch are imported on first use.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from copy import copy
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, optim
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    _disable_current_modes as disable_current_modes,  # suspends dispatch modes, such as selective checkpointing's
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # no leading underscore, but in a private module

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["disable_current_modes", "is_traceable_wrapper_subclass", "pytree"]

# Collectives that return their output. The compiler can trace them, unlike those of torch.distributed.
functional_collectives = torch.ops._c10d_functional

scaled_mm = torch._scaled_mm  # a product of float8 matrices
foreach_norm = torch._foreach_norm  # of many tensors in few kernels
foreach_mul_ = torch._foreach_mul_


def shard_offset(tensor: "DTensor") -> tuple[int, ...]:
    """Return the offset of this rank's shard in the full tensor, without communication."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def copy_dtensor_spec(tensor: "DTensor") -> Any:
    """Return the spec with which `build_dtensor` makes another DTensor of the same layout."""
    return copy(tensor._spec)


def build_dtensor(local: Tensor, spec: Any) -> Tensor:
    """Return the DTensor whose shard on this rank is `local`. Unlike DTensor.from_local, it is not differentiable."""
    from torch.distributed.tensor import DTensor

    return DTensor(local, spec, requires_grad=False)


def flatten_mesh(mesh: "DeviceMesh", name: str) -> "DeviceMesh":
    """Return the mesh as one dimension of this name. Slices of the root mesh may then use the name."""
    return mesh._flatten(name)


class MappedAdamW(optim.AdamW):
    """torch's AdamW that steps `map_tensor` of each parameter, gradient and moment: a view of the same memory."""

    def map_tensor(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> Any:
        has_complex = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = map(self.map_tensor, tensors)
        return has_complex


def use_one_thread_per_gloo_group(interfaces: Iterable[str] = ()) -> None:
    """Create later gloo groups with one worker thread; torch would start two. `interfaces`: of GLOO_SOCKET_IFNAME.

    Two threads of a group that end an operation at the same time assign its name to one string without a lock
    (`lastCompletedWorkName` in ProcessGroupGloo::runLoop, seen with torch 2.13). That writes to freed memory, and a
    later allocation crashes: about one run in ten of 20 steps with tensor and pipeline ranks. Point-to-point messages
    do not use these threads.
    """
    base, names = dist.distributed_c10d.ProcessGroupGloo, tuple(interfaces)
    if getattr(base, "one_thread", False):
        return

    class SameInstances(type(base)):  # type: ignore[misc]
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, base)

    class OneThreadGloo(base, metaclass=SameInstances):  # type: ignore[misc, valid-type]
        one_thread = True

        def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
            options = base._Options()  # type: ignore[attr-defined]
            devices = [base.create_device(interface=name) for name in names] or [base.create_default_device()]
            options._devices, options._timeout, options._threads = devices, timeout, 1
            super().__init__(store, rank, size, options)

    dist.distributed_c10d.ProcessGroupGloo = OneThreadGloo  # type: ignore[misc]


def default_rendezvous_store() -> dist.Store:
    """Return the rendezvous store of the default process group, a key-value store that all ranks share."""
    return dist.distributed_c10d._get_default_store()


FLIGHT_RECORDER_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")  # of gloo; of NCCL, if the build has it


def read_flight_recorder() -> list[dict[str, Any]]:
    """Return the entries of torch's flight recorder: the newest collectives of this process."""
    entries = []
    for name in FLIGHT_RECORDER_DUMPS:
        with suppress(Exception):
            entries += json.loads(getattr(torch._C._distributed_c10d, name)())["entries"]
    return entries


def saved_by_selective_checkpoint(contexts: Any) -> dict[Any, list[Any]]:
    """Return the outputs that a selective forward saves, by operation.

    `contexts` is the result of `create_selective_checkpoint_contexts`. The dict is filled during the forward.
    """
    storage: dict[Any, list[Any]] = contexts[0].storage
    return storage


def saved_tensors(saved: dict[Any, list[Any]]) -> list[Any]:
    """Return the tensors of a dict that `saved_by_selective_checkpoint` returned."""
    return [getattr(leaf, "val", None) for leaf in pytree.tree_leaves(dict(saved))]


def set_activation_memory_budget(budget: float) -> None:
    """Set how much the compiler recomputes in later compilations. 0: all that it can; 1: only what is free."""
    from torch._functorch import config

    config.activation_memory_budget = budget


def fuse_collectives(graph_pass: Any, source_files: Iterable[str], group_name: Any) -> None:
    """Make the compiler fuse collectives of a group with matrix products, in later compilations.

    `graph_pass` is called with each graph first. Its results are cached as long as `source_files` do not change.
    Importing this part of the compiler takes a second, unless this torch has already imported it (2.13 has).
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    class GraphPass(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            graph_pass(graph)

        def uuid(self) -> Any:
            return get_hash_for_files(tuple(source_files))

    config._micro_pipeline_tp = True
    config.post_grad_custom_pre_pass = GraphPass()
    enable_symm_mem_for_group(group_name)  # still required, though torch marks it deprecated: ignore its FutureWarning
