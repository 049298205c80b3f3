"""Measure training speed: tokens/s, MFU and peak memory of our step, a bare PyTorch loop, and the device's limit.

Ours is the native engine's step as in training, on a batch made beforehand (benchmarks/data.py measures batches). The
bare loop (benchmarks/bare.py) is another implementation of the same model, with the same initial weights and tokens;
`loss` and `bare_loss` are those of the first step and should agree. Each has its own process, so that `peak` is its
own. They take turns of a few steps in the order ours, bare, bare, ours, with a matrix product of the same precision
timed in between. Its best rate over all rounds is the limit: 2048 x 2048 on a CPU, 8192 x 8192 on a GPU.

  ratio       tokens/s of ours over bare: the median over the rounds; least and most are of single rounds
  cpu_ratio   the same with CPU seconds in place of elapsed time: more reliable on a busy machine, with
              OMP_NUM_THREADS=1 so that no thread spins while it waits
  memory      peak of ours over bare
  mfu         FLOPs by the convention of metrics.jsonl (6N + 12LHES), over the maker's figure for a known GPU, or over
              the limit measured here
  of_matmul   FLOPs of the products that are actually computed, over the limit: only the causal half of attention, with
              the scores that its backward recomputes (7 products of a head, as in flash kernels), and what --recompute
              recomputes
  faults      pages that a step requests from the system: large temporaries, on a CPU
  system      the system's share of the CPU seconds

With --compile ours compiles each block, and bare the whole model. With --recompute bare uses torch's checkpoint on each
block, also if ours is selective.

  python benchmarks/train.py                                        two small models, or two medium ones on a GPU
  python benchmarks/train.py --models llama-cpu --precision bf16 --profile
  python benchmarks/train.py --models llama-1b --compile no yes --recompute none selective --seq-len 2048 8192
  python benchmarks/train.py --models gpt2-124m model.vocab_size=50257 loss.z_loss=1e-4
  python benchmarks/train.py --models llama-1b --precision bf16 --compile yes fp8=true    (bare and the limit stay bf16)
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
from dist_llm.launch.group import keep_freed_memory
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.models.init import get_init_rule, init_param_
from dist_llm.objectives.batch import Batch
from dist_llm.observe.flops import CONVENTION, flops_per_token, matmul_weights, peak_flops
from dist_llm.training.step import train_step
from measure import PeakMemory, ResourceUsage, any_device, matmul_rate, precisions, seconds, take_turns, workers
from models import MODELS, make_config
from results import Results, format_table, make_parser, parse_options

WARM_UP = 2  # steps
Turn = Callable[..., dict[str, Any]]


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler logs its starts and stops
    device = any_device()
    models = options.models or (["gpt2-124m", "llama-160m"] if device.type == "cuda" else ["gpt2-cpu", "llama-cpu"])
    results = Results("train", device)
    profiles: list[str] = []
    grid = itertools.product(
        models, precisions(options.precision, device), options.compile, options.recompute, options.seq_len
    )
    for name, precision, compiled, recompute, seq_len in grid:
        keys = [f"precision={precision}", f"compile={compiled == 'yes'}", f"parallel.recompute={recompute}"]
        keys += [f"data.seq_len={seq_len}"] if seq_len else []
        keys += [f"data.global_batch={options.batch}"] if options.batch else []
        measured_row, profiles_by_case = measure_case(make_config(name, [*keys, *options.overrides]), options, device)
        results.add({"model": name, **measured_row})
        profiles += [f"\n{name}, {precision}, {side}\n{text}" for side, text in profiles_by_case.items()]
    results.finish("\n".join([report(results, options), *profiles]), options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, help=f"default: two that fit the device; {' '.join(MODELS)}"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), help="default: both, without bf16 on a CPU that has none"
    )
    parser.add_argument("--compile", nargs="+", choices=("no", "yes"), default=["no"], help="default: no")
    parser.add_argument(
        "--recompute", nargs="+", choices=("none", "full", "selective"), default=["none"], help="default: none"
    )
    parser.add_argument("--seq-len", nargs="+", type=int, default=[0], help="default: the model's")
    parser.add_argument("--batch", type=int, default=0, help="sequences of a step; default: the model's")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each; default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, help="steps of a turn; default: %(default)s")
    parser.add_argument("--profile", action="store_true", help="show what a step's time goes to, by torch.profiler")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: model.qk_norm=true")
    return parse_options(parser)


def measure_case(
    config: Config, options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measure one row, and the profiles with --profile."""
    with workers({side: (make, config, device) for side, make in MAKERS.items()}) as workers_by_case:
        first = {side: worker.turn(WARM_UP) for side, worker in workers_by_case.items()}
        turns: dict[str, Callable[[], Any]] = {
            side: partial(each.turn, options.steps) for side, each in workers_by_case.items()
        }
        turns["limit"] = partial(matmul_rate, device, config.precision)
        results_by_case = take_turns(turns, options.rounds)
        profiles_by_case = (
            {side: worker.turn(1, True)["profile"] for side, worker in workers_by_case.items()}
            if options.profile
            else {}
        )
    return make_row(config, options.steps, first, results_by_case, device), profiles_by_case


