"""Measure time and memory of the last layer: norm, output projection and cross-entropy, forward and backward.

  whole   F.linear, then F.cross_entropy over all logits at once
  head    dist_llm.models.decoder.Head with its loss, as in training
  liger   the fused linear cross-entropy of Liger, on a GPU if liger_kernel is installed

The cases start from the same values and take turns, each in its own process. `peak` is the memory above that before the
activations, the weight and their gradients are allocated. `ratio` is the time of `whole` over the time of the case, the
median over the rounds. `memory` is the peak of the case over the peak of `whole`. `of_matmul` is the rate of the three
matrix products of forward and backward (6NDV FLOPs for N tokens) over the rate of a plain matrix product; FLOPs that a
head recomputes are not counted.

Shape suffixes: B, batch; S, tokens of a sequence; N, tokens of the batch; D, d_model; V, vocabulary.

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
from named_models import make_named_config
from results import Results, format_table, make_parser, parse_options

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    device = choose_device()
    results = Results("loss", device)
    matmul_rates = {}
    for precision in choose_precisions(options.precision, device):
        keys = [f"model.d_model={options.d_model}", f"model.vocab_size={options.vocabulary}", f"precision={precision}"]
        config = make_named_config("llama-cpu", [*keys, "model.n_heads=1", "model.n_kv_heads=1", *options.overrides])
        names = [name for name in LOSSES if name != "liger" or (device.type == "cuda" and find_spec("liger_kernel"))]
        with start_workers(
            {name: (make_turn, name, config, options.tokens, device) for name in names}
        ) as workers_by_name:
            turns: dict[str, Callable[[], Any]] = {name: worker.take_turn for name, worker in workers_by_name.items()}
            take_turns(turns, rounds=1)
            turns["limit"] = partial(measure_matmul_rate, device, precision)
            results_by_case = take_turns(turns, options.rounds)
        matmul_rates[precision] = max(results_by_case["limit"])
        for name in names:
            results.add({"case": name, "precision": precision, **make_row(name, results_by_case, options)})
    rates = ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {precision}" for precision, rate in matmul_rates.items())
    sizes = f"{options.tokens} tokens x {options.d_model} x {options.vocabulary}; {options.rounds} rounds; "
    results.finish(f"{sizes}a matrix product: {rates}\n\n{make_report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a batch; default: %(default)s")
    parser.add_argument("--d-model", type=int, default=512, help="width of the model; default: %(default)s")
    parser.add_argument("--vocabulary", type=int, default=32000, help="number of token ids; default: %(default)s")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "bf16"),
        help="default: both, without bf16 on a CPU that lacks bf16 instructions",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each case; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys: loss.z_loss=1e-4")
    return parse_options(parser)


def make_turn(name: str, config: Config, num_tokens: int, device: torch.device) -> Callable[[], dict[str, Any]]:
    """Return a function that runs forward and backward of one case and measures them; it runs in a worker process."""
    peak = PeakMemory(device)
    generator = torch.Generator().manual_seed(1)
    model = config.model
    head = Head(model, CrossEntropy(config.loss.label_smoothing, config.loss.z_loss))
    assert head.out is not None
    nn.init.normal_(head.out.weight, std=model.init_std, generator=generator)
    head.to(device)
    x_BSD = torch.randn(1, num_tokens, model.d_model, generator=generator).to(device).requires_grad_()
    targets_BS = torch.randint(model.vocab_size, (1, num_tokens), generator=generator).to(device)
    compute_loss = LOSSES[name](head)
    autocast = torch.autocast(device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()

    def run_once() -> float:
        with autocast:
            mean_loss = compute_loss(x_BSD, targets_BS)
        mean_loss.backward()
        return mean_loss.item()

    def take_turn() -> dict[str, Any]:
        x_BSD.grad = None
        head.zero_grad()
        losses: list[float] = []
        elapsed_seconds = measure_seconds(lambda: losses.append(run_once()), device)
        assert x_BSD.grad is not None
        gradient_norm = x_BSD.grad.norm().item()
        return {"seconds": elapsed_seconds, "peak": peak.read_bytes(), "loss": losses[0], "grad_norm": gradient_norm}

    return take_turn


def make_full_logits_loss(head: Head) -> Loss:
    """Make a mean loss that computes all logits at once."""
    assert head.out is not None
    weight_VD = head.out.weight

    def loss(x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        logits_BSV = F.linear(head.norm(x_BSD), weight_VD[: head.vocab_size])
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())

    return loss


def make_head_loss(head: Head) -> Loss:
    """Make a mean loss from the loss of the head, as in training."""
    return lambda x_BSD, targets_BS: head(x_BSD, None, targets_BS).sum() / targets_BS.numel()


def make_liger_loss(head: Head) -> Loss:
    """Make a mean loss with Liger. It ignores autocast, so the inputs are cast to the autocast dtype here."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # type: ignore[import-not-found]

    assert head.out is not None
    weight_VD = head.out.weight

    def loss(x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
        hidden_ND = head.norm(x_BSD).flatten(0, 1).to(dtype)
        return liger_fused_linear_cross_entropy(hidden_ND, weight_VD[: head.vocab_size].to(dtype), targets_BS.flatten())

    return loss


LOSSES: dict[str, Callable[[Head], Loss]] = {
    "whole": make_full_logits_loss,
    "head": make_head_loss,
    "liger": make_liger_loss,
}


def make_row(name: str, results_by_case: dict[str, list[Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Make the row of a case: medians over the rounds, and ratios to `whole`."""
    turns, baseline_turns = results_by_case[name], results_by_case["whole"]
    median_seconds = statistics.median(turn["seconds"] for turn in turns)
    ratios = [base["seconds"] / turn["seconds"] for turn, base in zip(turns, baseline_turns, strict=True)]
    flops = 6 * options.tokens * options.d_model * options.vocabulary
    return {
        "seconds": median_seconds,
        "ratio": statistics.median(ratios),
        "peak": turns[-1]["peak"],
        "memory": turns[-1]["peak"] / baseline_turns[-1]["peak"],
        "of_matmul": flops / median_seconds / max(results_by_case["limit"]),
        "loss": turns[-1]["loss"],
        "grad_norm": turns[-1]["grad_norm"],
    }


def make_report(results: Results) -> str:
    """Format the table."""
    rows = [
        (
            row["case"],
            row["precision"],
            f"{row['seconds'] * 1000:,.1f}",
            f"{row['ratio']:.3f}",
            f"{row['peak'] / 1e6:,.0f}",
            f"{row['memory']:.3f}",
            f"{row['of_matmul']:.3f}",
            f"{row['loss']:.5f}",
            f"{row['grad_norm']:.5g}",
        )
        for row in results.rows
    ]
    header = ("case", "precision", "ms", "ratio", "peak MB", "memory", "of matmul", "loss", "grad norm")
    return format_table(header, rows)


if __name__ == "__main__":
    main()
