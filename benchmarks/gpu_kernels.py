"""Kernel checks of `gpu.py`: attention, the sliced loss and float8 matrix products, compared with plain arithmetic.

Shape suffixes: B, batch; S, queries; T, keys; H, heads; E, head dimension.
"""

from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from attention import MASKS, SDPA_BACKENDS, materialize_for_kernel
from dist_llm.losses import fused_linear_cross_entropy
from dist_llm.losses.cross_entropy import IGNORE_INDEX, CrossEntropy
from dist_llm.losses.fused_linear_cross_entropy import VocabShard, linear_cross_entropy
from dist_llm.models.attention import materialize_mask, scaled_dot_product
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from dist_llm.parallel import fp8
from gpu_context import CaseContext, Comparison, SkippedError

Heads = tuple[Tensor, ...]  # q [B, S, H, E], k and v [B, T, KV heads, E], and for the kernel "sinks" the sinks [H]
BATCH, SEQ_LEN, HEADS, KV_HEADS, HEAD_DIM = 2, 256, 4, 2, 64
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative to the largest expected value
# SDPA raises these errors if a backend does not support a mask, a dtype or a head dimension. Other errors are failures.
UNSUPPORTED_ERRORS = ("No available kernel", "No viable backend", "Invalid backend")
TENSORS = ("out", "q", "k", "v", "sinks")  # the output, and the tensors whose gradients are compared
REQUIRED_KERNELS = ("chosen", "math", "flex", "sinks")  # must support all masks


