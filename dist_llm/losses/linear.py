"""The last layer and its loss in one: logits are computed once, in slices of the tokens, and never whole.

A slice of the logits becomes their gradient at once, and that the gradients of the activations and of the weight, for
losses whose own gradient is 1; backward multiplies them by what it is. Three matrix products, as many as a layer and a
loss apart, without the memory of all logits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dist_llm.losses.cross_entropy import IGNORE, CrossEntropy, LossTerms

# N tokens  D width  W columns of logits that are here  B sequences

SLICE_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of a slice's logits in fp32, at most
BLOCK_BYTES = 2 << 20  # on a CPU: of those that are worked on at a time, so that they stay in its cache
# In fp16 the gradient of a logit, at most 1 before the loss scale, is kept so many times as large: what is then lost of
# small probabilities is nothing, and sums over a slice's tokens are far from the largest number.
FP16_BOOST, FP16_TOKENS = 16.0, 1024
Join = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Columns:
    """Which tokens of the vocabulary this rank's weight has: [start, start + width) of `size`.

    `add` and `largest` join numbers of all ranks; None: there is one rank.
    """

    size: int
    start: int
    width: int
    add: Join | None = None
    largest: Join | None = None


def linear_cross_entropy(
    x_BSD: Tensor,
    weight_WD: Tensor,
    bias_W: Tensor | None,
    targets_BS: Tensor,
    loss: CrossEntropy,
    cap: float,
    columns: Columns,
    terms: LossTerms | None = None,
    weights_BS: Tensor | None = None,
) -> Tensor:
    """`loss` of vectors [..., S, D] times a weight, logits capped at `cap` (0: not), summed per sequence: [...].

    The weight has the rows of `columns`; further ones are padding. Each token's loss is multiplied by its number in
    `weights_BS`. What the losses are made of is added to `terms`.

    Gradients are made in forward, so losses of all sequences must have one factor in what is differentiated, as in a
    sum divided by a number; other factors belong into `weights_BS`. Where the factors differ, backward raises
    RuntimeError on a CPU; on a GPU, which nobody waits for, gradients are NaN.
    """
    found: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        x_BSD, weight_WD, bias_W, targets_BS, weights_BS, loss, cap, columns, terms, torch.is_grad_enabled()
    )
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSD: Tensor,
        weight_WD: Tensor,
        bias_W: Tensor | None,
        targets_BS: Tensor,
        weights_BS: Tensor | None,
        loss: CrossEntropy,
        cap: float,
        columns: Columns,
        terms: LossTerms | None,
        wanted: bool,
    ) -> Tensor:
        """Losses, and, if `wanted`, the gradients that they have if theirs is 1."""
        kind, width = x_BSD.device.type, columns.width
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_WD.dtype
        exact = torch.promote_types(dtype, torch.float32)
        x_ND, targets_N, rows_WD = x_BSD.flatten(0, -2).to(dtype), targets_BS.flatten(), weight_WD[:width].to(dtype)
        weights_N = (targets_N != IGNORE).to(exact)
        if weights_BS is not None:
            weights_N = torch.where(weights_N > 0, weights_BS.flatten().to(exact), 0)
        losses_KN = torch.empty(1 if loss.is_plain else 3, len(x_ND), dtype=exact, device=x_BSD.device)
        grad_x_ND = torch.empty_like(x_ND) if wanted else x_ND
        grad_rows_WD = losses_KN.new_zeros(rows_WD.shape) if wanted else rows_WD
        grad_bias_W = losses_KN.new_zeros(width)
        ctx.boost = FP16_BOOST if dtype == torch.float16 else 1.0
        turn = _compiled() if kind == "cuda" and columns.add is None else _turn
        with torch.autocast(kind, enabled=False):
            # As many slices on all ranks, whose columns may differ: padding counts.
            most = FP16_TOKENS * 4 * len(weight_WD) if dtype == torch.float16 else SLICE_BYTES[kind]
            for part in _slices(len(x_ND), len(weight_WD), min(most, SLICE_BYTES[kind])):
                logits_nW = F.linear(x_ND[part], rows_WD, None if bias_W is None else bias_W[:width].to(dtype))
                by_block = kind == "cpu" and columns.add is None
                for block in _slices(len(logits_nW), width, BLOCK_BYTES) if by_block else [slice(None)]:
                    y_nW = logits_nW[block].to(exact)
                    tokens = targets_N[part][block], weights_N[part][block]
                    losses_KN[:, part][:, block] = turn(y_nW, *tokens, loss, cap, columns, ctx.boost)
                    if dtype != exact:
                        logits_nW[block] = y_nW
                if wanted:
                    torch.mm(logits_nW, rows_WD, out=grad_x_ND[part])
                    _add_product(grad_rows_WD, logits_nW, x_ND[part])
                    if bias_W is not None:
                        grad_bias_W += logits_nW.sum(0, dtype=exact)
        ctx.made, ctx.scaled = (grad_x_ND, grad_rows_WD, grad_bias_W), False
        ctx.shape, ctx.dtype, ctx.rows, ctx.biased = x_BSD.shape, x_BSD.dtype, len(weight_WD), bias_W is not None
        ctx.dtypes = weight_WD.dtype, weight_WD.dtype if bias_W is None else bias_W.dtype
        if terms is not None and not loss.is_plain:
            terms.add(losses_KN[1:].sum(-1))
        return losses_KN[0].view(targets_BS.shape).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """What forward made, times the gradient of the losses."""
        each = gradients[0] / ctx.boost
        grad_x_ND, *sums = ctx.made
        if not ctx.scaled:  # else asked for again: a pipeline may want the activations' gradients first
            first = each.flatten()[0]
            alike = ((each == first) | each.isnan()).all()
            if each.device.type == "cpu" and not alike:
                raise RuntimeError(
                    "losses of different sequences are multiplied by different numbers after linear_cross_entropy, "
                    "which has made the gradients already; pass the numbers as its weights_BS"
                )
            for made in sums:
                made *= torch.where(alike, first, torch.nan)
            ctx.scaled = True
        weight, bias = (_padded(made, ctx.rows).to(dtype) for made, dtype in zip(sums, ctx.dtypes, strict=True))
        grad_x_BSD = (grad_x_ND.view(ctx.shape) * each[..., None, None]).to(ctx.dtype)
        return grad_x_BSD, weight, bias if ctx.biased else None, *[None] * 7


def _turn(
    y_nW: Tensor,
    targets_n: Tensor,
    weights_n: Tensor,
    loss: CrossEntropy,
    cap: float,
    columns: Columns,
    boost: float,
) -> Tensor:
    """Logits in fp32 -> losses [1, n], weighted; of a regularised loss also its cross-entropy and z-loss, [3, n].

    In place of the logits there is then the gradient of the losses' sum, times boost.
    Targets that are IGNORE have a weight of 0: no loss, and no gradient.
    """
    smooth, some = loss.label_smoothing, y_nW.shape[-1] > 0  # a rank may have nothing but padding
    steep_nW = None
    if cap:
        y_nW.div_(cap).tanh_()
        steep_nW = 1 - y_nW.square()
        y_nW.mul_(cap)
    here_n = (targets_n >= columns.start) & (targets_n < columns.start + columns.width)
    column_n1 = torch.where(here_n, targets_n - columns.start, 0).unsqueeze(-1)
    largest_n = y_nW.amax(-1) if some else y_nW.new_full((len(y_nW),), -torch.inf)
    if columns.largest is not None:
        largest_n = columns.largest(largest_n)
    y_nW.sub_(largest_n.unsqueeze(-1))  # from here on all is relative to the largest
    target_n = torch.where(here_n, y_nW.gather(-1, column_n1).squeeze(-1), 0) if some else torch.zeros_like(largest_n)
    sums = [target_n, *([y_nW.sum(-1)] if smooth else [])]
    sums.append(y_nW.exp_().sum(-1))
    if columns.add is None:
        sums[0] = torch.where(here_n | (targets_n == IGNORE), target_n, torch.nan)  # a target that is no token
    else:
        sums = list(columns.add(torch.stack(sums)))
    target_n, *all_n, total_n = sums
    log_n = total_n.log()
    log_z_n = log_n + largest_n
    z_loss_n = loss.z_loss * log_z_n.square()
    loss_n = log_n - (1 - smooth) * target_n + z_loss_n
    y_nW.mul_((weights_n * (1 + 2 * loss.z_loss * log_z_n) * boost / total_n).unsqueeze(-1))
    if smooth:
        loss_n = loss_n - smooth * all_n[0] / columns.size
        y_nW.sub_((weights_n * smooth * boost / columns.size).unsqueeze(-1))
    if some:
        y_nW.scatter_add_(-1, column_n1, (here_n.to(y_nW.dtype) * weights_n * (smooth - 1) * boost).unsqueeze(-1))
    if steep_nW is not None:
        y_nW.mul_(steep_nW)
    terms = [loss_n] if loss.is_plain else [loss_n, log_n - target_n, z_loss_n]
    return torch.where(targets_n != IGNORE, torch.stack(terms) * weights_n, 0)


@cache
def _compiled() -> Callable[..., Tensor]:
    """One kernel that reads the logits and writes their gradient."""
    return torch.compile(_turn)


def _slices(length: int, width: int, most_bytes: int) -> Iterator[slice]:
    """Equal parts of `length` rows whose `width` numbers in fp32 take at most so many bytes."""
    parts = max(1, -(-length * width * 4 // most_bytes))
    rows = max(1, -(-length // parts))
    return (slice(start, min(length, start + rows)) for start in range(0, length, rows))


def _add_product(sum_WD: Tensor, left_nW: Tensor, right_nD: Tensor) -> None:
    """sum += left^T right, in the sum's own precision."""
    if left_nW.dtype == sum_WD.dtype:
        sum_WD.addmm_(left_nW.t(), right_nD)
    else:
        sum_WD += left_nW.t() @ right_nD


def _padded(gradient: Tensor, rows: int) -> Tensor:
    """With that many rows: those of padding are zero."""
    if len(gradient) < rows:
        gradient = torch.cat((gradient, gradient.new_zeros(rows - len(gradient), *gradient.shape[1:])))
    return gradient
