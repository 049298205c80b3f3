"""Kernel checks of `gpu.py`: attention, the sliced loss and products in float8, compared with plain arithmetic."""

from contextlib import nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from attention import MASKS, SDPA, Heads, mask_for
from dist_llm.losses import fused_linear_cross_entropy
from dist_llm.losses.cross_entropy import IGNORE_INDEX, CrossEntropy
from dist_llm.losses.fused_linear_cross_entropy import VocabShard, linear_cross_entropy
from dist_llm.models.attention import materialize_mask, scaled_dot_product
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from dist_llm.parallel import fp8
from gpu_context import Comparison, Context, SkippedError

ROWS, SEQ_LEN, HEADS, KV_HEADS, HEAD_DIM = 2, 256, 4, 2, 64
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Errors of SDPA if a backend does not support a mask, a dtype or a head dimension; others are failures.
UNSUPPORTED_ERRORS = ("No available kernel", "No viable backend", "Invalid backend")
REQUIRED = ("chosen", "math", "flex")  # must take every mask


def check_attention(context: Context, kernel: str, seq_len: int = SEQ_LEN) -> dict[str, object]:
    """Compare a kernel's output and gradients with attention in fp64, for each mask; `chosen` is the model's choice."""
    if kernel == "flex" and context.kind == "cpu":
        raise SkippedError("FlexAttention has no backward on a CPU")
    comparison, unsupported = Comparison(context), list[str]()
    kv_heads = HEADS if kernel == "efficient" else KV_HEADS  # it does not support groups
    cases = {name: (make(ROWS, seq_len, context.device), seq_len) for name, make in MASKS.items()}
    if kernel != "flex":
        cases["last queries"] = (CAUSAL, seq_len // 4)  # queries at the last positions only: a prompt in chunks
    for dtype, tolerance in TOLERANCES.items():
        for name, (attention_mask, queries) in cases.items():
            what = f"{name} {str(dtype).removeprefix('torch.')}"
            heads = _make_heads(seq_len, queries, kv_heads, dtype, context.device)
            try:
                actual = _attention(kernel, heads, attention_mask)
            except RuntimeError as error:
                if kernel in REQUIRED or not any(text in str(error) for text in UNSUPPORTED_ERRORS):
                    raise
                unsupported.append(what)
                continue
            expected = _reference_attention(heads, attention_mask) if context.has_values else actual
            for part, one, other in zip(("out", "q", "k", "v"), actual, expected, strict=True):
                comparison.close(f"{what} {part}", one, other, tolerance)
    if len(unsupported) == len(cases) * len(TOLERANCES):
        raise SkippedError("takes none of the masks here")
    return comparison.row(refused=unsupported)


def _make_heads(seq_len: int, queries: int, kv_heads: int, dtype: torch.dtype, device: torch.device) -> Heads:
    generator = torch.Generator().manual_seed(0)

    def random_heads(length: int, heads: int) -> Tensor:
        values = torch.randn(ROWS, length, heads, HEAD_DIM, generator=generator)
        return values.to(device, dtype).requires_grad_()

    return random_heads(queries, HEADS), random_heads(seq_len, kv_heads), random_heads(seq_len, kv_heads)


def _attention(kernel: str, heads: Heads, attention_mask: AttentionMask) -> tuple[Tensor, ...]:
    """Compute the output, and the gradients of q, k and v."""
    q, k = heads[0], heads[1]
    shape = (len(q), q.shape[1], k.shape[1])
    with sdpa_kernel(SDPA[kernel]) if kernel in SDPA else nullcontext():
        mask = (
            materialize_mask(attention_mask, shape, q.device, dense=False)
            if kernel == "chosen"
            else mask_for(kernel, attention_mask, shape, q.device)
        )
        out = scaled_dot_product(*heads, mask, dropout=0.0)
        return (out, *torch.autograd.grad(out, heads, _upstream(out)))


def _upstream(out: Tensor) -> Tensor:
    """Return a gradient of the output, equal for all kernels."""
    steps = torch.arange(out.numel(), device=out.device, dtype=torch.float32)
    return torch.sin(steps).view(out.shape).to(out.dtype)


def _reference_attention(heads: Heads, attention_mask: AttentionMask) -> tuple[Tensor, ...]:
    """Compute the same by its formula, in fp64."""
    q, k, v = (each.detach().double().requires_grad_() for each in heads)
    S, T, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    b, s, t = (torch.arange(size, device=q.device) for size in (len(q), S, T))
    allowed_BST = attention_mask.allows(S, T, b[:, None, None], s[None, :, None], t).expand(len(q), S, T)
    k_BTHE, v_BTHE = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores_BHST = torch.einsum("bshe,bthe->bhst", q, k_BTHE) * q.shape[-1] ** -0.5
    weights_BHST = scores_BHST.masked_fill(~allowed_BST[:, None], -torch.inf).softmax(-1)
    out = torch.einsum("bhst,bthe->bshe", weights_BHST, v_BTHE)
    return (out, *torch.autograd.grad(out, (q, k, v), _upstream(out)))


def check_loss(context: Context) -> dict[str, object]:
    """Compare the sliced loss and its gradients with all logits in fp64 on the CPU; with and without a cap."""
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
                vocab_shard = VocabShard(500, 0, 500)
                losses_B = linear_cross_entropy(*inputs, None, targets.to(device), loss, cap, vocab_shard)
            actual = (losses_B, *torch.autograd.grad(losses_B.sum(), inputs))
            for part, one, other in zip(("losses", "x", "weight"), actual, expected, strict=True):
                comparison.close(f"{str(dtype).removeprefix('torch.')} cap {cap:g} {part}", one, other, tolerance)
    return comparison.row()


def _full_logits_loss(x: Tensor, weight: Tensor, targets: Tensor, loss: CrossEntropy, cap: float) -> tuple[Tensor, ...]:
    """Compute losses of the sequences, and the gradients of their sum."""
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


def check_fp8(context: Context, tokens: int) -> dict[str, object]:
    """Compare products in float8, forward and both gradients, with the emulated ones and with those in fp32.

    The former must agree to bf16's last place plus the loss of Hopper's sums (2^-11 of the summands' sizes), the latter
    within 10%.
    """
    comparison, generator = Comparison(context), torch.Generator().manual_seed(0)
    fp8.check_float8_support(context.device)
    shapes = (((tokens, 256), 1e-2), ((512, 256), 2e-2), ((tokens, 512), 1e-5))
    factors = [(size * torch.randn(shape, generator=generator)).bfloat16() for shape, size in shapes]
    x, w, g = (each.to(context.device) for each in factors)
    kernel = _products(x, w, g)
    with patch.object(fp8, "scaled_matmul", fp8.emulate_scaled_matmul):
        emulated = _products(x, w, g)
    exact = x.float() @ w.float().t(), g.float() @ w.float(), g.float().t() @ x.float()
    sizes = x.abs() @ w.abs().t(), g.abs() @ w.abs(), g.abs().t() @ x.abs()
    for part, one, other, plain, size in zip(("y", "x", "w"), kernel, emulated, exact, sizes, strict=True):
        if context.has_values:
            allowed = 2.0**-8 * other.float().abs() + 2.0**-11 * size.float()
            excess = ((one - other).float().abs() / allowed.clamp(min=1e-30)).max().item()
            comparison.at_most(f"{part}, of what is allowed beside the emulated", excess, 1.0)
            norm = ((one.float() - plain).norm() / plain.norm()).item()
            comparison.at_most(f"{part}, beside fp32", norm, 0.1)
        else:
            comparison.close(part, one, plain, 0.1)
    return comparison.row()


def _products(x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    """Compute y = x w^T, and the gradients of x and w."""
    inputs, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
    y = fp8.float8_linear(inputs, weight)
    return [y.detach(), *torch.autograd.grad(y, (inputs, weight), g)]
