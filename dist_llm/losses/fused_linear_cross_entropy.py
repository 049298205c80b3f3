"""Fused linear layer and cross-entropy. Logits are computed in slices of the tokens and never stored in full.

Forward computes a slice of logits, replaces it in place by its gradient, and accumulates the gradients of activations
and weight, all for an output gradient of 1. Backward multiplies these gradients by the actual output gradient. This
takes three matrix products, as a separate layer and loss do, but not the memory of all logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_llm.losses.cross_entropy import IGNORE_INDEX, CrossEntropy, LossTerms

# Shape suffixes: B sequences, S tokens, N all tokens, n tokens of a slice, D d_model, W local rows of the weight (and
# columns of the logits), V vocabulary, K terms of the loss.

SLICE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # maximum size of the fp32 logits of a slice
BLOCK_BYTES = 2 << 20  # on a CPU a slice is processed in blocks of this size, which stay in the cache
# In fp16 the gradient of a logit is at most 1 before the loss scale. It is stored multiplied by FP16_GRAD_SCALE, so
# that small values do not underflow. Sums over FP16_MAX_TOKENS tokens stay far below the largest fp16 number.
FP16_GRAD_SCALE, FP16_MAX_TOKENS = 16.0, 1024
Reduction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class VocabShard:
    """The shard of the vocabulary on this rank: tokens [first_token, first_token + num_tokens) of `vocab_size`.

    `all_reduce_sum` and `all_reduce_max` reduce a tensor over the ranks that share the vocabulary; None: one rank.
    """

    vocab_size: int
    first_token: int
    num_tokens: int
    all_reduce_sum: Reduction | None = None
    all_reduce_max: Reduction | None = None


def linear_cross_entropy(
    x_BSD: Tensor,
    weight_WD: Tensor,
    bias_W: Tensor | None,
    targets_BS: Tensor,
    loss: CrossEntropy,
    softcap: float | None,
    vocab_shard: VocabShard,
    terms: LossTerms | None = None,
    loss_weights_BS: Tensor | None = None,
) -> Tensor:
    """Return `loss` of the logits x @ weight^T + bias, summed per sequence: activations [..., S, D] -> losses [...].

    The weight has one row per token of `vocab_shard`; further rows are padding. `softcap` caps the logits; None: no
    cap. The loss of each token is multiplied by its weight in `loss_weights_BS`. The terms of the losses are added to
    `terms`.

    Forward computes the gradients. So the caller must multiply the losses of all sequences by the same factor, as in
    a sum divided by a count. Pass factors that differ by sequence or token as `loss_weights_BS`. If the factors differ,
    backward raises RuntimeError on a CPU. On a GPU, where a check would wait for the device, gradients become NaN.
    """
    losses: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_BSD,
        weight_WD,
        bias_W,
        targets_BS,
        loss_weights_BS,
        loss,
        softcap,
        vocab_shard,
        terms,
        torch.is_grad_enabled(),
    )
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSD: Tensor,
        weight_WD: Tensor,
        bias_W: Tensor | None,
        targets_BS: Tensor,
        loss_weights_BS: Tensor | None,
        loss: CrossEntropy,
        softcap: float | None,
        vocab_shard: VocabShard,
        terms: LossTerms | None,
        needs_grad: bool,
    ) -> Tensor:
        """Compute the losses and, if `needs_grad`, the gradients for an output gradient of 1."""
        device_type, num_columns = x_BSD.device.type, vocab_shard.num_tokens
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight_WD.dtype
        acc_dtype = torch.promote_types(dtype, torch.float32)
        x_ND, targets_N = x_BSD.flatten(0, -2).to(dtype), targets_BS.flatten()
        rows_WD = weight_WD[:num_columns].to(dtype)  # without padding
        loss_weights_N = (targets_N != IGNORE_INDEX).to(acc_dtype)
        if loss_weights_BS is not None:
            loss_weights_N = torch.where(loss_weights_N > 0, loss_weights_BS.flatten().to(acc_dtype), 0)
        losses_KN = torch.empty(1 if loss.is_unregularized else 3, len(x_ND), dtype=acc_dtype, device=x_BSD.device)
        grad_x_ND = torch.empty_like(x_ND) if needs_grad else x_ND
        grad_rows_WD = losses_KN.new_zeros(rows_WD.shape) if needs_grad else rows_WD
        grad_bias_W = losses_KN.new_zeros(num_columns)
        ctx.fp16_scale = FP16_GRAD_SCALE if dtype == torch.float16 else 1.0
        compiled = device_type == "cuda" and vocab_shard.all_reduce_sum is None
        compute = _compiled_losses_and_logit_grads_() if compiled else _losses_and_logit_grads_
        with torch.autocast(device_type, enabled=False):
            # All ranks need the same number of slices, because each slice has collectives. Ranks may have different
            # numbers of tokens but have the same number of rows with padding, so slices are sized with padding.
            max_bytes = FP16_MAX_TOKENS * 4 * len(weight_WD) if dtype == torch.float16 else SLICE_BYTES[device_type]
            for chunk in iter_slices(len(x_ND), len(weight_WD), min(max_bytes, SLICE_BYTES[device_type])):
                bias = None if bias_W is None else bias_W[:num_columns].to(dtype)
                logits_nW = F.linear(x_ND[chunk], rows_WD, bias)
                uses_blocks = device_type == "cpu" and vocab_shard.all_reduce_sum is None
                for block in iter_slices(len(logits_nW), num_columns, BLOCK_BYTES) if uses_blocks else [slice(None)]:
                    y_nW = logits_nW[block].to(acc_dtype)
                    tokens = targets_N[chunk][block], loss_weights_N[chunk][block]
                    losses_KN[:, chunk][:, block] = compute(y_nW, *tokens, loss, softcap, vocab_shard, ctx.fp16_scale)
                    if dtype != acc_dtype:
                        logits_nW[block] = y_nW
                if needs_grad:
                    torch.mm(logits_nW, rows_WD, out=grad_x_ND[chunk])
                    _add_matmul_(grad_rows_WD, logits_nW, x_ND[chunk])
                    if bias_W is not None:
                        grad_bias_W += logits_nW.sum(0, dtype=acc_dtype)
        ctx.saved_grads, ctx.is_scaled = (grad_x_ND, grad_rows_WD, grad_bias_W), False
        ctx.x_shape, ctx.x_dtype = x_BSD.shape, x_BSD.dtype
        ctx.num_weight_rows, ctx.has_bias = len(weight_WD), bias_W is not None
        ctx.weight_dtypes = weight_WD.dtype, weight_WD.dtype if bias_W is None else bias_W.dtype
        if terms is not None and not loss.is_unregularized:
            terms.add(losses_KN[1:].sum(-1))
        return losses_KN[0].view(targets_BS.shape).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the gradients that forward computed by the gradient of the losses."""
        grad_losses_B = gradients[0] / ctx.fp16_scale
        grad_x_ND, *weight_grads = ctx.saved_grads
        # A pipeline may call backward twice: first for the gradients of the activations, then for those of the weights.
        if not ctx.is_scaled:
            factor = grad_losses_B.flatten()[0]
            all_equal = ((grad_losses_B == factor) | grad_losses_B.isnan()).all()
            if grad_losses_B.device.type == "cpu" and not all_equal:
                raise RuntimeError(
                    "losses of different sequences are multiplied by different numbers after linear_cross_entropy, "
                    "which has already computed the gradients; pass the numbers as its loss_weights_BS"
                )
            for grad in weight_grads:
                grad *= torch.where(all_equal, factor, torch.nan)
            ctx.is_scaled = True
        grad_weight_WD, grad_bias_W = (
            _pad_rows(grad, ctx.num_weight_rows).to(dtype)
            for grad, dtype in zip(weight_grads, ctx.weight_dtypes, strict=True)
        )
        grad_x_BSD = (grad_x_ND.view(ctx.x_shape) * grad_losses_B[..., None, None]).to(ctx.x_dtype)
        return grad_x_BSD, grad_weight_WD, grad_bias_W if ctx.has_bias else None, *[None] * 7


