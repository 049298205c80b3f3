"""Measure the time of an optimizer update on the parameters of a named model, compared with a copy of as many bytes.

The variants:
  fused, foreach, for-loop   torch.optim.AdamW with this optim.implementation (for-loop: neither fused nor foreach)
  bf16 moments               AdamW of dist_llm, with optim.moments: bf16
  muon                       Muon of dist_llm (optim.name: muon), on one process
  norm, scale                gradient clipping of dist_llm: the global norm, and the scaling of the gradients
  clip_grad_norm_            torch.nn.utils.clip_grad_norm_, which does both

All variants use the same parameters and gradients and take turns. There is one row per variant, with these keys:
  way                the variant
  ratio              the time of `fused` over the time of the variant: the median over the rounds
  bytes_per_second   the bytes that the variant needs to read and write, over its time
  copy               the bytes per second of a copy that reads and writes 28 bytes per parameter
  of_copy            bytes_per_second over copy

The needed bytes count each value once. AdamW needs 28 bytes per parameter: it reads the weight, the gradient and two
moments, and writes all but the gradient. With bf16 moments it needs 20 bytes. Muon counts as AdamW, although its time
goes into matrix products. The norm needs 4 bytes, the scaling 8, and clip_grad_norm_ 12. `of_copy` can exceed 1,
because a CPU also reads the memory that a copy overwrites. These reads are not counted.

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
from dist_llm.param_spec import collect_param_specs
from measure import choose_device, measure_copy_rate, measure_seconds, take_turns
from named_models import NAMED_MODELS, make_named_config
from results import Results, format_table, make_parser, parse_options

VARIANTS: dict[str, dict[str, str]] = {  # keys of the section `optim`
    "fused": {"implementation": "fused"},
    "foreach": {"implementation": "foreach"},
    "for-loop": {"implementation": "foreach"},  # measure_case then disables foreach
    "bf16 moments": {"moments": "bf16"},
    "muon": {"name": "muon"},
}
BYTES_PER_PARAMETER = {**dict.fromkeys(VARIANTS, 28), "bf16 moments": 20, "norm": 4, "scale": 8, "clip_grad_norm_": 12}


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    device = choose_device()
    results = Results("optimizer", device)
    for model in options.models or ["gpt2-124m" if device.type == "cuda" else "llama-cpu"]:
        for row in measure_case(model, options, device):
            results.add({"model": model, **row})
    results.finish(f"{options.rounds} rounds\n\n{make_report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=NAMED_MODELS, help="default: one model that fits the device")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each variant; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys: model.n_layers=2")
    return parse_options(parser)


def measure_case(model_name: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Measure each variant on the parameters of a model; return one row per variant."""
    config = make_named_config(model_name, options.overrides)
    with torch.device("meta"):
        model = build_model(config.model)
    model.to_empty(device=device)
    parameters, specs = list(model.parameters()), collect_param_specs(model)
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.randn_like(parameter) * 1e-3
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    updates: dict[str, Callable[[], object]] = {}
    for variant, keys in VARIANTS.items():
        optimizer = build_optimizer(
            parse_union(OptimConfig, config.optim.model_dump() | keys), model.named_parameters(), specs
        )
        if variant == "for-loop":
            for group in optimizer.param_groups:
                group["foreach"] = False
        updates[variant] = partial(take_step, optimizer, dict(zip(parameters, gradients, strict=True)))
    updates["norm"] = lambda: gradient_clipping.compute_global_norm(gradients)
    updates["scale"] = lambda: gradient_clipping.clip_grads_(gradients, torch.ones((), device=device), max_norm=1.0)
    updates["clip_grad_norm_"] = lambda: nn.utils.clip_grad_norm_(parameters, 1.0)
    timers: dict[str, Callable[[], float]] = {
        variant: partial(measure_seconds, update, device) for variant, update in updates.items()
    }
    num_parameters = sum(parameter.numel() for parameter in parameters)
    # A copy of n bytes reads and writes 2 n bytes.
    copied_bytes = num_parameters * BYTES_PER_PARAMETER["fused"] // 2
    timers["copy"] = lambda: measure_copy_rate(device, copied_bytes, tries=1)
    take_turns(timers, rounds=1)  # warm up
    measurements = take_turns(timers, options.rounds)  # seconds by variant; bytes/s of the copy
    copy_bytes_per_second = statistics.median(measurements["copy"])
    rows = []
    for variant in updates:
        median_seconds = statistics.median(measurements[variant])
        bytes_per_second = num_parameters * BYTES_PER_PARAMETER[variant] / median_seconds
        fused_over_variant = statistics.median(
            fused_seconds / variant_seconds
            for fused_seconds, variant_seconds in zip(measurements["fused"], measurements[variant], strict=True)
        )
        figures = {
            "seconds": median_seconds,
            "ratio": fused_over_variant,
            "bytes_per_second": bytes_per_second,
            "copy": copy_bytes_per_second,
            "of_copy": bytes_per_second / copy_bytes_per_second,
        }
        rows.append({"way": variant, "parameters": num_parameters, "tensors": len(parameters), **figures})
    return rows


def take_step(optimizer: torch.optim.Optimizer, gradients: dict[nn.Parameter, torch.Tensor]) -> None:
    """Take a step; first set the gradients again, since Muon removes them."""
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    optimizer.step()


def make_report(results: Results) -> str:
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
    header = ("model", "variant", "M parameters", "tensors", "ms", "fused / variant", "GB/s", "copy's GB/s", "of copy")
    return format_table(header, rows)


if __name__ == "__main__":
    main()
