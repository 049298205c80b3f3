"""Which kernel of attention is fast, forward and backward, for each way in which tokens see each other.

Kernels are those of F.scaled_dot_product_attention, held to one backend each (math, flash, efficient, cudnn), and a
compiled FlexAttention; all are reached through dist_llm.models.attention.scaled_dot_product, with the mask that
`materialize_mask` makes for them. What a device or a mask does not allow is left out. `chosen` is the kernel that the
model would use there.

  causal         each token sees those before it
  prefix         and all see the first quarter
  documents      causal, within four documents of equal length
  bidirectional  all see all

TFLOP/s count the pairs of tokens that see each other, and 7 products for each (2 forward, 5 backward, as flash kernels
do): what a kernel computes and masks away is a loss. `ratio` is the seconds of the chosen one over its own, round by
round: above 1 it would be faster.

  python benchmarks/attention.py
  python benchmarks/attention.py --seq-len 2048 8192 --batch 4 --heads 32 --kv-heads 8 --head-dim 128
"""

import argparse
import itertools
import statistics
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

from dist_llm.models.attention import materialize_mask, scaled_dot_product
from dist_llm.models.attention_mask import CAUSAL, FULL, AttentionMask
from measure import DTYPES, any_device, precisions, seconds, take_turns
from results import Results, parser, table

SDPA = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
KERNELS = (*SDPA, "flex")
Heads = tuple[Tensor, Tensor, Tensor]


def main() -> None:
    """Measure each case and print."""
    options = arguments()
    device = any_device()
    results = Results("attention", device)
    for mask, seq_len, precision in itertools.product(
        options.masks, options.seq_len, precisions(options.precision, device)
    ):
        for row in case(mask, seq_len, precision, options, device):
            results.add({"mask": mask, "seq_len": seq_len, "precision": precision, **row})
    sizes = f"{options.batch} sequences, {options.heads} heads ({options.kv_heads} of keys) of {options.head_dim}"
    results.finish(f"{sizes}; {options.rounds} rounds; *: what the model chooses\n\n{report(results)}", options.write)


def arguments() -> argparse.Namespace:
    """The command line."""
    top = parser(__doc__)
    cuda = torch.cuda.is_available()
    top.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS), help="default: all")
    top.add_argument(
        "--seq-len",
        nargs="+",
        type=int,
        default=[1024, 4096] if cuda else [256, 1024],
        help="tokens; default: 1024 4096, on a CPU 256 1024",
    )
    top.add_argument(
        "--precision",
        nargs="+",
        choices=DTYPES,
        default=["bf16"] if cuda else None,
        help="default: bf16; on a CPU both, without bf16 where it has none",
    )
    top.add_argument("--batch", type=int, default=4 if cuda else 2, help="sequences; default: %(default)s")
    top.add_argument("--heads", type=int, default=16 if cuda else 8, help="default: %(default)s")
    top.add_argument("--kv-heads", type=int, default=4, help="default: %(default)s")
    top.add_argument("--head-dim", type=int, default=64, help="default: %(default)s")
    top.add_argument("--rounds", type=int, default=10, help="turns of each kernel; default: %(default)s")
    return top.parse_args()


def documents(batch: int, seq_len: int, device: torch.device) -> AttentionMask:
    """Four of equal length."""
    ids = torch.arange(seq_len, device=device) * 4 // seq_len
    return AttentionMask(causal=True, documents_BT=ids.expand(batch, -1))