def _losses_and_logit_grads_(
    y_nW: Tensor,
    targets_n: Tensor,
    loss_weights_n: Tensor,
    loss: CrossEntropy,
    softcap: float | None,
    vocab_shard: VocabShard,
    fp16_scale: float,
) -> Tensor:
    """Return the weighted losses, [1, n]; for a regularized loss also the cross-entropy and the z-loss, [3, n].

    Replace the fp32 logits `y_nW` in place by the gradient of the sum of the losses, times `fp16_scale`. Targets that
    are IGNORE_INDEX have weight 0: no loss and no gradient.
    """
    smoothing, has_columns = loss.label_smoothing, y_nW.shape[-1] > 0  # a rank may hold only padding rows
    softcap_slope_nW = None
    if softcap:
        y_nW.div_(softcap).tanh_()
        softcap_slope_nW = 1 - y_nW.square()
        y_nW.mul_(softcap)
    is_local_n = (targets_n >= vocab_shard.first_token) & (targets_n < vocab_shard.first_token + vocab_shard.num_tokens)
    column_n1 = torch.where(is_local_n, targets_n - vocab_shard.first_token, 0).unsqueeze(-1)
    max_n = y_nW.amax(-1) if has_columns else y_nW.new_full((len(y_nW),), -torch.inf)
    if vocab_shard.all_reduce_max is not None:
        max_n = vocab_shard.all_reduce_max(max_n)
    y_nW.sub_(max_n.unsqueeze(-1))  # from here on, logits are relative to the maximum
    target_n = (
        torch.where(is_local_n, y_nW.gather(-1, column_n1).squeeze(-1), 0) if has_columns else torch.zeros_like(max_n)
    )
    sums = [target_n, *([y_nW.sum(-1)] if smoothing else [])]
    sums.append(y_nW.exp_().sum(-1))
    if vocab_shard.all_reduce_sum is None:
        # A target that is not a token id gives NaN.
        sums[0] = torch.where(is_local_n | (targets_n == IGNORE_INDEX), target_n, torch.nan)
    else:
        sums = list(vocab_shard.all_reduce_sum(torch.stack(sums)))
    target_n, *logit_sums_n, sum_exp_n = sums
    log_sum_exp_n = sum_exp_n.log()
    log_z_n = log_sum_exp_n + max_n
    z_loss_n = loss.z_loss * log_z_n.square()
    loss_n = log_sum_exp_n - (1 - smoothing) * target_n + z_loss_n
    y_nW.mul_((loss_weights_n * (1 + 2 * loss.z_loss * log_z_n) * fp16_scale / sum_exp_n).unsqueeze(-1))
    if smoothing:
        loss_n = loss_n - smoothing * logit_sums_n[0] / vocab_shard.vocab_size
        y_nW.sub_((loss_weights_n * smoothing * fp16_scale / vocab_shard.vocab_size).unsqueeze(-1))
    if has_columns:
        y_nW.scatter_add_(
            -1, column_n1, (is_local_n.to(y_nW.dtype) * loss_weights_n * (smoothing - 1) * fp16_scale).unsqueeze(-1)
        )
    if softcap_slope_nW is not None:
        y_nW.mul_(softcap_slope_nW)
    terms = [loss_n] if loss.is_unregularized else [loss_n, log_sum_exp_n - target_n, z_loss_n]
    return torch.where(targets_n != IGNORE_INDEX, torch.stack(terms) * loss_weights_n, 0)


