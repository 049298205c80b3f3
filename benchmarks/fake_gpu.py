"""A fake GPU, and several fake ranks, so that a step shows what it would do there; this needs a C++ compiler.

Tensors on the fake GPU have a shape, a type and a device, but no values: of each operator only the shape function
runs. So a step shows what it allocates and when (`FakeGpu.peak`), and fails if it mixes devices or reads a value. It
does not show numbers, time, the memory that kernels need themselves, and gaps in the allocator's memory. Blocks are not
compiled. Attention without a mask and FlexAttention allocate what FlashAttention does; with a mask, all scores are
computed, which takes more memory than on a GPU. Collectives end at once, in torch's fake group.

torch's build for CPUs cannot run backward on a GPU, not even on one without values. `preload` restarts the program with
a library that reports a GPU. Not a program itself: memory.py and tests/gpu/traced.py use it.
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
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda", 0)
SCRATCH_VARIABLE = "DIST_LLM_FAKE_GPU"
SOURCE = """
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
    """Restart this program with a library loaded before torch, unless it was; SystemExit if that is not possible."""
    if scratch := os.environ.pop(SCRATCH_VARIABLE, ""):
        del os.environ["LD_PRELOAD"]
        shutil.rmtree(scratch)
        return
    if torch.version.cuda is not None:
        raise SystemExit("error: the fake GPU needs torch's CPU build, and this is a build for CUDA")
    scratch, torch_folder = tempfile.mkdtemp(prefix="dist_llm_gpu_"), torch.__path__[0]
    source, library = Path(scratch) / "gpu.cpp", Path(scratch) / "gpu.so"
    source.write_text(SOURCE)
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", str(source), "-o", str(library)]
    try:
        subprocess.run(
            [*command, f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"], check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(scratch)
        raise SystemExit(f"error: a fake GPU needs g++, and it failed: {error}") from None
    environ = os.environ | {SCRATCH_VARIABLE: scratch, "LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


class FakeGpu(TorchDispatchMode):
    """A mode that handles all operators on `DEVICE`; tensors on the CPU remain real."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.storage_bytes: dict[int, int] = {}  # of each existing storage
        self.now = self.peak = 0
        self.at = ""  # the operator at the peak, and whether it was in backward

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # there is no driver to pin host memory
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # its local tensors are dispatched again
        flat = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(each, FakeTensor) or _is_gpu(each) for each in flat):
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, self._to_fake, (args, kwargs))
        with self.fake:
            output = func(*args, **kwargs)
        for each in pytree.tree_leaves(output):
            if isinstance(each, FakeTensor) and each.device.type == "cuda":
                self._track(each.untyped_storage(), func)
        return output

    def reset_peak(self, device: Any = None) -> None:
        self.peak = self.now

    def _to_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _track(self, storage: torch.UntypedStorage, func: Any) -> None:
        key = storage._cdata
        if key not in self.storage_bytes:
            weakref.finalize(storage, self._resize, key, None)
        self._resize(key, storage.nbytes(), func)

    def _resize(self, key: int, size: int | None, func: Any = None) -> None:
        """Record the new size of a storage; `None` if it was deleted."""
        change = (size or 0) - self.storage_bytes.pop(key, 0)
        self.now += change
        if size is not None:
            self.storage_bytes[key] = size
        if self.now > self.peak:
            self.peak = self.now
            self.at = f"{func}{', backward' if torch._C._current_graph_task_id() >= 0 else ''}"

    def resize(self, storage: torch.UntypedStorage, size: int) -> Any:
        """Resize a storage, in place of UntypedStorage.resize_, by which FSDP frees and allocates."""
        result = RESIZE(storage, size)
        if storage._cdata in self.storage_bytes:
            self._resize(storage._cdata, size, "resize_")
        return result


RESIZE, ATTENTION = torch.UntypedStorage.resize_, F.scaled_dot_product_attention


@contextlib.contextmanager
def activate(ranks: int = 1) -> Iterator[FakeGpu]:
    """Use the fake GPU of the first of `ranks` ranks in the block."""
    gpu_mode = FakeGpu()
    with contextlib.ExitStack() as patches:
        for owner, name, value in _patches(gpu_mode):
            patches.enter_context(patch.object(owner, name, value))
        if ranks > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            patches.callback(dist.destroy_process_group)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is created on the CPU, and moved
        patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        with gpu_mode:
            yield gpu_mode


def _patches(gpu_mode: FakeGpu) -> Iterator[tuple[Any, str, Any]]:
    """Yield patches for the parts of torch that ask the driver."""
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
    yield torch.cuda, "max_memory_allocated", lambda device=None: gpu_mode.peak
    yield torch.cuda, "reset_peak_memory_stats", gpu_mode.reset_peak
    yield torch.cuda, "set_sync_debug_mode", lambda mode: None  # reads of values fail anyway
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
    yield torch.UntypedStorage, "resize_", lambda storage, size: gpu_mode.resize(storage, size)
    yield nn.Module, "to_empty", _to_empty
    yield F, "scaled_dot_product_attention", _attention


class _Stream:
    """A stream on which work is complete as soon as it is queued."""

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
    def __init__(self, *arguments: Any, **options: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _compile(model: Any = None, **options: Any) -> Any:
    """Return the function itself, but for FlexAttention one that allocates no full scores."""
    if model is None:
        return _compile
    return _flex if model is flex_attention else model


def _flex(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: Any = None, enable_gqa: bool = False
) -> Tensor:
    if block_mask.kv_num_blocks.device.type != q.device.type:
        raise RuntimeError(f"the block mask is on {block_mask.kv_num_blocks.device}, and the queries on {q.device}")
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)[0]


def _to_empty(module: nn.Module, *, device: Any, recurse: bool = True) -> nn.Module:
    """Do the same as torch's, which cannot swap tensors without values."""
    new_parameters: dict[Any, nn.Parameter] = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                if parameter not in new_parameters:
                    new_parameters[parameter] = nn.Parameter(torch.empty_like(parameter.detach(), device=device))
                each._parameters[name] = new_parameters[parameter]
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = torch.empty_like(buffer, device=device)
    return module


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """Use FlashAttention without a mask or with a causal one, since torch's build for CPUs has no kernels of a GPU."""
    if q.device.type != "cuda" or (isinstance(attn_mask, Tensor) and not isinstance(attn_mask, CausalBias)):
        return ATTENTION(q, k, v, attn_mask, dropout_p, **options)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (each.to(torch.get_autocast_dtype("cuda")) for each in (q, k, v))
    causal, scale = attn_mask is not None or options.get("is_causal", False), options.get("scale")
    outputs = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, causal, scale=scale)
    return outputs[0]


def _is_gpu(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"
