"""Softmax attention with an explicit mask tensor, and with attention sinks.

An attention sink is a learned logit of a query head. It joins the denominator of the softmax, but has no value
(gpt-oss): the weight of key t is exp(score_t) / (exp(sink) + sum over keys of exp(score)). So a head can attend to
nothing.

Shape suffixes: B batch, S queries, T keys, H query heads, K key-value heads, E head_dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_llm.compat import cpu_flash_attention, cpu_flash_attention_backward
from dist_llm.models.autocast import cast_to_autocast_dtype


def softmax_attention(
    q_BHSE: Tensor,
    k_BKTE: Tensor,
    v_BKTE: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Compute `F.scaled_dot_product_attention`, with sinks unless `sinks_H` is None: [B, H, S, E].

    `is_causal` needs S == T, and no mask. `scale` None: 1 / sqrt(E).
    """
    if sinks_H is None:
        return F.scaled_dot_product_attention(
            q_BHSE,
            k_BKTE,
            v_BKTE,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=is_causal,
            enable_gqa=q_BHSE.shape[1] != k_BKTE.shape[1],
            scale=scale,
        )
    # Only the flash kernel of CPUs takes a mask and returns its log-sum-exp. It has no dropout and no gradient of the
    # mask. FlexAttention computes sinks on a GPU, where `materialize_mask` can use it.
    if dropout or q_BHSE.device.type != "cpu" or (mask is not None and mask.requires_grad):
        mask = causal_mask(q_BHSE.shape[2], k_BKTE.shape[2], q_BHSE.device) if is_causal else mask
        return dense_attention(q_BHSE, k_BKTE, v_BKTE, mask, dropout, scale, sinks_H=sinks_H)
    q_BHSE, k_BKTE, v_BKTE = (cast_to_autocast_dtype(x) for x in (q_BHSE, k_BKTE, v_BKTE))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q_BHSE.dtype).masked_fill_(~mask, -torch.inf)
    sinks_H = sinks_H.to(torch.promote_types(q_BHSE.dtype, torch.float32))
    out_BHSE: Tensor = _FlashAttentionWithSinks.apply(q_BHSE, k_BKTE, v_BKTE, mask, is_causal, scale, sinks_H)  # type: ignore[no-untyped-call]
    return out_BHSE


class _FlashAttentionWithSinks(torch.autograd.Function):
    """Attention with sinks by the flash kernel, which knows nothing about sinks.

    Sinks multiply the output by a factor, exp(lse of the scores) / exp(lse of the scores and the sink). The backward
    kernel recomputes the weights as exp(score - lse), and subtracts the sum of output * gradient from their gradients.
    Given the output and the lse with the sink, it therefore computes the gradients with the sink. The weight of the
    sink is exp(sink - lse). Its value is 0, so the gradient of the sink is -weight * (output * gradient).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BHSE: Tensor,
        k_BKTE: Tensor,
        v_BKTE: Tensor,
        mask: Tensor | None,
        is_causal: bool,
        scale: float | None,
        sinks_H: Tensor,
    ) -> Tensor:
        out_BHSE, lse_BHS = cpu_flash_attention(q_BHSE, k_BKTE, v_BKTE, 0.0, is_causal, attn_mask=mask, scale=scale)
        lse_with_sink_BHS = torch.logaddexp(lse_BHS, sinks_H[:, None])
        out_BHSE = out_BHSE * (lse_BHS - lse_with_sink_BHS).exp()[..., None].to(out_BHSE.dtype)
        ctx.save_for_backward(q_BHSE, k_BKTE, v_BKTE, mask, out_BHSE, lse_with_sink_BHS, sinks_H)
        ctx.is_causal, ctx.scale = is_causal, scale
        return out_BHSE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSE: Tensor) -> tuple[Tensor | None, ...]:
        q_BHSE, k_BKTE, v_BKTE, mask, out_BHSE, lse_BHS, sinks_H = ctx.saved_tensors
        grads = cpu_flash_attention_backward(
            grad_BHSE, q_BHSE, k_BKTE, v_BKTE, out_BHSE, lse_BHS, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scale
        )
        output_times_grad_BHS = (out_BHSE.to(lse_BHS.dtype) * grad_BHSE).sum(-1)
        grad_sinks_H = -((sinks_H[:, None] - lse_BHS).exp() * output_times_grad_BHS).sum((0, 2))
        return *grads, None, None, None, grad_sinks_H


def dense_attention(
    q_BHSE: Tensor,
    k_BKTE: Tensor,
    v_BKTE: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    cap: float | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attention that stores all scores, with sinks and caps: cap * tanh(score / cap) (Gemma Team 2024, section 2)."""
    groups = q_BHSE.shape[1] // k_BKTE.shape[1]
    k_BHTE, v_BHTE = k_BKTE.repeat_interleave(groups, dim=1), v_BKTE.repeat_interleave(groups, dim=1)
    scale = scale or q_BHSE.shape[-1] ** -0.5
    if cap is None:
        scores_BHST = q_BHSE @ k_BHTE.transpose(-1, -2) * scale
    else:
        scores_BHST = cap * torch.tanh(q_BHSE @ k_BHTE.transpose(-1, -2) * (scale / cap))
    if mask is not None and mask.is_floating_point():
        scores_BHST = scores_BHST + mask.to(scores_BHST.dtype)
    elif mask is not None:
        scores_BHST = scores_BHST.masked_fill(~mask, -torch.inf)
    if sinks_H is not None:
        sinks_BHS1 = sinks_H[:, None, None].to(scores_BHST.dtype).expand(*scores_BHST.shape[:3], 1)
        scores_BHST = torch.cat((scores_BHST, sinks_BHS1), dim=-1)
    weights_BHST = F.softmax(scores_BHST, dim=-1, dtype=torch.promote_types(scores_BHST.dtype, torch.float32))
    weights_BHST = weights_BHST[..., : k_BHTE.shape[2]].to(q_BHSE.dtype)
    return F.dropout(weights_BHST, dropout) @ v_BHTE


def causal_mask(S: int, T: int, device: torch.device) -> Tensor:
    """Return which of T keys each of the last S tokens attends to, [S, T]."""
    return torch.ones(S, T, dtype=torch.bool, device=device).tril(T - S)