@cache
def _compiled_losses_and_logit_grads_() -> Callable[..., Tensor]:
    """Compile `_losses_and_logit_grads_`, so that one kernel reads the logits and writes their gradient."""
    return torch.compile(_losses_and_logit_grads_)


def iter_slices(num_rows: int, num_columns: int, max_bytes: int) -> Iterator[slice]:
    """Split the rows of an fp32 matrix into equal slices of at most `max_bytes` bytes."""
    num_slices = max(1, -(-num_rows * num_columns * 4 // max_bytes))
    slice_rows = max(1, -(-num_rows // num_slices))
    return (slice(start, min(num_rows, start + slice_rows)) for start in range(0, num_rows, slice_rows))


def _add_matmul_(sum_WD: Tensor, left_nW: Tensor, right_nD: Tensor) -> None:
    """sum += left^T right, accumulated in the dtype of the sum."""
    if left_nW.dtype == sum_WD.dtype:
        sum_WD.addmm_(left_nW.t(), right_nD)
    else:
        sum_WD += left_nW.t() @ right_nD


def _pad_rows(gradient: Tensor, num_rows: int) -> Tensor:
    """Append zero rows for the padding of the weight, up to `num_rows` rows."""
    if len(gradient) < num_rows:
        gradient = torch.cat((gradient, gradient.new_zeros(num_rows - len(gradient), *gradient.shape[1:])))
    return gradient
