"""Compile the kernels that torch.compile generates for a GPU to machine code of sm_90, without a GPU.

For each case Dynamo and Inductor run as on an H200, forward and backward, on tensors without values, and Triton
compiles each configuration of each generated kernel. The program launches nothing and computes no value: it shows that
the toolchain accepts our code. It needs the CPU build of torch, g++ (fake_gpu.py), and a release of triton that fits
this torch. It does not cover libraries: cuBLAS, cuDNN, FlashAttention and NCCL.

Prints a JSON line per case: the numbers of `kernels` and of compiled `configurations`, and the `bytes` of machine code.
Exit code 1: a case compiles no kernel, or raises before its last kernel is compiled.

  pip install --target /tmp/triton --no-deps triton
  PYTHONPATH=/tmp/triton python benchmarks/gpu_compile.py
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._dynamo import device_interface
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._subclasses.fake_tensor import FakeTensorMode

import fake_gpu
from dist_llm.config.schema import Config
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.losses.fused_linear_cross_entropy import VocabShard, _losses_and_logit_grads_
from dist_llm.models.attention import materialize_mask
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from dist_llm.models.block import Block
from dist_llm.models.layer_context import LayerContext
from dist_llm.parallel.fp8 import Float8Linear
from named_models import make_named_config

TARGET = ("cuda", 90, 32)  # backend, compute capability of Hopper, threads of a warp
DEVICE = fake_gpu.DEVICE
# The properties of an H200 that Inductor reads.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=141 << 30,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
)
# After compilation the generated code raises this error, since there is no GPU to run it.
LAUNCH_ERROR = "compiled without support for the specified device"


class TritonDriverStub:
    """A replacement for the driver of Triton, which needs a GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGET)

    def get_current_device(self) -> int:
        return 0