def check_attention(context: CaseContext, kernel: str, seq_len: int = SEQ_LEN) -> dict[str, object]:
    """Compare the output and gradients of a kernel with attention in fp64, for each mask.

    The kernel `chosen` is the one that the model chooses, and `sinks` the one that it chooses with attention sinks.
    """
    if kernel == "flex" and context.device_kind == "cpu":
        raise SkippedError("FlexAttention has no backward on a CPU")
    comparison, unsupported = Comparison(context), list[str]()
    kv_heads = HEADS if kernel == "efficient" else KV_HEADS  # the efficient kernel does not support grouped heads
    # {name: (mask, number of queries)}
    cases = {name: (make_mask(BATCH, seq_len, context.device), seq_len) for name, make_mask in MASKS.items()}
    if kernel != "flex":
        cases["last queries"] = (CAUSAL, seq_len // 4)  # as if a prompt is processed in chunks
    for dtype, tolerance in TOLERANCES.items():
        for name, (attention_mask, num_queries) in cases.items():
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            heads = _make_heads(seq_len, num_queries, kv_heads, dtype, context.device)
            if kernel == "sinks":
                heads = *heads, torch.linspace(-2, 2, HEADS, device=context.device).to(dtype).requires_grad_()
            try:
                actual = _compute_attention(kernel, heads, attention_mask)
            except RuntimeError as error:
                if kernel in REQUIRED_KERNELS or not any(text in str(error) for text in UNSUPPORTED_ERRORS):
                    raise
                unsupported.append(label)
                continue
            expected = _reference_attention(heads, attention_mask) if context.has_values else actual
            for tensor_name, actual_tensor, expected_tensor in zip(
                TENSORS[: len(actual)], actual, expected, strict=True
            ):
                comparison.check_close(f"{label} {tensor_name}", actual_tensor, expected_tensor, tolerance)
    if len(unsupported) == len(cases) * len(TOLERANCES):
        raise SkippedError("this kernel supports none of the masks on this device")
    return comparison.make_result(refused=unsupported)


def _make_heads(seq_len: int, num_queries: int, kv_heads: int, dtype: torch.dtype, device: torch.device) -> Heads:
    """Make random queries [B, num_queries, H, E], and keys and values [B, seq_len, kv_heads, E]."""
    generator = torch.Generator().manual_seed(0)

    def make_random(num_tokens: int, num_heads: int) -> Tensor:
        values = torch.randn(BATCH, num_tokens, num_heads, HEAD_DIM, generator=generator)
        return values.to(device, dtype).requires_grad_()

    return make_random(num_queries, HEADS), make_random(seq_len, kv_heads), make_random(seq_len, kv_heads)


def _compute_attention(kernel: str, heads: Heads, attention_mask: AttentionMask) -> tuple[Tensor, ...]:
    """Compute the output and the gradients of q, k, v and the sinks with a kernel."""
    q, k = heads[0], heads[1]
    shape = (len(q), q.shape[1], k.shape[1])
    with sdpa_kernel(SDPA_BACKENDS[kernel]) if kernel in SDPA_BACKENDS else nullcontext():
        mask = (
            materialize_mask(attention_mask, shape, q.device, dense=False, has_sinks=kernel == "sinks")
            if kernel in ("chosen", "sinks")
            else materialize_for_kernel(kernel, attention_mask, shape, q.device)
        )
        out = scaled_dot_product(q, k, heads[2], mask, dropout=0.0, sinks_H=heads[3] if kernel == "sinks" else None)
        return (out, *torch.autograd.grad(out, heads, _make_output_grad(out)))


def _make_output_grad(out: Tensor) -> Tensor:
    """Return a gradient of the output that is equal for all kernels."""
    indices = torch.arange(out.numel(), device=out.device, dtype=torch.float32)
    return torch.sin(indices).view(out.shape).to(out.dtype)


def _reference_attention(heads: Heads, attention_mask: AttentionMask) -> tuple[Tensor, ...]:
    """Compute the output and the gradients of q, k, v and the sinks by the formula of attention, in fp64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in heads]
    q, k, v, *sinks = exact
    S, T, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    b, s, t = (torch.arange(size, device=q.device) for size in (len(q), S, T))
    allowed_BST = attention_mask.allows(S, T, b[:, None, None], s[None, :, None], t).expand(len(q), S, T)
    k_BTHE, v_BTHE = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores_BHST = torch.einsum("bshe,bthe->bhst", q, k_BTHE) * q.shape[-1] ** -0.5
    scores_BHST = scores_BHST.masked_fill(~allowed_BST[:, None], -torch.inf)
    sinks_BHS1 = [sinks_H[:, None, None].expand(len(q), -1, S, 1) for sinks_H in sinks]
    weights_BHST = torch.cat((scores_BHST, *sinks_BHS1), dim=-1).softmax(-1)[..., :T]
    out = torch.einsum("bhst,bthe->bshe", weights_BHST, v_BTHE)
    return (out, *torch.autograd.grad(out, exact, _make_output_grad(out)))


def check_loss(context: CaseContext) -> dict[str, object]:
    """Compare the sliced loss and its gradients with a loss over all logits in fp64 on the CPU.

    Each dtype is checked without a logit cap and with one.
    """
    comparison = Comparison(context)
    generator, device = torch.Generator().manual_seed(0), context.device
    x, weight = torch.randn(2, 96, 64, generator=generator), torch.randn(512, 64, generator=generator) / 8
    targets = torch.randint(500, (2, 96), generator=generator)
    targets[0, :7] = IGNORE_INDEX
    loss, slice_bytes = CrossEntropy(label_smoothing=0.1, z_loss=1e-3), 40 * 512 * 4  # five slices
    for cap in (0.0, 5.0):
        expected = _full_logits_loss(x.double(), weight.double(), targets, loss, cap)
        for dtype, tolerance in TOLERANCES.items():
            inputs = x.to(device).requires_grad_(), weight.to(device).requires_grad_()
            autocast = torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()
            with patch.dict(fused_linear_cross_entropy.SLICE_BYTES, {device.type: slice_bytes}), autocast:
                vocab_shard = VocabShard(vocab_size=500, first_token=0, num_tokens=500)
                losses_B = linear_cross_entropy(*inputs, None, targets.to(device), loss, cap, vocab_shard)
            actual = (losses_B, *torch.autograd.grad(losses_B.sum(), inputs))
            label = f"{str(dtype).removeprefix('torch.')} cap {cap:g}"
            for name, actual_tensor, expected_tensor in zip(("losses", "x", "weight"), actual, expected, strict=True):
                comparison.check_close(f"{label} {name}", actual_tensor, expected_tensor, tolerance)
    return comparison.make_result()


def _full_logits_loss(x: Tensor, weight: Tensor, targets: Tensor, loss: CrossEntropy, cap: float) -> tuple[Tensor, ...]:
    """Compute the loss of each sequence, and the gradients of their sum for x and weight, over all logits at once."""
    x, weight = x.requires_grad_(), weight.requires_grad_()
    logits = F.linear(x, weight[:500])
    logits = cap * torch.tanh(logits / cap) if cap else logits
    losses = F.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="none",
        label_smoothing=loss.label_smoothing,
    ).view(targets.shape)
    losses = losses + loss.z_loss * logits.logsumexp(-1).square() * (targets != IGNORE_INDEX)
    return (losses.sum(-1), *torch.autograd.grad(losses.sum(), (x, weight)))


def check_fp8(context: CaseContext, tokens: int) -> dict[str, object]:
    """Compare float8 matrix products, forward and both gradients, with emulated float8 products and with fp32.

    The emulated products must agree within one bf16 rounding (2^-8) plus the error of the sums on Hopper, 2^-11 of the
    sum of absolute summands. The fp32 products must agree within 10%.
    """
    comparison, generator = Comparison(context), torch.Generator().manual_seed(0)
    fp8.check_float8_support(context.device)
    shapes_and_stds = (((tokens, 256), 1e-2), ((512, 256), 2e-2), ((tokens, 512), 1e-5))
    factors = [(std * torch.randn(shape, generator=generator)).bfloat16() for shape, std in shapes_and_stds]
    x, w, g = (factor.to(context.device) for factor in factors)
    products = _compute_products(x, w, g)
    with patch.object(fp8, "scaled_matmul", fp8.emulate_scaled_matmul):
        emulated_products = _compute_products(x, w, g)
    fp32_products = x.float() @ w.float().t(), g.float() @ w.float(), g.float().t() @ x.float()
    absolute_sums = x.abs() @ w.abs().t(), g.abs() @ w.abs(), g.abs().t() @ x.abs()
    for name, actual, emulated, exact, absolute_sum in zip(
        ("y", "x", "w"), products, emulated_products, fp32_products, absolute_sums, strict=True
    ):
        if context.has_values:
            allowed = 2.0**-8 * emulated.float().abs() + 2.0**-11 * absolute_sum.float()
            error_ratio = ((actual - emulated).float().abs() / allowed.clamp(min=1e-30)).max().item()
            comparison.check_at_most(f"{name}, error over the allowed error of the emulation", error_ratio, 1.0)
            relative_error = ((actual.float() - exact).norm() / exact.norm()).item()
            comparison.check_at_most(f"{name}, compared with fp32", relative_error, 0.1)
        else:
            comparison.check_close(name, actual, exact, 0.1)
    return comparison.make_result()


def _compute_products(x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    """Compute y = x w^T, and the gradients of x and w; g is the gradient of y."""
    inputs, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = fp8.float8_linear(inputs, weight)
    return [y.detach(), *torch.autograd.grad(y, (inputs, weight), g)]
