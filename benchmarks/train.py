"""Measure training speed: tokens/s, MFU and peak memory of the native engine and of a plain PyTorch loop.

native  the step of the native engine, as in training, on a batch made before (benchmarks/data.py measures loading)
plain   another implementation of the same model and loop (benchmarks/bare.py), with the same initial weights and tokens
limit   FLOP/s of a matrix product of the same precision, 2048 x 2048 on a CPU, 8192 x 8192 on a GPU; the best of all
        rounds

The two steps have their own processes, so that their peak memories are separate. They take turns of a few steps in the
order native, plain, plain, native, with the matrix product in between. Keys without a prefix belong to the native
engine, keys with `plain_` to the plain loop. `loss` and `plain_loss` are the losses of the first step and should agree.
The other keys:

  ratio       tokens_per_second over plain_tokens_per_second, the median over the rounds; min_ratio and max_ratio are
              its extremes
  cpu_ratio   the ratio with CPU seconds instead of elapsed time: more reliable on a busy machine, with
              OMP_NUM_THREADS=1 so that no thread spins while it waits
  memory      peak over plain_peak, the peak memory in bytes
  mfu         FLOP/s by the convention of metrics.jsonl (6N + 12LHES per token) over the data-sheet peak of a known GPU,
              or else over the limit
  of_matmul   FLOP/s of the matrix products that are computed, over the limit: only the causal half of attention, with
              the scores that backward recomputes (7 products per head, as in flash kernels), and with --recompute
  faults      page faults per step: on a CPU, large temporary tensors
  system      fraction of the CPU seconds that the operating system uses

With --compile, the native engine compiles each block, and the plain loop the complete model. With --recompute, the
plain loop uses activation checkpointing for each block, also if the native engine recomputes selectively.

  python benchmarks/train.py                                        two small models, or two medium ones on a GPU
  python benchmarks/train.py --models llama-cpu --precision bf16 --profile
  python benchmarks/train.py --models llama-1b --compile no yes --recompute none selective --seq-len 2048 8192
  python benchmarks/train.py --models gpt2-124m model.vocab_size=50257 loss.z_loss=1e-4
  python benchmarks/train.py --models llama-1b --precision bf16 --compile yes fp8=true   (plain and the limit stay bf16)
"""

import argparse
import itertools
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bare import Loop, Model
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.launch.host_memory import keep_freed_memory
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.models.build_model import build_param_specs
from dist_llm.models.init import init_param_
from dist_llm.objectives.batch import Batch
from dist_llm.observe.flops import CONVENTION, count_flops_per_token, count_matmul_weights, find_peak_flops
from dist_llm.training.step import train_step
from measure import (
    PeakMemory,
    ResourceUsage,
    choose_device,
    choose_precisions,
    measure_matmul_rate,
    measure_seconds,
    start_workers,
    take_turns,
)
from named_models import NAMED_MODELS, make_named_config
from results import Results, format_table, make_parser, parse_options

WARM_UP_STEPS = 2
Turn = Callable[..., dict[str, Any]]  # (number of steps, profiling=False) -> measurements


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler logs its starts and stops
    device = choose_device()
    models = options.models or (["gpt2-124m", "llama-160m"] if device.type == "cuda" else ["gpt2-cpu", "llama-cpu"])
    results = Results("train", device)
    profiles: list[str] = []
    grid = itertools.product(
        models, choose_precisions(options.precision, device), options.compile, options.recompute, options.seq_len
    )
    for model, precision, compiled, recompute, seq_len in grid:
        keys = [f"precision={precision}", f"compile={compiled == 'yes'}", f"parallel.recompute={recompute}"]
        keys += [f"data.seq_len={seq_len}"] if seq_len else []
        keys += [f"data.global_batch={options.batch}"] if options.batch else []
        row, profiles_by_side = measure_case(make_named_config(model, [*keys, *options.overrides]), options, device)
        results.add({"model": model, **row})
        profiles += [f"\n{model}, {precision}, {side}\n{text}" for side, text in profiles_by_side.items()]
    results.finish("\n".join([make_report(results, options), *profiles]), options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        choices=NAMED_MODELS,
        help=f"default: two that fit the device; one of {' '.join(NAMED_MODELS)}",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "bf16"),
        help="default: both, without bf16 on a CPU that lacks bf16 instructions",
    )
    parser.add_argument(
        "--compile", nargs="+", choices=("no", "yes"), default=["no"], help="use torch.compile; default: no"
    )
    parser.add_argument(
        "--recompute", nargs="+", choices=("none", "full", "selective"), default=["none"], help="default: none"
    )
    parser.add_argument(
        "--seq-len", nargs="+", type=int, default=[0], help="tokens of a sequence; default: named_models.py"
    )
    parser.add_argument("--batch", type=int, default=0, help="sequences of a step; default: named_models.py")
    parser.add_argument("--rounds", type=int, default=4, help="turns of native and of plain; default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn; default: %(default)s")
    parser.add_argument("--profile", action="store_true", help="show which operators take the time (torch.profiler)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys: model.qk_norm=true")
    return parse_options(parser)


