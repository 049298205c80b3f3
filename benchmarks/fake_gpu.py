"""A fake GPU, on which a training step allocates memory as on a GPU but computes nothing. It needs a C++ compiler.

memory.py, gpu.py and tests/gpu/steps_on_fake_gpu.py use this module. Tensors on the fake GPU have a shape, a dtype and
a device, but no values: each operator runs only its shape function. A step shows what it allocates
(`FakeGpu.peak_bytes`) and fails if it mixes devices or reads a value. It does not show values, times, the workspace
memory of kernels, or fragmentation. Blocks are not compiled. Attention without a mask and FlexAttention allocate what
FlashAttention does. Attention with a mask computes all scores, which takes more memory than on a GPU. With several
ranks, the process is the first of them; collectives complete at once, in the fake process group of torch.

The CPU build of torch cannot run backward on a CUDA device, so `preload` restarts the program with a library that
reports a GPU.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.nn.attention.bias import CausalBias
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask, flex_attention
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
SCRATCH_VARIABLE = "DIST_LLM_FAKE_GPU"  # environment variable: the folder of the library, set by `preload`
# A device guard and CUDA hooks that report one GPU.
LIBRARY_SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device gpu(c10::DeviceType::CUDA, 0);

struct Guard : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return gpu; }
  c10::Device getDevice() const override { return gpu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, gpu); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return getStream(gpu); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
};

}  // namespace

using at::CUDAHooksArgs;
using at::CUDAHooksInterface;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);
"""


