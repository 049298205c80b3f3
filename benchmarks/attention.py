"""Time attention kernels, forward and backward, for each kind of mask.

The kernels are the backends of F.scaled_dot_product_attention (math, flash, efficient, cudnn) and compiled
FlexAttention (flex). All run through dist_llm.models.attention.scaled_dot_product, with a mask from `materialize_mask`.
A kernel that does not support the device or the mask is left out. `chosen` marks the kernel that the model uses.

  causal         each token attends to itself and to earlier tokens
  prefix         causal, and all tokens attend to the first quarter of the sequence
  documents      causal, within four documents of equal length
  bidirectional  all tokens attend to all tokens

TFLOP/s count only pairs of tokens that the mask allows, with 7 matrix products (2 forward and 5 backward, as in flash
kernels); work on masked pairs is not counted. `ratio` is the time of the chosen kernel over the time of this kernel,
the median over the rounds: above 1, this kernel is faster.

Shape suffixes: B, batch; S, queries; T, keys; H, heads; E, head dimension.

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
from measure import DTYPES, choose_device, choose_precisions, measure_seconds, take_turns
from results import Results, format_table, make_parser

SDPA_BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
KERNELS = (*SDPA_BACKENDS, "flex")
Heads = tuple[Tensor, Tensor, Tensor]  # q [B, S, H, E]; k and v [B, T, KV heads, E]


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    device = choose_device()
    results = Results("attention", device)
    for mask, seq_len, precision in itertools.product(
        options.masks, options.seq_len, choose_precisions(options.precision, device)
    ):
        for row in measure_case(mask, seq_len, precision, options, device):
            results.add({"mask": mask, "seq_len": seq_len, "precision": precision, **row})
    sizes = f"{options.batch} sequences, {options.heads} heads ({options.kv_heads} of keys) of {options.head_dim}"
    results.finish(
        f"{sizes}; {options.rounds} rounds; *: the choice of the model\n\n{make_report(results)}", options.write
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS), help="kinds of mask; default: all")
    parser.add_argument(
        "--seq-len",
        nargs="+",
        type=int,
        default=[1024, 4096] if has_gpu else [256, 1024],
        help="tokens of a sequence; default: 1024 4096, on a CPU 256 1024",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=DTYPES,
        default=["bf16"] if has_gpu else None,
        help="default: bf16; on a CPU both, without bf16 if the CPU lacks bf16 instructions",
    )
    parser.add_argument("--batch", type=int, default=4 if has_gpu else 2, help="sequences; default: %(default)s")
    parser.add_argument("--heads", type=int, default=16 if has_gpu else 8, help="query heads; default: %(default)s")
    parser.add_argument("--kv-heads", type=int, default=4, help="key and value heads; default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, help="dimension of a head; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each kernel; default: %(default)s")
    return parser.parse_args()


def make_document_mask(batch: int, seq_len: int, device: torch.device) -> AttentionMask:
    """Make the causal mask of sequences that consist of four documents of equal length."""
    document_ids = torch.arange(seq_len, device=device) * 4 // seq_len
    return AttentionMask(causal=True, documents_BT=document_ids.expand(batch, -1))


MASKS: dict[str, Callable[[int, int, torch.device], AttentionMask]] = {
    "causal": lambda batch, seq_len, device: CAUSAL,
    "prefix": lambda batch, seq_len, device: AttentionMask(
        causal=True, prefix_B=torch.full((batch,), seq_len // 4, device=device)
    ),
    "documents": make_document_mask,
    "bidirectional": lambda batch, seq_len, device: FULL,
}


def measure_case(
    mask: str, seq_len: int, precision: str, options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Measure all kernels that support a mask on this device; return one row per kernel."""
    attention_mask = MASKS[mask](options.batch, seq_len, device)
    shape = (options.batch, seq_len, seq_len)
    heads = make_heads(seq_len, precision, options, device)
    timers = {}
    for kernel in KERNELS:
        run_kernel = make_kernel_step(kernel, heads, materialize_for_kernel(kernel, attention_mask, shape, device))
        if is_supported(run_kernel):
            timers[kernel] = lambda run_kernel=run_kernel: measure_seconds(run_kernel, device)
    seconds_by_kernel = take_turns(timers, options.rounds)
    chosen_kernel = find_chosen_kernel(heads, materialize_mask(attention_mask, shape, device, dense=False))
    cpu = torch.device("cpu")
    num_pairs = count_pairs(MASKS[mask](options.batch, seq_len, cpu), shape, cpu)
    flops = 7 * 2 * options.head_dim * options.heads * num_pairs
    rows = []
    for kernel, kernel_seconds in seconds_by_kernel.items():
        median_seconds = statistics.median(kernel_seconds)
        pairs_of_seconds = zip(seconds_by_kernel[chosen_kernel], kernel_seconds, strict=True)
        rows.append(
            {
                "kernel": kernel,
                "chosen": kernel == chosen_kernel,
                "seconds": median_seconds,
                "tflops": flops / median_seconds / 1e12,
                "ratio": statistics.median(chosen / seconds for chosen, seconds in pairs_of_seconds),
            }
        )
    return rows


