"""A GPU that is not there, and ranks that are not: what a step would do on them, where there is a C++ compiler.

Tensors on it have a shape, a type and a device, but no values: of each operator its shape function alone is run. So a
step shows what it allocates and when (`Gpu.peak`), and fails where it mixes devices or asks for a value that is there.
What it does not show: numbers, time, what kernels need for themselves, and gaps in the allocator's memory. Blocks are
not compiled. Attention without a mask and FlexAttention take what FlashAttention takes; with a mask, all scores are
computed, which takes more than on a GPU. Collectives end at once, in torch's fake group.

torch's build for CPUs cannot go backward on a GPU, even on one without values. `preload` starts the program again with
a library that says there is one. Not a program: memory.py and tests/gpu/traced.py use it.
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
MARK = "DIST_LLM_PRETENDED_GPU"
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
    """Start this program again with a library in front of torch, unless it was; SystemExit where that cannot be."""
    if scratch := os.environ.pop(MARK, ""):
        del os.environ["LD_PRELOAD"]
        shutil.rmtree(scratch)
        return
    if torch.version.cuda is not None:
        raise SystemExit("error: a GPU is pretended by torch's CPU build alone, and this one is for CUDA")
    scratch, place = tempfile.mkdtemp(prefix="dist_llm_gpu_"), torch.__path__[0]
    source, library = Path(scratch) / "gpu.cpp", Path(scratch) / "gpu.so"
    source.write_text(SOURCE)
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{place}/include", str(source), "-o", str(library)]
    try:
        subprocess.run([*command, f"-L{place}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{place}/lib"], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(scratch)
        raise SystemExit(f"error: a pretended GPU needs g++, and it failed: {error}") from None
    environ = os.environ | {MARK: scratch, "LD_PRELOAD": str(library)}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)


class Gpu(TorchDispatchMode):
    """All that is asked of `DEVICE` while it is on. On the CPU, tensors are real."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.held: dict[int, int] = {}  # bytes of each storage that lives
        self.now = self.peak = 0
        self.at = ""  # the operator that made the peak, and whether it was in backward

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # of host memory: there is no driver to pin it
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # it comes back with what it holds
        flat = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(each, FakeTensor) or _is_gpu(each) for each in flat):
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(Tensor, self._known, (args, kwargs))
        with self.fake:
            found = func(*args, **kwargs)
        for each in pytree.tree_leaves(found):
            if isinstance(each, FakeTensor) and each.device.type == "cuda":
                self._hold(each.untyped_storage(), func)
        return found

    def reset_peak(self, device: Any = None) -> None:
        self.peak = self.now

    def _known(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _hold(self, storage: torch.UntypedStorage, func: Any) -> None:
        key = storage._cdata
        if key not in self.held:
            weakref.finalize(storage, self._resize, key, None)
        self._resize(key, storage.nbytes(), func)

    def _resize(self, key: int, size: int | None, func: Any = None) -> None:
        """`None`: it is gone."""
        change = (size or 0) - self.held.pop(key, 0)
        self.now += change
        if size is not None:
            self.held[key] = size
        if self.now > self.peak:
            self.peak = self.now
            self.at = f"{func}{', backward' if torch._C._current_graph_task_id() >= 0 else ''}"

    def resize(self, storage: torch.UntypedStorage, size: int) -> Any:
        """In place of UntypedStorage.resize_, by which FSDP frees and allocates."""
        found = RESIZE(storage, size)
        if storage._cdata in self.held:
            self._resize(storage._cdata, size, "resize_")
        return found


RESIZE, ATTENTION = torch.UntypedStorage.resize_, F.scaled_dot_product_attention


@contextlib.contextmanager
def gpu(ranks: int = 1) -> Iterator[Gpu]:
    """A GPU for a while, of the first of so many ranks."""
    there = Gpu()
    with contextlib.ExitStack() as patches:
        for owner, name, value in _patches(there):
            patches.enter_context(patch.object(owner, name, value))
        if ranks > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            patches.callback(dist.destroy_process_group)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is made on the CPU, and moved
        patches.callback(torch._C._set_only_lift_cpu_tensors, False)
        with there:
            yield there


def _patches(there: Gpu) -> Iterator[tuple[Any, str, Any]]:
    """What of torch asks the driver."""
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
    yield torch.cuda, "max_memory_allocated", lambda device=None: there.peak
    yield torch.cuda, "reset_peak_memory_stats", there.reset_peak
    yield torch.cuda, "set_sync_debug_mode", lambda mode: None  # whoever asks for a value has none
    yield torch.cuda, "Stream", _Stream
    yield torch.cuda, "Event", _Event
    yield torch.cuda, "current_stream", _Stream
    yield torch.cuda, "stream", lambda stream: contextlib.nullcontext()
    yield torch.accelerator, "current_stream", _Stream
    yield torch, "Event", _Event
    yield torch.version, "cuda", "12.8"
    yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    yield torch, "compile", _compile
    yield torch, "_fused_sdp_choice", lambda q, k, v, mask, *rest, **options: int(mask is None)  # flash, or else math
    yield Tensor, "record_stream", lambda tensor, stream: None
    yield Tensor, "pin_memory", lambda tensor: tensor
    yield torch.UntypedStorage, "resize_", lambda storage, size: there.resize(storage, size)
    yield nn.Module, "to_empty", _to_empty
    yield F, "scaled_dot_product_attention", _attention


class _Stream:
    """Work on it is done as soon as it is given."""

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
    """The function itself, but that of FlexAttention writes no whole scores."""
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
    """As torch's, which cannot swap what has no values."""
    made: dict[Any, nn.Parameter] = {}
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter.detach(), device=device))
                each._parameters[name] = made[parameter]
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = torch.empty_like(buffer, device=device)
    return module


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """FlashAttention where there is no mask but a causal one: torch's build for CPUs knows no kernel of a GPU."""
    if q.device.type != "cuda" or (isinstance(attn_mask, Tensor) and not isinstance(attn_mask, CausalBias)):
        return ATTENTION(q, k, v, attn_mask, dropout_p, **options)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (each.to(torch.get_autocast_dtype("cuda")) for each in (q, k, v))
    causal, scale = attn_mask is not None or options.get("is_causal", False), options.get("scale")
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, causal, scale=scale)
    return found[0]


def _is_gpu(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "cuda"
