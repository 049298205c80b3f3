"""Measure what the update costs: AdamW over the parameters of a named model, compared with a copy of as many bytes.

  fused, foreach, for-loop   torch.optim.AdamW by optim.implementation (for-loop: neither)
  bf16 moments               ours, with optim.moments: bf16
  muon                       ours, with optim.name: muon, on one process
  norm, scale                our clipping: the global norm, and the gradients scaled by it
  clip_grad_norm_            torch's, both in one

All use the same parameters and gradients and take turns. Bytes are those read and written if each value is touched
once: weight, gradient and two moments are read, all but the gradient written (28 per parameter; 20 with moments in
bf16; Muon, which spends its time in products, counts as AdamW); 4 for the norm, 8 for scaling, 12 for both. `of_copy`
is their rate relative to torch's copy of as many bytes as AdamW's; a CPU also reads what a copy overwrites, which is
not counted, so more than 1 is possible. `ratio` is the time of `fused` over that of the case, by round.

  python benchmarks/optimizer.py
  python benchmarks/optimizer.py --models gpt2-124m llama-1b
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_llm.config.optim_sections import OptimConfig
from dist_llm.config.section import parse_union
from dist_llm.models.build_model import build_model
from dist_llm.optim import gradient_clipping
from dist_llm.optim.build_optimizer import build_optimizer
from measure import any_device, copy_rate, seconds, take_turns
from models import MODELS, make_config
from results import Results, format_table, make_parser, parse_options

WAYS: dict[str, dict[str, str]] = {
    "fused": {"implementation": "fused"},
    "foreach": {"implementation": "foreach"},
    "for-loop": {"implementation": "foreach"},
    "bf16 moments": {"moments": "bf16"},
    "muon": {"name": "muon"},
}
BYTES = {**dict.fromkeys(WAYS, 28), "bf16 moments": 20, "norm": 4, "scale": 8, "clip_grad_norm_": 12}


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    device = any_device()
    results = Results("optimizer", device)
    for model in options.models or ["gpt2-124m" if device.type == "cuda" else "llama-cpu"]:
        for row in measure_case(model, options, device):
            results.add({"model": model, **row})
    results.finish(f"{options.rounds} rounds\n\n{report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: one that fits the device")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: model.n_layers=2")
    return parse_options(parser)


def measure_case(name: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure each way, one row each."""
    config = make_config(name, options.overrides)
    with torch.device("meta"):
        model = build_model(config.model)
    model.to_empty(device=device)
    parameters = list(model.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.randn_like(parameter) * 1e-3
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    work: dict[str, Callable[[], object]] = {}
    for way, keys in WAYS.items():
        optimizer = build_optimizer(
            parse_union(OptimConfig, config.optim.model_dump() | keys), model.named_parameters()
        )
        for group in optimizer.param_groups if way == "for-loop" else []:
            group["foreach"] = False
        work[way] = partial(take_step, optimizer, dict(zip(parameters, gradients, strict=True)))
    work["norm"] = lambda: gradient_clipping.global_norm(gradients)
    work["scale"] = lambda: gradient_clipping.clip_grads_(gradients, torch.ones((), device=device), 1.0)
    work["clip_grad_norm_"] = lambda: nn.utils.clip_grad_norm_(parameters, 1.0)
    timers: dict[str, Callable[[], float]] = {way: partial(seconds, each, device) for way, each in work.items()}
    count = sum(parameter.numel() for parameter in parameters)
    timers["copy"] = lambda: copy_rate(device, count * BYTES["fused"] // 2, tries=1)
    take_turns(timers, 1)
    times_by_way = take_turns(timers, options.rounds)
    copy_bytes_per_second = statistics.median(times_by_way["copy"])
    rows = []
    for way in work:
        median_seconds = statistics.median(times_by_way[way])
        rate = count * BYTES[way] / median_seconds
        ratio = statistics.median(a / b for a, b in zip(times_by_way["fused"], times_by_way[way], strict=True))
        figures = {
            "seconds": median_seconds,
            "ratio": ratio,
            "bytes_per_second": rate,
            "copy": copy_bytes_per_second,
            "of_copy": rate / copy_bytes_per_second,
        }
        rows.append({"way": way, "parameters": count, "tensors": len(parameters), **figures})
    return rows


def take_step(optimizer: torch.optim.Optimizer, gradients: dict[nn.Parameter, torch.Tensor]) -> None:
    """Take a step with the given gradients, which Muon removes."""
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    optimizer.step()


def report(results: Results) -> str:
    """Format the table."""
    rows = [
        (
            row["model"],
            row["way"],
            f"{row['parameters'] / 1e6:,.1f}",
            row["tensors"],
            f"{row['seconds'] * 1000:,.1f}",
            f"{row['ratio']:.2f}",
            f"{row['bytes_per_second'] / 1e9:,.2f}",
            f"{row['copy'] / 1e9:,.2f}",
            f"{row['of_copy']:.2f}",
        )
        for row in results.rows
    ]
    header = ("model", "way", "M parameters", "tensors", "ms", "ratio", "GB/s", "copy's GB/s", "of copy")
    return format_table(header, rows)


if __name__ == "__main__":
    main()