def make_row(
    config: Config, steps: int, first: dict[str, Any], results_by_case: dict[str, list[Any]], device: torch.device
) -> dict[str, Any]:
    """Make the row of a case from its turns."""
    data, limit = config.data, max(results_by_case["limit"])
    pairs = list(zip(results_by_case["ours"], results_by_case["bare"], strict=True))
    ratios = [bare_turn["seconds"] / our_turn["seconds"] for our_turn, bare_turn in pairs]
    median = {
        side: {
            name: statistics.median(turn[name] for turn in results_by_case[side]) for name in results_by_case[side][0]
        }
        for side in MAKERS
    }
    tokens = data.global_batch * data.seq_len * steps
    our_rate, bare_rate = (tokens / median[side]["seconds"] for side in MAKERS)
    peak, source = peak_flops(device, config.precision) if device.type == "cuda" else (limit, "the limit")
    exact = exact_flops(config)
    return {
        "precision": config.precision,
        "compile": config.compile,
        "recompute": config.parallel.recompute,
        "seq_len": data.seq_len,
        "batch": data.global_batch,
        "ours": our_rate,
        "bare": bare_rate,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "cpu_ratio": statistics.median(b["cpu_seconds"] / o["cpu_seconds"] for o, b in pairs),
        "mfu": our_rate * flops_per_token(config.model, data.seq_len) / peak,
        "mfu_of": source,
        "limit": limit,
        "of_matmul": our_rate * exact / limit,
        "bare_of_matmul": bare_rate * exact / limit,
        "peak": median["ours"]["peak"],
        "bare_peak": median["bare"]["peak"],
        "memory": median["ours"]["peak"] / median["bare"]["peak"],
        "faults": median["ours"]["faults"] / steps,
        "bare_faults": median["bare"]["faults"] / steps,
        "system": median["ours"]["system"],
        "bare_system": median["bare"]["system"],
        "loss": first["ours"]["loss"],
        "bare_loss": first["bare"]["loss"],
    }


def exact_flops(config: Config) -> float:
    """Compute the FLOPs per token of the products in a step; see `of_matmul` above."""
    model, seq_len = config.model, config.data.seq_len
    recomputes_all = config.parallel.recompute == "full"
    blocks = matmul_weights(model) - model.d_model * model.vocab_size
    num_keys = (seq_len + 1) / 2  # average number of keys per token
    attention = 2 * model.n_layers * model.n_heads * model.head_dim * num_keys
    return 6 * matmul_weights(model) + 2 * blocks * recomputes_all + (9 if recomputes_all else 7) * attention


