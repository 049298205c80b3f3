"""All uses of private interfaces of torch. No other module may use a private interface of torch.

The interfaces exist in torch 2.11 to 2.13 unless a comment says otherwise. `tests/test_compat.py` checks the name and
signature of each in the installed torch. `dist_llm/engines/deepspeed_compat.py` has those of DeepSpeed. Parts of torch
that are slow to import are imported on first use.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from copy import copy
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    _disable_current_modes as disable_current_modes,  # suspends dispatch modes, such as that of selective checkpointing
)
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # no leading underscore, but in a private module

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["disable_current_modes", "is_traceable_wrapper_subclass", "pytree"]

# Collectives that return their output. The compiler can trace them, unlike those of torch.distributed.
functional_collectives = torch.ops._c10d_functional

scaled_mm = torch._scaled_mm  # product of float8 matrices
# Attention on a CPU, which also returns the log-sum-exp of the scores, and its gradients.
cpu_flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_flash_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
foreach_norm = torch._foreach_norm  # norms of many tensors in few kernels
foreach_mul_ = torch._foreach_mul_  # product of many tensors with one scalar, in place


def shard_offset(tensor: "DTensor") -> tuple[int, ...]:
    """Return the offset of the shard of this rank in the full tensor, without communication."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def copy_dtensor_spec(tensor: "DTensor") -> Any:
    """Return a copy of the layout of a DTensor, for `build_dtensor`."""
    return copy(tensor._spec)


def build_dtensor(local: Tensor, spec: Any) -> Tensor:
    """Return the DTensor whose shard on this rank is `local`. Unlike DTensor.from_local, this is not differentiable."""
    from torch.distributed.tensor import DTensor

    return DTensor(local, spec, requires_grad=False)


def flatten_mesh(mesh: "DeviceMesh", name: str) -> "DeviceMesh":
    """Flatten a mesh to one dimension `name`. Slices of the root mesh may then use that name."""
    return mesh._flatten(name)


def fully_shard_on_two_meshes(
    module: nn.Module, mesh: "DeviceMesh", inner: nn.Module, inner_mesh: "DeviceMesh", **options: Any
) -> None:
    """Apply FSDP to `module`: the parameters of its submodule `inner` over `inner_mesh`, the others over `mesh`.

    From torch 2.12 on this is one FSDP module. Before, `inner` is an FSDP module inside of `module`, with which torch
    2.13 cannot recompute activations selectively.
    """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.fsdp._fully_shard import _fsdp_common, _fsdp_init
    from torch.distributed.tensor import Shard

    if not hasattr(_fsdp_common, "ShardPlacementResult"):
        fully_shard(inner, mesh=inner_mesh, **options)
        fully_shard(module, mesh=mesh, **options)
        return
    inner_params = set(inner.parameters())
    inner_info: Any = _fsdp_init._get_mesh_info(inner_mesh, None)
    placement = _fsdp_common.ShardPlacementResult(Shard(0), inner_info)
    fully_shard(
        module,
        mesh=mesh,
        shard_placement_fn=lambda parameter: placement if parameter in inner_params else None,
        **options,
    )


def set_sharded_collectives(module: Any, all_gather: Any, reduce_scatter: Any) -> None:
    """Replace the collectives of an FSDP module on each of its meshes that has more than one shard.

    `set_custom_all_gather` of torch refuses a module with two meshes.
    """
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        if group is not None and group.mesh_info.shard_mesh_size > 1:
            group._all_gather_comm, group._reduce_scatter_comm = all_gather, reduce_scatter


class MappedAdamW(optim.AdamW):
    """AdamW of torch that steps `map_tensor(tensor)` of each parameter, gradient and moment.

    `map_tensor` returns a view of the same memory, such as the local shard of a DTensor.
    """

    def map_tensor(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def _init_group(self, group: dict[str, Any], *lists: list[Any]) -> Any:
        has_complex = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        for tensors in lists:
            tensors[:] = map(self.map_tensor, tensors)
        return has_complex


def use_one_thread_per_gloo_group(interfaces: Iterable[str] = ()) -> None:
    """Create later gloo groups with one worker thread, where torch would start two.

    `interfaces` are the network interfaces in GLOO_SOCKET_IFNAME. Two threads of a group that end an operation at the
    same time assign its name to a string without a lock (`lastCompletedWorkName` in ProcessGroupGloo::runLoop, seen
    with torch 2.13). This writes to freed memory, and a later allocation crashes, in about one of ten
    runs of 20 steps with tensor and pipeline parallelism. Point-to-point messages do not use these threads.
    """
    base, interface_names = dist.distributed_c10d.ProcessGroupGloo, tuple(interfaces)
    if getattr(base, "one_thread", False):
        return

    class SameInstances(type(base)):  # type: ignore[misc]
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, base)

    class OneThreadGloo(base, metaclass=SameInstances):  # type: ignore[misc, valid-type]
        one_thread = True

        def __init__(
            self, store: dist.Store, rank: int, size: int, timeout: timedelta, enable_reconfigure: bool = False
        ) -> None:
            options: Any = base._Options()  # type: ignore[attr-defined]
            if enable_reconfigure:  # torch 2.14
                options.enable_reconfigure = True
            devices = [base.create_device(interface=name) for name in interface_names] or [base.create_default_device()]
            options._devices, options._timeout, options._threads = devices, timeout, 1
            super().__init__(store, rank, size, options)

    dist.distributed_c10d.ProcessGroupGloo = OneThreadGloo  # type: ignore[misc]


def get_default_rendezvous_store() -> dist.Store:
    """Return the rendezvous store of the default process group, a key-value store that all ranks share."""
    return dist.distributed_c10d._get_default_store()


FLIGHT_RECORDER_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")  # functions for gloo; for NCCL builds


def read_flight_recorder() -> list[dict[str, Any]]:
    """Return the entries of the flight recorder of torch: the latest collectives of this process."""
    entries = []
    for name in FLIGHT_RECORDER_DUMPS:
        with suppress(Exception):
            entries += json.loads(getattr(torch._C._distributed_c10d, name)())["entries"]
    return entries


def saved_by_selective_checkpoint(contexts: Any) -> dict[Any, list[Any]]:
    """Return the outputs {operation: outputs} that a selective forward pass saves.

    `contexts` is the result of `create_selective_checkpoint_contexts`. The forward pass fills the dict.
    """
    storage: dict[Any, list[Any]] = contexts[0].storage
    return storage


def saved_tensors(saved: dict[Any, list[Any]]) -> list[Any]:
    """Return the tensors in the result of `saved_by_selective_checkpoint`."""
    return [getattr(leaf, "val", None) for leaf in pytree.tree_leaves(dict(saved))]


def set_activation_memory_budget(budget: float) -> None:
    """Set how much the compiler recomputes in later compilations, from 0 (all it can) to 1 (only what is free)."""
    from torch._functorch import config

    config.activation_memory_budget = budget


def trace_sizes_from_tensors() -> None:
    """Let the compiler trace `tensor.tolist()`, so that a block whose shapes depend on data stays one graph."""
    import torch._dynamo.config

    torch._dynamo.config.capture_scalar_outputs = True


def fuse_collectives(graph_pass: Any, source_files: Iterable[str], group_name: Any) -> None:
    """Make the compiler fuse collectives of a group with matrix products, in later compilations.

    Before that, the compiler calls `graph_pass` with each graph. The compiler caches results as long as `source_files`
    do not change. Importing this part of the compiler takes 1 s, unless torch has already imported it, as 2.13 does.
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
    enable_symm_mem_for_group(group_name)  # required, although torch marks it deprecated
