"""Measure a mixture of experts on a CPU: its matrix products, its speed, and the bytes that its tokens send.

  products  the products of all experts as one grouped product, relative to a loop over the experts; forward and
            backward of one linear layer, fp32, random experts
  model     tokens/s of a model with experts, relative to a dense model whose tokens use equally many weights (beside
            those of the router); training steps on one process
  bytes     bytes that dispatch and combine send to other ranks in one training step, on gloo ranks, and the formula
            for a balanced load

The cases of `products` and of `model` take turns in one process. `ratio` is a speed: above 1, the grouped product or
the model with experts is faster. It is the median over the rounds. `cpu_ratio` compares CPU seconds instead of elapsed
time: use it on a busy machine. `bytes` measures no time.

  python benchmarks/experts.py
  python benchmarks/experts.py --parts products --rounds 30
  python benchmarks/experts.py --parts model model.d_model=512 data.seq_len=512
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dist_llm.engines.native import NativeEngine
from dist_llm.models.grouped_linear import grouped_linear
from dist_llm.training.step import train_step
from expert_traffic import DENSE, EXPERT_MODELS, count_in_processes, make_expert_config, make_microbatches
from measure import ResourceUsage, measure_seconds, take_turns
from results import Results, format_table, make_parser, parse_options

CPU = torch.device("cpu")
# (experts, inputs, outputs) of a linear layer
PRODUCTS = ((8, 256, 512), (64, 128, 128))
PARTS = ("products", "model", "bytes")


def main() -> None:
    """Measure and print each part."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    results = Results("experts", CPU)
    if "products" in options.parts:
        for num_experts, num_inputs, num_outputs in PRODUCTS:
            results.add(measure_products(num_experts, num_inputs, num_outputs, options))
    if "model" in options.parts:
        for row in measure_models(options):
            results.add(row)
    if "bytes" in options.parts:
        for ranks in options.ranks:
            results.add({"part": "bytes", **count_in_processes(ranks, options.overrides)})
    results.finish(f"{options.rounds} rounds\n\n{make_report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--rows", type=int, default=4096, help="products: rows of all experts; default: %(default)s")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="bytes: ranks; default: 2 4")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each case; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys of the models")
    return parse_options(parser)


# --- products


def loop_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows of each expert by the transposed matrix of the expert, one expert after another."""
    groups = x_RI.tensor_split(ends_E.tolist()[:-1])
    return torch.cat([x_rI @ weight_OI.T for x_rI, weight_OI in zip(groups, weight_EOI, strict=True)])


def measure_products(
    num_experts: int, num_inputs: int, num_outputs: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Time the grouped product and the loop of one linear layer, forward and backward; return the row."""
    generator = torch.Generator().manual_seed(1)
    x_RI = torch.randn(options.rows, num_inputs, generator=generator).requires_grad_()
    weight_EOI = torch.randn(num_experts, num_outputs, num_inputs, generator=generator).requires_grad_()
    experts_R = torch.randint(num_experts, (options.rows,), generator=generator)
    ends_E = experts_R.bincount(minlength=num_experts).cumsum(0).to(torch.int32)

    def make_step(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def run_once() -> None:
            y_RO = function(x_RI, weight_EOI, ends_E)
            torch.autograd.grad(y_RO, (x_RI, weight_EOI), torch.ones_like(y_RO))

        return run_once

    turns = take_paired_turns({"grouped": make_step(grouped_linear), "loop": make_step(loop_linear)}, options.rounds)
    case = f"{num_experts} experts, {num_inputs} x {num_outputs}, {options.rows} rows"
    return {"part": "products", "case": case, **compare_turns(turns["grouped"], turns["loop"])}


def take_paired_turns(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Run each step once to warm up, then once per round; return the seconds and CPU seconds of each turn."""

    def make_turn(step: Callable[[], object]) -> Callable[[], dict[str, float]]:
        def take_turn() -> dict[str, float]:
            usage = ResourceUsage()
            return {"seconds": measure_seconds(step, CPU), **usage.read()}

        return take_turn

    for step in steps.values():
        step()
    return take_turns({name: make_turn(step) for name, step in steps.items()}, rounds)


def compare_turns(turns: list[dict[str, float]], baseline_turns: list[dict[str, float]]) -> dict[str, float]:
    """Return the median seconds of a case, and its speed relative to the baseline."""
    row = {"seconds": statistics.median(turn["seconds"] for turn in turns)}
    for name, label in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
        ratios = [baseline[name] / turn[name] for turn, baseline in zip(turns, baseline_turns, strict=True)]
        row |= {label: statistics.median(ratios), f"min_{label}": min(ratios), f"max_{label}": max(ratios)}
    return row


# --- model


def measure_models(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time training steps of all models; return a row per model."""

    def make_step(model: str) -> Callable[[], object]:
        config = make_expert_config(model, options.overrides)
        engine = NativeEngine(config, CPU)
        microbatches = make_microbatches(config, engine)
        return lambda: train_step(engine, microbatches, config.optim.lr, step=0).loss.item()

    turns = take_paired_turns({model: make_step(model) for model in EXPERT_MODELS}, options.rounds)
    data = make_expert_config(DENSE, options.overrides).data
    rows = []
    for model in EXPERT_MODELS:
        speeds = compare_turns(turns[model], turns[DENSE])
        tokens_per_second = data.global_batch * data.seq_len / speeds["seconds"]
        rows.append({"part": "model", "case": model, **speeds, "tokens_per_second": tokens_per_second})
    return rows


def make_report(results: Results) -> str:
    """Format a table of the speeds and a table of the bytes."""
    names = ("ratio", "min_ratio", "max_ratio", "cpu_ratio", "min_cpu_ratio", "max_cpu_ratio")
    speeds = [
        (row["case"], f"{row['seconds'] * 1000:,.1f}", *(f"{row[name]:.2f}" for name in names))
        for row in results.rows
        if row["part"] != "bytes"
    ]
    traffic = [
        (row["case"], row["calls"], *(f"{row[name]:,}" for name in ("row_bytes", "balanced_row_bytes", "count_bytes")))
        for row in results.rows
        if row["part"] == "bytes"
    ]
    header = ("case", "ms", *(name.replace("_", " ") for name in names))
    tables = [format_table(header, speeds)] if speeds else []
    if traffic:
        tables.append(format_table(("all ranks", "calls", "rows, bytes", "balanced", "counts, bytes"), traffic))
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