def make_native_stepper(config: Config, device: torch.device) -> Turn:
    """Make turns of the native engine."""
    peak = start_memory_peak(config, device)
    keep_freed_memory(device)  # as training does
    engine = NativeEngine(config, device)
    tokens = make_tokens(config)
    batches = [Batch.build(tokens[:, :-1], tokens[:, 1:], CAUSAL)]
    return make_turn(lambda: train_step(engine, batches, config.optim.lr).loss, device, peak)


def make_bare(config: Config, device: torch.device) -> Turn:
    """Make turns of the bare loop, with the engine's initial weights."""
    peak = start_memory_peak(config, device)
    with torch.device(device):
        model = Model(config.model, recompute=config.parallel.recompute != "none")
    with torch.no_grad():
        for name, tensor in model.iter_dist_llm_parameters():
            rule = get_init_rule(name, tensor.shape, config.model)
            init_param_(tensor, name, rule, config.run.seed, tensor.shape, (0,) * tensor.ndim)
    if config.compile:
        model.compile()
    loop = Loop(model, config.optim, config.precision, device)
    tokens = make_tokens(config)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return make_turn(lambda: loop.step(inputs.to(device), targets.to(device)), device, peak)


MAKERS = {"ours": make_native_stepper, "bare": make_bare}


def start_memory_peak(config: Config, device: torch.device) -> PeakMemory:
    """Start to measure memory, after all imports."""
    if config.compile:
        import torch._inductor.compile_fx  # noqa: F401
    return PeakMemory(device)


def make_tokens(config: Config) -> torch.Tensor:
    """Make the ids of a step, with one more in each row, the same for both."""
    shape = (config.data.global_batch, config.data.seq_len + 1)
    return torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def make_turn(step: Callable[[], Tensor], device: torch.device, peak: PeakMemory) -> Turn:
    """Return a function that takes steps and returns their time and the first loss, or their profile."""

    def turn(steps: int, profiling: bool = False) -> dict[str, Any]:
        losses: list[Tensor] = []

        def work() -> None:
            losses.extend(step() for _ in range(steps))

        if profiling:
            return {"profile": make_profile(work, device)}
        usage = ResourceUsage()
        elapsed = seconds(work, device)
        return {"seconds": elapsed, "peak": peak.bytes(), "loss": losses[0].item(), **usage.elapsed()}

    return turn


def make_profile(work: Callable[[], object], device: torch.device, max_rows: int = 20) -> str:
    """Format the operators in which `work` spends most time themselves, with their shares."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        seconds(work, device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = sorted(((getattr(e, name), e.key, e.count) for e in profiler.key_averages()), reverse=True)
    total = sum(each[0] for each in times)
    rows = [
        (key[:60], calls, f"{micros / 1e3:.1f}", f"{micros / total:.1%}") for micros, key, calls in times[:max_rows]
    ]
    return format_table(("operator", "calls", "ms", "share"), rows)


def report(results: Results, options: argparse.Namespace) -> str:
    """Format the table."""
    names = ("ratio", "least", "most", "cpu_ratio", "mfu", "of_matmul", "bare_of_matmul", "memory")
    header = ["model", "precision", "compile", "recompute", "tokens", "ours tok/s", "bare tok/s", *names]
    header = [name.replace("bare_of_matmul", "bare's").replace("_", " ") for name in header]
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
            f"{row['ours']:,.0f}",
            f"{row['bare']:,.0f}",
        ]
        cells += [f"{row[name]:.3f}" for name in names]
        cells += [f"{row['peak'] / 1e6:,.0f}", f"{row['system']:.0%}", f"{row['bare_system']:.0%}"]
        rows.append([*cells, f"{row['loss']:.5f}", f"{row['bare_loss']:.5f}"])
    limits = {row["precision"]: f"{row['limit'] / 1e12:.2f} TFLOP/s in {row['precision']}" for row in results.rows}
    what = f"{options.rounds} rounds of {options.steps} steps; a matrix product: {', '.join(limits.values())}"
    text = format_table([*header, "peak MB", "system", "bare's", "loss", "bare's"], rows)
    return f"{what}; MFU: {CONVENTION}\n\n{text}"


if __name__ == "__main__":
    main()