def measure_case(
    config: Config, options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure both sides, native and plain, with one config; return the row, and with --profile the profile by side."""
    with start_workers({side: (make_side, config, device) for side, make_side in SIDES.items()}) as workers_by_side:
        first_turns = {side: worker.take_turn(WARM_UP_STEPS) for side, worker in workers_by_side.items()}
        cases: dict[str, Callable[[], Any]] = {
            side: partial(worker.take_turn, options.steps) for side, worker in workers_by_side.items()
        }
        cases["limit"] = partial(measure_matmul_rate, device, config.precision)
        turns_by_case = take_turns(cases, options.rounds)
        profiles_by_side = {}
        if options.profile:
            for side, worker in workers_by_side.items():
                profiles_by_side[side] = worker.take_turn(1, True)["profile"]
    return make_row(config, options.steps, first_turns, turns_by_case, device), profiles_by_side


def make_row(
    config: Config,
    num_steps: int,
    first_turns: dict[str, Any],
    turns_by_case: dict[str, list[Any]],
    device: torch.device,
) -> dict[str, Any]:
    """Make the row of a config: medians over its turns. `first_turns` has the losses of the first step."""
    data, limit = config.data, max(turns_by_case["limit"])
    pairs = list(zip(turns_by_case["native"], turns_by_case["plain"], strict=True))
    ratios = [plain_turn["seconds"] / native_turn["seconds"] for native_turn, plain_turn in pairs]
    median = {
        side: {name: statistics.median(turn[name] for turn in turns_by_case[side]) for name in turns_by_case[side][0]}
        for side in SIDES
    }
    tokens_per_turn = data.global_batch * data.seq_len * num_steps
    native_rate, plain_rate = (tokens_per_turn / median[side]["seconds"] for side in SIDES)
    if device.type == "cuda":
        peak_flops_per_second, peak_source = find_peak_flops(device, config.precision)
    else:
        peak_flops_per_second, peak_source = limit, "the limit"
    computed_flops = compute_exact_flops(config)
    return {
        "precision": config.precision,
        "compile": config.compile,
        "recompute": config.parallel.recompute,
        "seq_len": data.seq_len,
        "batch": data.global_batch,
        "tokens_per_second": native_rate,
        "plain_tokens_per_second": plain_rate,
        "ratio": statistics.median(ratios),
        "min_ratio": min(ratios),
        "max_ratio": max(ratios),
        "cpu_ratio": statistics.median(
            plain_turn["cpu_seconds"] / native_turn["cpu_seconds"] for native_turn, plain_turn in pairs
        ),
        "mfu": native_rate * count_flops_per_token(config.model, data.seq_len) / peak_flops_per_second,
        "mfu_of": peak_source,
        "limit": limit,
        "of_matmul": native_rate * computed_flops / limit,
        "plain_of_matmul": plain_rate * computed_flops / limit,
        "peak": median["native"]["peak"],
        "plain_peak": median["plain"]["peak"],
        "memory": median["native"]["peak"] / median["plain"]["peak"],
        "faults": median["native"]["faults"] / num_steps,
        "plain_faults": median["plain"]["faults"] / num_steps,
        "system": median["native"]["system"],
        "plain_system": median["plain"]["system"],
        "loss": first_turns["native"]["loss"],
        "plain_loss": first_turns["plain"]["loss"],
    }


def compute_exact_flops(config: Config) -> float:
    """Compute the FLOPs per token of the matrix products of a step; see `of_matmul` in the docstring of the module."""
    model, seq_len = config.model, config.data.seq_len
    recomputes_all = config.parallel.recompute == "full"
    block_weights = count_matmul_weights(model) - model.d_model * model.vocab_size
    mean_num_keys = (seq_len + 1) / 2  # per token, with a causal mask
    attention_product = 2 * model.n_layers * model.n_heads * model.head_dim * mean_num_keys
    num_products = 9 if recomputes_all else 7
    recomputed = 2 * block_weights if recomputes_all else 0
    return 6 * count_matmul_weights(model) + recomputed + num_products * attention_product


def make_native_stepper(config: Config, device: torch.device) -> Turn:
    """Make the function that takes turns of the native engine."""
    peak = start_memory_peak(config, device)
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    engine = NativeEngine(config, device)
    tokens = make_tokens(config)
    batches = [Batch.build(tokens[:, :-1], tokens[:, 1:], CAUSAL)]
    return make_turn(lambda: train_step(engine, batches, config.optim.lr).loss, device, peak)


def make_plain_stepper(config: Config, device: torch.device) -> Turn:
    """Make the function that takes turns of the plain loop, with the initial weights of the native engine."""
    peak = start_memory_peak(config, device)
    with torch.device(device):
        model = Model(config.model, recompute=config.parallel.recompute != "none")
    specs = build_param_specs(config.model)
    with torch.no_grad():
        for name, tensor in model.iter_dist_llm_parameters():
            init_param_(tensor, name, specs[name].init, config.run.seed, tensor.shape, (0,) * tensor.ndim)
    if config.compile:
        model.compile()
    loop = Loop(model, config.optim, config.precision, device)
    tokens = make_tokens(config)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return make_turn(lambda: loop.step(inputs.to(device), targets.to(device)), device, peak)


SIDES = {"native": make_native_stepper, "plain": make_plain_stepper}


def start_memory_peak(config: Config, device: torch.device) -> PeakMemory:
    """Start to measure the peak memory; first import what torch.compile would import later."""
    if config.compile:
        import torch._inductor.compile_fx  # noqa: F401
    return PeakMemory(device)


def make_tokens(config: Config) -> torch.Tensor:
    """Make the token ids of a step, [global_batch, seq_len + 1], equal for both sides."""
    shape = (config.data.global_batch, config.data.seq_len + 1)
    return torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def make_turn(step: Callable[[], Tensor], device: torch.device, peak: PeakMemory) -> Turn:
    """Return a function that takes steps; it returns their time, memory and first loss, or their profile."""

    def take_turn(num_steps: int, profiling: bool = False) -> dict[str, Any]:
        losses: list[Tensor] = []

        def take_steps() -> None:
            losses.extend(step() for _ in range(num_steps))

        if profiling:
            return {"profile": make_profile(take_steps, device)}
        usage = ResourceUsage()
        elapsed_seconds = measure_seconds(take_steps, device)
        return {"seconds": elapsed_seconds, "peak": peak.read_bytes(), "loss": losses[0].item(), **usage.read()}

    return take_turn


def make_profile(work: Callable[[], object], device: torch.device, max_rows: int = 20) -> str:
    """Format a table of the operators that take most time in `work`, without the operators that they call."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        measure_seconds(work, device)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    averages = profiler.key_averages()
    times = sorted(((getattr(average, attribute), average.key, average.count) for average in averages), reverse=True)
    total_micros = sum(micros for micros, _, _ in times)
    rows = [
        (name[:60], calls, f"{micros / 1e3:.1f}", f"{micros / total_micros:.1%}")
        for micros, name, calls in times[:max_rows]
    ]
    return format_table(("operator", "calls", "ms", "share"), rows)


def make_report(results: Results, options: argparse.Namespace) -> str:
    """Format the table."""
    names = ("ratio", "min_ratio", "max_ratio", "cpu_ratio", "mfu", "of_matmul", "plain_of_matmul", "memory")
    header = ["model", "precision", "compile", "recompute", "tokens", "tok/s", "plain tok/s", *names]
    header = [name.replace("plain_of_matmul", "plain's").replace("_", " ") for name in header]
    rows = []
    for row in results.rows:
        cells = [
            row["model"],
            row["precision"],
            "yes" if row["compile"] else "no",
            row["recompute"],
        ]
        cells += [
            f"{row['batch']} x {row['seq_len']}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['plain_tokens_per_second']:,.0f}",
        ]
        cells += [f"{row[name]:.3f}" for name in names]
        cells += [f"{row['peak'] / 1e6:,.0f}", f"{row['system']:.0%}", f"{row['plain_system']:.0%}"]
        rows.append([*cells, f"{row['loss']:.5f}", f"{row['plain_loss']:.5f}"])
    limits = {row["precision"]: f"{row['limit'] / 1e12:.2f} TFLOP/s in {row['precision']}" for row in results.rows}
    conditions = f"{options.rounds} rounds of {options.steps} steps; a matrix product: {', '.join(limits.values())}"
    table = format_table([*header, "peak MB", "system", "plain's", "loss", "plain's"], rows)
    return f"{conditions}; MFU: {CONVENTION}\n\n{table}"


if __name__ == "__main__":
    main()