MASKS: dict[str, Callable[[int, int, torch.device], AttentionMask]] = {
    "causal": lambda batch, seq_len, device: CAUSAL,
    "prefix": lambda batch, seq_len, device: AttentionMask(
        causal=True, prefix_B=torch.full((batch,), seq_len // 4, device=device)
    ),
    "documents": documents,
    "bidirectional": lambda batch, seq_len, device: FULL,
}


def case(
    mask: str, seq_len: int, precision: str, options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """One row per kernel that can do it."""
    attention_mask = MASKS[mask](options.batch, seq_len, device)
    shape = (options.batch, seq_len, seq_len)
    heads = draw(seq_len, precision, options, device)
    turns = {}
    for kernel in KERNELS:
        step = kernel_step(kernel, heads, masked(kernel, attention_mask, shape, device))
        if works(step):
            turns[kernel] = lambda step=step: seconds(step, device)
    found = take_turns(turns, options.rounds)
    best = chosen(heads, materialize_mask(attention_mask, shape, device, dense=False))
    cpu = torch.device("cpu")
    flops = 14 * options.head_dim * options.heads * pairs(MASKS[mask](options.batch, seq_len, cpu), shape, cpu)
    rows = []
    for kernel, taken in found.items():
        median = statistics.median(taken)
        row = {"kernel": kernel, "chosen": kernel == best, "seconds": median, "tflops": flops / median / 1e12}
        rows.append({**row, "ratio": statistics.median(a / b for a, b in zip(found[best], taken, strict=True))})
    return rows


def draw(seq_len: int, precision: str, options: argparse.Namespace, device: torch.device) -> Heads:
    """Queries, keys and values."""

    def one(heads: int) -> Tensor:
        drawn = torch.randn(options.batch, seq_len, heads, options.head_dim, device=device)
        return drawn.to(DTYPES[precision]).requires_grad_()

    return one(options.heads), one(options.kv_heads), one(options.kv_heads)


def masked(
    kernel: str, attention_mask: AttentionMask, shape: tuple[int, int, int], device: torch.device
) -> AttentionMask:
    """With the mask that the kernel takes."""
    if kernel != "flex":
        return materialize_mask(attention_mask, shape, device, dense=True)
    B, S, T = shape

    def allows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attention_mask.allows(S, T, b, q, k)

    return replace(attention_mask, materialized=create_block_mask(allows, B, None, S, T, device=device))


def kernel_step(kernel: str, heads: Heads, attention_mask: AttentionMask) -> Callable[[], None]:
    """Forward and backward."""

    def step() -> None:
        with sdpa_kernel(SDPA[kernel]) if kernel in SDPA else nullcontext():
            out_BSHE = scaled_dot_product(*heads, attention_mask, dropout=0.0)
        torch.autograd.grad(out_BSHE, heads, torch.ones_like(out_BSHE))

    return step


def works(step: Callable[[], None]) -> bool:
    """Whether it runs; it is warm then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each backend says why it cannot
        try:
            step()
            step()
        except (RuntimeError, NotImplementedError):
            return False
    return True


def chosen(heads: Heads, attention_mask: AttentionMask) -> str:
    """The kernel that `scaled_dot_product` chooses by itself."""
    q, k, v = (each.transpose(1, 2) for each in heads)
    if attention_mask.materialized is not None and not isinstance(attention_mask.materialized, Tensor):
        return "flex"
    causal, grouped = attention_mask.causal and attention_mask.materialized is None, q.shape[1] != k.shape[1]
    number = torch._fused_sdp_choice(q, k, v, attention_mask.materialized, 0.0, causal, enable_gqa=grouped)
    return next(name for name, backend in SDPA.items() if backend.value == number)


def pairs(attention_mask: AttentionMask, shape: tuple[int, int, int], device: torch.device) -> int:
    """How many (query, key) see each other, over all rows."""
    B, S, T = shape
    q, k = torch.arange(S, device=device)[:, None], torch.arange(T, device=device)
    return sum(int(attention_mask.allows(S, T, torch.tensor(b, device=device), q, k).sum()) for b in range(B))


def report(results: Results) -> str:
    """The table."""
    rows = [
        (
            row["mask"],
            row["seq_len"],
            row["precision"],
            row["kernel"] + (" *" if row["chosen"] else "  "),
            f"{row['seconds'] * 1000:,.2f}",
            f"{row['tflops']:.3f}",
            f"{row['ratio']:.2f}",
        )
        for row in results.rows
    ]
    return table(("mask", "tokens", "precision", "kernel  ", "ms", "TFLOP/s", "ratio"), rows)


if __name__ == "__main__":
    main()