def make_heads(seq_len: int, precision: str, options: argparse.Namespace, device: torch.device) -> Heads:
    """Make random queries, keys and values."""

    def make_random(num_heads: int) -> Tensor:
        values = torch.randn(options.batch, seq_len, num_heads, options.head_dim, device=device)
        return values.to(DTYPES[precision]).requires_grad_()

    return make_random(options.heads), make_random(options.kv_heads), make_random(options.kv_heads)


def materialize_for_kernel(
    kernel: str, attention_mask: AttentionMask, shape: tuple[int, int, int], device: torch.device
) -> AttentionMask:
    """Return the mask in the form that the kernel takes: a block mask for FlexAttention, else a dense tensor."""
    if kernel != "flex":
        return materialize_mask(attention_mask, shape, device, dense=True)
    B, S, T = shape

    def allows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return attention_mask.allows(S, T, b, q, k)

    return replace(attention_mask, materialized=create_block_mask(allows, B, None, S, T, device=device))


def make_kernel_step(kernel: str, heads: Heads, attention_mask: AttentionMask) -> Callable[[], None]:
    """Return a function that runs a kernel forward and backward."""

    def run_kernel() -> None:
        with sdpa_kernel(SDPA_BACKENDS[kernel]) if kernel in SDPA_BACKENDS else nullcontext():
            out_BSHE = scaled_dot_product(*heads, attention_mask, dropout=0.0)
        torch.autograd.grad(out_BSHE, heads, torch.ones_like(out_BSHE))

    return run_kernel


def is_supported(run_kernel: Callable[[], None]) -> bool:
    """Return whether the kernel runs. The two calls are also the warm-up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backend warns why it does not run
        try:
            run_kernel()
            run_kernel()
        except (RuntimeError, NotImplementedError):
            return False
    return True


def find_chosen_kernel(heads: Heads, attention_mask: AttentionMask) -> str:
    """Return the kernel that `scaled_dot_product` chooses for this mask if no backend is forced."""
    q, k, v = (tensor.transpose(1, 2) for tensor in heads)
    if attention_mask.materialized is not None and not isinstance(attention_mask.materialized, Tensor):
        return "flex"
    is_causal, is_grouped = attention_mask.causal and attention_mask.materialized is None, q.shape[1] != k.shape[1]
    backend_id = torch._fused_sdp_choice(q, k, v, attention_mask.materialized, 0.0, is_causal, enable_gqa=is_grouped)
    return next(name for name, backend in SDPA_BACKENDS.items() if backend.value == backend_id)


def count_pairs(attention_mask: AttentionMask, shape: tuple[int, int, int], device: torch.device) -> int:
    """Count the (query, key) pairs that the mask allows, over all sequences."""
    B, S, T = shape
    q, k = torch.arange(S, device=device)[:, None], torch.arange(T, device=device)
    return sum(int(attention_mask.allows(S, T, torch.tensor(b, device=device), q, k).sum()) for b in range(B))


def make_report(results: Results) -> str:
    """Format the table."""
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
    return format_table(("mask", "tokens", "precision", "kernel  ", "ms", "TFLOP/s", "ratio"), rows)


if __name__ == "__main__":
    main()