def preload() -> None:
    """Restart this program with the library of the fake GPU loaded before torch; return if it is already loaded.

    Raises SystemExit if torch is a CUDA build or the library cannot be compiled.
    """
    if scratch := os.environ.pop(SCRATCH_VARIABLE, ""):
        del os.environ["LD_PRELOAD"]
        shutil.rmtree(scratch)
        return
    if torch.version.cuda is not None:
        raise SystemExit("error: the fake GPU needs the CPU build of torch, but this is a CUDA build")
    scratch, torch_folder = tempfile.mkdtemp(prefix="dist_llm_gpu_"), torch.__path__[0]
    source, library = Path(scratch) / "gpu.cpp", Path(scratch) / "gpu.so"
    source.write_text(LIBRARY_SOURCE)
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", str(source), "-o", str(library)]
    try:
        subprocess.run(
            [*command, f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"], check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(scratch)
        raise SystemExit(f"error: the fake GPU needs g++, which failed: {error}") from None
    environ = os.environ | {SCRATCH_VARIABLE: scratch, "LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


class FakeGpu(TorchDispatchMode):
    """A dispatch mode that runs all operators on `DEVICE` without values; tensors on the CPU remain real.

    `allocated_bytes` is the memory in use, `peak_bytes` its highest value, and `peak_operator` the operator that
    reached the peak.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.storage_bytes: dict[int, int] = {}  # by the address of the storage
        self.allocated_bytes = self.peak_bytes = 0
        self.peak_operator = ""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # there is no driver to pin host memory
        if any(issubclass(tensor_type, DTensor) for tensor_type in types):
            return NotImplemented  # DTensor dispatches the operator again, on its local tensors
        inputs = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(value, FakeTensor) or _is_gpu(value) for value in inputs):
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, self._to_fake, (args, kwargs))
        with self.fake_mode:
            output = func(*args, **kwargs)
        for value in pytree.tree_leaves(output):
            if isinstance(value, FakeTensor) and value.device.type == "cuda":
                self._track(value.untyped_storage(), func)
        return output

    def reset_peak(self, device: Any = None) -> None:
        self.peak_bytes = self.allocated_bytes

    def _to_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake_mode.from_tensor(tensor)

    def _track(self, storage: torch.UntypedStorage, operator: Any) -> None:
        """Record the size of a storage, and its deletion when that happens."""
        address = storage._cdata
        if address not in self.storage_bytes:
            weakref.finalize(storage, self._record_size, address, None)
        self._record_size(address, storage.nbytes(), operator)

    def _record_size(self, address: int, num_bytes: int | None, operator: Any = None) -> None:
        """Record the new size of a storage; None if the storage was deleted."""
        self.allocated_bytes += (num_bytes or 0) - self.storage_bytes.pop(address, 0)
        if num_bytes is not None:
            self.storage_bytes[address] = num_bytes
        if self.allocated_bytes > self.peak_bytes:
            self.peak_bytes = self.allocated_bytes
            is_backward = torch._C._current_graph_task_id() >= 0
            self.peak_operator = f"{operator}{', backward' if is_backward else ''}"

    def resize(self, storage: torch.UntypedStorage, num_bytes: int) -> Any:
        """Resize a storage. Replaces UntypedStorage.resize_, with which FSDP frees and allocates."""
        result = TORCH_RESIZE(storage, num_bytes)
        if storage._cdata in self.storage_bytes:
            self._record_size(storage._cdata, num_bytes, "resize_")
        return result


TORCH_RESIZE, TORCH_ATTENTION = torch.UntypedStorage.resize_, F.scaled_dot_product_attention


@contextlib.contextmanager
def activate(ranks: int = 1) -> Iterator[FakeGpu]:
    """Use the fake GPU of rank 0 within the block; with several ranks, in a fake process group of that size."""
    gpu_mode = FakeGpu()
    with contextlib.ExitStack() as patches:
        for owner, name, value in iter_patches(gpu_mode):
            patches.enter_context(patch.object(owner, name, value))
        if ranks > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            patches.callback(dist.destroy_process_group)
        torch._C._set_only_lift_cpu_tensors(True)  # create torch.tensor(..., device=) on the CPU, then move it
        patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        with gpu_mode:
            yield gpu_mode


def iter_patches(gpu_mode: FakeGpu) -> Iterator[tuple[Any, str, Any]]:
    """Yield patches (owner, name, replacement) for functions of torch that query the driver."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30)
    yield torch.cuda, "is_available", lambda: True
    yield torch.cuda, "is_initialized", lambda: True
    yield torch.cuda, "_lazy_init", lambda: None
    yield torch.cuda, "device_count", lambda: 8
    yield torch.cuda, "current_device", lambda: 0
    yield torch.cuda, "set_device", lambda device: None
    yield torch.cuda, "manual_seed_all", lambda seed: None
    yield torch.cuda, "get_device_properties", lambda device=None: properties
    yield torch.cuda, "get_device_capability", lambda device=None: (9, 0)
    yield torch.cuda, "get_device_name", lambda device=None: properties.name
    yield torch.cuda, "synchronize", lambda device=None: None
    yield torch.cuda, "empty_cache", lambda: None
    yield torch.cuda, "mem_get_info", lambda device=None: (properties.total_memory, properties.total_memory)
    yield torch.cuda, "max_memory_allocated", lambda device=None: gpu_mode.peak_bytes
    yield torch.cuda, "reset_peak_memory_stats", gpu_mode.reset_peak
    yield torch.cuda, "set_sync_debug_mode", lambda mode: None  # reading a value raises here
    yield torch.cuda, "Stream", _Stream
    yield torch.cuda, "Event", _Event
    yield torch.cuda, "current_stream", _Stream
    yield torch.cuda, "stream", lambda stream: contextlib.nullcontext()
    yield torch.accelerator, "current_stream", _Stream
    yield torch, "Event", _Event
    yield torch.version, "cuda", "12.8"
    yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    yield torch, "compile", _compile
    yield torch, "_fused_sdp_choice", lambda q, k, v, mask, *rest, **options: int(mask is None)  # flash or math
    yield Tensor, "record_stream", lambda tensor, stream: None
    yield Tensor, "pin_memory", lambda tensor: tensor
    yield torch.UntypedStorage, "resize_", lambda storage, num_bytes: gpu_mode.resize(storage, num_bytes)
    yield nn.Module, "to_empty", _to_empty
    yield F, "scaled_dot_product_attention", _attention


class _Stream:
    """A CUDA stream on which work is complete as soon as it is queued."""

    device, device_index, device_type, stream_id, cuda_stream = DEVICE, 0, 1, 0, 0

    def __init__(self, *arguments: Any, **options: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...
    def is_capturing(self) -> bool:
        return False

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    """A CUDA event that has always happened."""

    def __init__(self, *arguments: Any, **options: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _compile(model: Any = None, **options: Any) -> Any:
    """Replace torch.compile: return the function itself, or for FlexAttention a function that allocates no scores."""
    if model is None:
        return _compile
    return _flex_attention if model is flex_attention else model


def _flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    scale: Any = None,
    enable_gqa: bool = False,
    return_aux: AuxRequest | None = None,
) -> Any:
    """Replace the compiled FlexAttention by FlashAttention, which allocates the same tensors."""
    if block_mask.kv_num_blocks.device.type != q.device.type:
        raise RuntimeError(f"the block mask is on {block_mask.kv_num_blocks.device}, and the queries on {q.device}")
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)
    return out if return_aux is None else (out, AuxOutput(lse=lse))


def _to_empty(module: nn.Module, *, device: Any, recurse: bool = True) -> nn.Module:
    """Replace nn.Module.to_empty, which cannot swap tensors without values."""
    new_parameters: dict[Any, nn.Parameter] = {}
    for submodule in module.modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None:
                if parameter not in new_parameters:
                    new_parameters[parameter] = nn.Parameter(torch.empty_like(parameter.detach(), device=device))
                submodule._parameters[name] = new_parameters[parameter]
        for name, buffer in submodule._buffers.items():
            if buffer is not None:
                submodule._buffers[name] = torch.empty_like(buffer, device=device)
    return module


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """Replace F.scaled_dot_product_attention: without a dense mask, use the shapes of FlashAttention.

    The CPU build of torch would not choose a kernel of a GPU.
    """
    if q.device.type != "cuda" or (isinstance(attn_mask, Tensor) and not isinstance(attn_mask, CausalBias)):
        return TORCH_ATTENTION(q, k, v, attn_mask, dropout_p, **options)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (q, k, v))
    is_causal, scale = attn_mask is not None or options.get("is_causal", False), options.get("scale")
    outputs = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)
    return outputs[0]


def _is_gpu(value: Any) -> bool:
    """Return whether a value is the GPU device."""
    return isinstance(value, torch.device) and value.type == "cuda"
