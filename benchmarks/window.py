"""Time causal attention with sliding windows, forward and backward, by the length of the sequence.

  causal   each token attends to all earlier tokens: F.scaled_dot_product_attention, without a mask
  dense    a window, as a boolean mask of S x S
  bands    a window, in blocks of queries that attend to the keys of their window (banded_attention)

`bands` runs on a CPU only; on a GPU the model uses FlexAttention. `chosen` marks what the model uses on this device.
`ratio` is the time of `causal` over the time of the case, the median over the rounds: above 1, the case is faster.

  python benchmarks/window.py
  python benchmarks/window.py --seq-len 2048 --window 128 512 --heads 16
"""

import argparse
import itertools
import statistics
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dist_llm.models.attention import materialize_mask, scaled_dot_product
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from measure import choose_device, measure_seconds, take_turns
from results import Results, format_table, make_parser


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    device = choose_device()
    results = Results("window", device)
    for seq_len in options.seq_len:
        for row in measure_length(seq_len, options, device):
            results.add(row)
    sizes = f"{options.batch} sequences, {options.heads} heads ({options.kv_heads} of keys) of {options.head_dim}, fp32"
    results.finish(
        f"{sizes}; {options.rounds} rounds; *: the choice of the model\n\n{make_report(results)}", options.write
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--seq-len", nargs="+", type=int, default=[1024, 2048, 4096], help="tokens; default: 1024 2048 4096"
    )
    parser.add_argument("--window", nargs="+", type=int, default=[64, 256, 1024], help="default: 64 256 1024")
    parser.add_argument("--batch", type=int, default=1, help="sequences; default: %(default)s")
    parser.add_argument("--heads", type=int, default=8, help="query heads; default: %(default)s")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads; default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, help="dimension of a head; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each case; default: %(default)s")
    return parser.parse_args()


def measure_length(seq_len: int, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure causal attention, and each window in each form; return one row per case."""
    q, k, v = (
        torch.randn(options.batch, seq_len, num_heads, options.head_dim, device=device).requires_grad_()
        for num_heads in (options.heads, options.kv_heads, options.kv_heads)
    )
    shape = (options.batch, seq_len, seq_len)
    masks: dict[str, AttentionMask] = {"causal": CAUSAL}  # the name of a case is its form and its window
    chosen = {"causal"}
    for window in (window for window in options.window if window < seq_len):
        mask = replace(CAUSAL, window=window)
        chosen_mask = materialize_mask(mask, shape, device, dense=False)
        masks[f"dense {window}"] = materialize_mask(mask, shape, device, dense=True, allow_bands=False)
        if device.type == "cpu":
            masks[f"bands {window}"] = mask
            chosen.add(f"bands {window}" if chosen_mask.materialized is None else f"dense {window}")
        else:
            masks[f"flex {window}"] = chosen_mask
            chosen.add(f"flex {window}")

    def run_once(mask: AttentionMask) -> None:
        out_BSHE = scaled_dot_product(q, k, v, mask, dropout=0.0)
        torch.autograd.grad(out_BSHE, (q, k, v), torch.ones_like(out_BSHE))

    timers = {name: partial(measure_seconds, partial(run_once, mask), device) for name, mask in masks.items()}
    take_turns(timers, 1)  # warm-up
    seconds = take_turns(timers, options.rounds)
    rows = []
    for name, case_seconds in seconds.items():
        ratios = (causal / own for causal, own in zip(seconds["causal"], case_seconds, strict=True))
        rows.append(
            {
                "seq_len": seq_len,
                "form": name.split()[0],
                "window": masks[name].window or None,
                "chosen": name in chosen,
                "seconds": statistics.median(case_seconds),
                "ratio": statistics.median(ratios),
            }
        )
    return rows


def make_report(results: Results) -> str:
    """Format the table: one row per length and form, one column per window."""
    cells = {(row["seq_len"], row["form"], row["window"]): row for row in results.rows}
    lengths, forms, windows = ([*dict.fromkeys(key[index] for key in cells)] for index in range(3))
    rows = []
    for seq_len, form in itertools.product(lengths, forms):
        row_cells = [cells.get((seq_len, form, window)) for window in windows]
        if any(row_cells):
            rows.append(
                (
                    f"{seq_len} {form}",
                    *(
                        f"{cell['seconds'] * 1000:,.1f}{' *' if cell['chosen'] else '  '} ({cell['ratio']:.2f})"
                        if cell
                        else ""
                        for cell in row_cells
                    ),
                )
            )
    header = ("ms (ratio)", *("no window" if window is None else f"window {window}" for window in windows))
    return format_table(header, rows)


if __name__ == "__main__":
    main()
