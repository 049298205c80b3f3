"""Measure what the last layer costs: norm, product with the vocabulary and cross-entropy, forward and backward.

  whole   F.linear, then F.cross_entropy over all logits at once
  head    dist_llm.models.decoder.Head with its loss, as in training
  liger   Liger's fused linear cross-entropy, on a GPU if liger_kernel is installed

Each starts from the same values, in its own process, so that its peak memory is its own; they take turns. `peak` is
above the memory in use before the activations, the weight and their gradients. `ratio` is the time of `whole` over that
of the case, by round, and `memory` the peak of the case over that of `whole`. `of_matmul` is the rate of 6NDV FLOPs,
the three products of forward and backward, over that of a plain matrix product; what a head recomputes is not counted.

  python benchmarks/loss.py
  python benchmarks/loss.py --tokens 16384 --d-model 4096 --vocabulary 128256 --precision bf16
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.schema import Config
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.decoder import Head
from measure import (
    PeakMemory,
    choose_device,
    choose_precisions,
    measure_matmul_rate,
    measure_seconds,
    start_workers,
    take_turns,
)
from models import make_config
from results import Results, format_table, make_parser, parse_options

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    device = choose_device()
    results = Results("loss", device)
    limits = {}
    for precision in choose_precisions(options.precision, device):
        keys = [f"model.d_model={options.d_model}", f"model.vocab_size={options.vocabulary}", f"precision={precision}"]
        config = make_config("llama-cpu", [*keys, "model.n_heads=1", "model.n_kv_heads=1", *options.overrides])
        names = [name for name in LOSSES if name != "liger" or (device.type == "cuda" and find_spec("liger_kernel"))]
        with start_workers(
            {name: (make_turn, name, config, options.tokens, device) for name in names}
        ) as workers_by_name:
            turns: dict[str, Callable[[], Any]] = {name: worker.take_turn for name, worker in workers_by_name.items()}
            take_turns(turns, 1)
            turns["limit"] = partial(measure_matmul_rate, device, precision)
            results_by_case = take_turns(turns, options.rounds)
        limits[precision] = max(results_by_case["limit"])
        for name in names:
            results.add({"case": name, "precision": precision, **make_row(name, results_by_case, options)})
    rates = ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {precision}" for precision, rate in limits.items())
    sizes = f"{options.tokens} tokens x {options.d_model} x {options.vocabulary}; {options.rounds} rounds; "
    results.finish(f"{sizes}a matrix product: {rates}\n\n{make_report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--d-model", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=32000, help="default: %(default)s")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), help="default: both, without bf16 on a CPU that has none"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: loss.z_loss=1e-4")
    return parse_options(parser)


def make_turn(name: str, config: Config, tokens: int, device: torch.device) -> Callable[[], dict[str, Any]]:
    """Return a function that runs forward and backward of one case."""
    peak = PeakMemory(device)
    generator = torch.Generator().manual_seed(1)
    model = config.model
    head = Head(model, CrossEntropy(config.loss.label_smoothing, config.loss.z_loss))
    assert head.out is not None
    nn.init.normal_(head.out.weight, std=model.init_std, generator=generator)
    head.to(device)
    x_BSD = torch.randn(1, tokens, model.d_model, generator=generator).to(device).requires_grad_()
    targets_BS = torch.randint(model.vocab_size, (1, tokens), generator=generator).to(device)
    loss = LOSSES[name](head)
    autocast = torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()

    def run_once() -> float:
        with autocast:
            mean = loss(x_BSD, targets_BS)
        mean.backward()
        return mean.item()

    def take_turn() -> dict[str, Any]:
        x_BSD.grad = None
        head.zero_grad()
        values: list[float] = []
        elapsed = measure_seconds(lambda: values.append(run_once()), device)
        assert x_BSD.grad is not None
        return {"seconds": elapsed, "peak": peak.read_bytes(), "loss": values[0], "grad_norm": x_BSD.grad.norm().item()}

    return take_turn


def full_logits_loss(head: Head) -> Loss:
    """Compute all logits at once."""
    assert head.out is not None
    weight_VD = head.out.weight

    def loss(x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        logits_BSV = F.linear(head.norm(x_BSD), weight_VD[: head.vocab_size])
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())

    return loss


def head_loss(head: Head) -> Loss:
    """Use the loss of the head."""
    return lambda x_BSD, targets_BS: head(x_BSD, None, targets_BS).sum() / targets_BS.numel()


def liger_loss(head: Head) -> Loss:
    """Use Liger's loss, which ignores autocast: its inputs are cast as autocast casts those of a product."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # type: ignore[import-not-found]

    assert head.out is not None
    weight_VD = head.out.weight

    def loss(x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
        hidden_ND = head.norm(x_BSD).flatten(0, 1).to(dtype)
        return liger_fused_linear_cross_entropy(hidden_ND, weight_VD[: head.vocab_size].to(dtype), targets_BS.flatten())

    return loss


LOSSES: dict[str, Callable[[Head], Loss]] = {"whole": full_logits_loss, "head": head_loss, "liger": liger_loss}


def make_row(name: str, results_by_case: dict[str, list[Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Make the row of a case: medians over the rounds, and ratios to `whole`."""
    results, base_results = results_by_case[name], results_by_case["whole"]
    elapsed = statistics.median(turn["seconds"] for turn in results)
    flops = 6 * options.tokens * options.d_model * options.vocabulary
    return {
        "seconds": elapsed,
        "ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in zip(results, base_results, strict=True)),
        "peak": results[-1]["peak"],
        "memory": results[-1]["peak"] / base_results[-1]["peak"],
        "of_matmul": flops / elapsed / max(results_by_case["limit"]),
        "loss": results[-1]["loss"],
        "grad_norm": results[-1]["grad_norm"],
    }


def make_report(results: Results) -> str:
    """Format the table."""
    rows = [
        (
            r["case"],
            r["precision"],
            f"{r['seconds'] * 1000:,.1f}",
            f"{r['ratio']:.3f}",
            f"{r['peak'] / 1e6:,.0f}",
            f"{r['memory']:.3f}",
            f"{r['of_matmul']:.3f}",
            f"{r['loss']:.5f}",
            f"{r['grad_norm']:.5g}",
        )
        for r in results.rows
    ]
    header = ("case", "precision", "ms", "ratio", "peak MB", "memory", "of matmul", "loss", "grad norm")
    return format_table(header, rows)


if __name__ == "__main__":
    main()