@contextlib.contextmanager
def patch_toolchain(compiled: list[tuple[str, int]]) -> Iterator[None]:
    """Let Inductor compile as on an H200. `compiled` gets (kernel, bytes of machine code) of each configuration."""
    import triton
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    tuner = triton_heuristics.CachingAutotuner
    precompile_config = tuner._precompile_config

    def compile_and_record(self: Any, configuration: Any) -> Any:
        result = precompile_config(self, configuration)
        compiled.append((self.fn.__name__, len(result.kernel.asm["cubin"])))
        return result

    triton.runtime.driver.set_active(TritonDriverStub())
    patches: list[tuple[Any, str, Any]] = [
        (tuner, "_precompile_config", compile_and_record),
        (tuner, "_make_launchers", lambda self: None),
        (tuner, "_dynamic_scale_rblock", lambda self: None),
        (triton_heuristics.StaticTritonCompileResult, "can_statically_launch", staticmethod(lambda *options: None)),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        (joint_graph, "lazy_init", lambda *options: None),  # lazy_init runs its patterns on the device
        *device_patches(),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(patch.object(owner, name, value, create=True))
        # Compile in this process without caches, and compile backward together with forward, not at its first run.
        stack.enter_context(inductor.patch(compile_threads=1, joint_graph_constant_folding=False))
        stack.enter_context(inductor.patch(force_disable_caches=True))
        stack.enter_context(functorch.patch(force_non_lazy_backward_lowering=True))
        yield


def device_patches() -> Iterator[tuple[Any, str, Any]]:
    """Yield patches (owner, name, replacement) for functions of torch that query the driver."""
    gpu_stub: Any = SimpleNamespace(peak_bytes=0, reset_peak=None, resize=None)
    omitted_names = ("compile", "_fused_sdp_choice", "resize_", "Stream", "Event", "stream", "current_stream")
    replacements = {"is_initialized": lambda: False, "get_device_properties": lambda device=None: PROPERTIES}
    for owner, name, value in fake_gpu.iter_patches(gpu_stub):
        if name not in omitted_names:
            yield owner, name, replacements.get(name, value)
    yield torch.cuda, "get_rng_state", lambda device=None: torch.zeros(16, dtype=torch.uint8)
    yield torch.cuda, "set_rng_state", lambda state, device=None: None
    yield torch.cuda, "_exchange_device", lambda device: 0
    yield torch.cuda, "_maybe_exchange_device", lambda device: 0
    yield torch._C, "_cuda_getCurrentRawStream", lambda device: 0
    interface = {"get_device_properties": PROPERTIES, "get_compute_capability": TARGET[1], "is_available": True}
    interface |= {"current_device": 0, "is_triton_capable": True, "raise_if_triton_unavailable": None}
    interface |= dict.fromkeys(("set_device", "synchronize"), None)
    interface |= dict.fromkeys(("exchange_device", "maybe_exchange_device", "get_raw_stream"), 0)
    for name, answer in interface.items():
        yield device_interface.CudaInterface, name, staticmethod(lambda device=None, answer=answer: answer)
    for name, answer in (("get_device_properties", PROPERTIES), ("current_device", 0), ("set_device", None)):
        yield device_interface.CudaInterface.Worker, name, staticmethod(lambda device=None, answer=answer: answer)


def compile_loss(compiler: Callable[..., Any]) -> None:
    """Compile the loss and the gradients of one slice of the logits of llama-1b (1,024 tokens)."""
    logits_nW = torch.randn(1024, 128256, device=DEVICE)
    targets_n = torch.zeros(1024, dtype=torch.long, device=DEVICE)
    compiler(_losses_and_logit_grads_)(
        logits_nW,
        targets_n,
        CrossEntropy(),
        0.0,
        VocabShard(vocab_size=128256, first_token=0, num_tokens=128256),
        1.0,
    )


def compile_flex(compiler: Callable[..., Any], **fields: Any) -> None:
    """Compile FlexAttention with the heads of Llama 3 8B."""
    from torch.nn.attention.flex_attention import flex_attention

    shapes = ((2, 32, 1024, 128), (2, 8, 1024, 128), (2, 8, 1024, 128))
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    attention_mask = materialize_mask(AttentionMask(causal=True, **fields), (2, 1024, 1024), DEVICE, dense=False)
    compiler(flex_attention, dynamic=False)(
        q, k, v, block_mask=attention_mask.materialized, scale=None, enable_gqa=True
    )


def compile_block(compiler: Callable[..., Any], model: str, precision: str = "bf16", fp8: bool = False) -> None:
    """Compile a block of a named model (named_models.py) on 4 sequences of 1,024 tokens."""
    config: Config = make_named_config(model)
    with torch.device(DEVICE):
        block = Block(config.model, layer=0)
    for module in block.modules() if fp8 else ():
        if type(module) is nn.Linear:
            module.__class__ = Float8Linear
    x_BSD = torch.randn(4, 1024, config.model.d_model, device=DEVICE, requires_grad=True)
    angles = torch.randn(1024, config.model.head_dim // 2, device=DEVICE)
    rotation = (angles, angles) if config.model.positions == "rope" else None
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        compiler(block.forward)(x_BSD, LayerContext(CAUSAL, rotation))


# Each case is a function of the compiler, torch.compile.
CASES: dict[str, Callable[[Callable[..., Any]], None]] = {
    "the sliced loss": compile_loss,
    "FlexAttention, prefix": lambda compiler: compile_flex(compiler, prefix_B=torch.full((2,), 256, device=DEVICE)),
    "FlexAttention, documents": lambda compiler: compile_flex(
        compiler, documents_BT=(torch.arange(1024, device=DEVICE) // 256).expand(2, -1)
    ),
    "a block of llama-1b, bf16": lambda compiler: compile_block(compiler, "llama-1b"),
    "a block of llama-1b, fp32": lambda compiler: compile_block(compiler, "llama-1b", precision="fp32"),
    "a block of llama-1b, float8": lambda compiler: compile_block(compiler, "llama-1b", fp8=True),
    "a block of gpt2-124m, bf16": lambda compiler: compile_block(compiler, "gpt2-124m"),
}


def compile_case(name: str, compiler: Callable[..., Any]) -> dict[str, Any]:
    """Compile a case and return its row. The generated code then raises LAUNCH_ERROR, which is not an error here."""
    compiled: list[tuple[str, int]] = []
    error = "the generated code ran"
    torch._dynamo.reset()
    with patch_toolchain(compiled):
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                CASES[name](compiler)
        except Exception as raised:
            error = "" if LAUNCH_ERROR in str(raised) else f"{type(raised).__name__}: {raised}"[:2000]
    kernels = {kernel for kernel, _ in compiled}
    code_bytes = sum(kernel_bytes for _, kernel_bytes in compiled)
    return {"case": name, "kernels": len(kernels), "configurations": len(compiled), "bytes": code_bytes, "error": error}


def main() -> int:
    """Compile all cases and print a row for each."""
    if find_spec("triton") is None:
        print(
            "error: triton is missing: pip install --target DIR --no-deps triton, and PYTHONPATH=DIR", file=sys.stderr
        )
        return 2
    fake_gpu.preload()
    rows = []
    for name in CASES:
        rows.append(compile_case(name, torch.compile))
        print(json.dumps(rows[-1]), flush=True)
    return int(any(row["error"] or not row["kernels"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
