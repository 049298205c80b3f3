"""How fast a model trains: tokens/s, MFU and peak memory of our step beside a bare PyTorch loop and the device's limit.

Ours is the native engine's step as in training, on a batch that is made beforehand (benchmarks/data.py is about
those). The bare loop (benchmarks/bare.py) is another implementation of the same model, begun with the same weights on
the same tokens; `loss` and `bare_loss` are those of the first step and should agree. Each is a process of its own, so
that `peak` is its own; both live at once and take turns of a few steps, in the order ours, bare, bare, ours, and
between them a matrix product of the same precision is timed: the limit, its best over all rounds, 2048 x 2048 on a
CPU and 8192 x 8192 on a GPU.

  ratio       of tokens/s, ours over bare: the median over the rounds; least and most are of single rounds
  cpu_ratio   the same with seconds of CPU in place of time that passed: on a busy machine the one to look at, with
              OMP_NUM_THREADS=1 so that no thread spins in wait
  memory      of peaks, ours over bare
  mfu         FLOPs by the convention of metrics.jsonl (6N + 12LHES), over the maker's figure for a known GPU, or the
              limit measured here
  of_matmul   FLOPs of the products that are really done, over the limit measured here: attention's causal half alone,
              with the scores that its backward computes again (7 products of a head, as in flash kernels), and what
              --recompute computes again
  faults      pages that a step had to ask the system for: large temporaries, on a CPU
  system      the system's share of the CPU's seconds

Under --compile ours compiles each block, and bare the whole model. Under --recompute bare uses torch's checkpoint on
each block, also where ours is selective.

  python benchmarks/train.py                                        two small models, or two middling ones on a GPU
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
from dist_llm.models.init import init_param_, init_rule
from dist_llm.objectives.batch import Batch
from dist_llm.observe.flops import CONVENTION, flops_per_token, matmul_weights, peak_flops
from dist_llm.train.step import train_step
from measure import PeakMemory, Strain, any_device, matmul_rate, precisions, seconds, take_turns, workers
from models import MODELS, config_of
from results import Results, parse, parser, table

WARM_UP = 2  # steps
Turn = Callable[..., dict[str, Any]]


def main() -> None:
    """Measure each case and print."""
    options = arguments()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would tell of its starts and stops
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
        found, profiled = case(config_of(name, [*keys, *options.overrides]), options, device)
        results.add({"model": name, **found})
        profiles += [f"\n{name}, {precision}, {who}\n{text}" for who, text in profiled.items()]
    results.finish("\n".join([report(results, options), *profiles]), options.write)


def arguments() -> argparse.Namespace:
    """The command line."""
    top = parser(__doc__)
    top.add_argument(
        "--models", nargs="+", choices=MODELS, help=f"default: two that fit the device; {' '.join(MODELS)}"
    )
    top.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), help="default: both, without bf16 on a CPU that has none"
    )
    top.add_argument("--compile", nargs="+", choices=("no", "yes"), default=["no"], help="default: no")
    top.add_argument(
        "--recompute", nargs="+", choices=("none", "full", "selective"), default=["none"], help="default: none"
    )
    top.add_argument("--seq-len", nargs="+", type=int, default=[0], help="default: the model's")
    top.add_argument("--batch", type=int, default=0, help="sequences of a step; default: the model's")
    top.add_argument("--rounds", type=int, default=4, help="turns of each; default: %(default)s")
    top.add_argument("--steps", type=int, default=2, help="steps of a turn; default: %(default)s")
    top.add_argument("--profile", action="store_true", help="show what a step's time goes to, by torch.profiler")
    top.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: model.qk_norm=true")
    return parse(top)


def case(config: Config, options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
    """One row, and the profiles where asked for."""
    with workers({who: (make, config, device) for who, make in MAKERS.items()}) as started:
        first = {who: worker.turn(WARM_UP) for who, worker in started.items()}
        turns: dict[str, Callable[[], Any]] = {who: partial(each.turn, options.steps) for who, each in started.items()}
        turns["limit"] = partial(matmul_rate, device, config.precision)
        found = take_turns(turns, options.rounds)
        profiled = {who: worker.turn(1, True)["profile"] for who, worker in started.items()} if options.profile else {}
    return row(config, options.steps, first, found, device), profiled


def row(
    config: Config, steps: int, first: dict[str, Any], found: dict[str, list[Any]], device: torch.device
) -> dict[str, Any]:
    """What the turns of a case say."""
    data, limit = config.data, max(found["limit"])
    pairs = list(zip(found["ours"], found["bare"], strict=True))
    ratios = [bare["seconds"] / ours["seconds"] for ours, bare in pairs]
    median = {
        who: {name: statistics.median(turn[name] for turn in found[who]) for name in found[who][0]} for who in MAKERS
    }
    tokens = data.global_batch * data.seq_len * steps
    ours, bare = (tokens / median[who]["seconds"] for who in MAKERS)
    peak, source = peak_flops(device, config.precision) if device.type == "cuda" else (limit, "the limit")
    exact = exact_flops(config)
    return {
        "precision": config.precision,
        "compile": config.compile,
        "recompute": config.parallel.recompute,
        "seq_len": data.seq_len,
        "batch": data.global_batch,
        "ours": ours,
        "bare": bare,
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "cpu_ratio": statistics.median(bare["cpu_seconds"] / ours["cpu_seconds"] for ours, bare in pairs),
        "mfu": ours * flops_per_token(config.model, data.seq_len) / peak,
        "mfu_of": source,
        "limit": limit,
        "of_matmul": ours * exact / limit,
        "bare_of_matmul": bare * exact / limit,
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
    """FLOPs per token of the products that a step does; see above."""
    model, seq_len = config.model, config.data.seq_len
    again = config.parallel.recompute == "full"
    blocks = matmul_weights(model) - model.d_model * model.vocab_size
    seen = (seq_len + 1) / 2  # keys of a token, on average
    attention = 2 * model.n_layers * model.n_heads * model.head_dim * seen
    return 6 * matmul_weights(model) + 2 * blocks * again + (9 if again else 7) * attention


def make_ours(config: Config, device: torch.device) -> Turn:
    """The native engine."""
    peak = begin(config, device)
    keep_freed_memory(device)  # as training does
    engine = NativeEngine(config, device)
    tokens = draw(config)
    batches = [Batch.of(tokens[:, :-1], tokens[:, 1:], CAUSAL)]
    return turns(lambda: train_step(engine, batches, config.optim.lr).loss, device, peak)


def make_bare(config: Config, device: torch.device) -> Turn:
    """The bare loop, with the engine's initial weights."""
    peak = begin(config, device)
    with torch.device(device):
        model = Model(config.model, recompute=config.parallel.recompute != "none")
    with torch.no_grad():
        for name, tensor in model.ours():
            rule = init_rule(name, tensor.shape, config.model)
            init_param_(tensor, name, rule, config.run.seed, tensor.shape, (0,) * tensor.ndim)
    if config.compile:
        model.compile()
    loop = Loop(model, config.optim, config.precision, device)
    tokens = draw(config)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return turns(lambda: loop.step(inputs.to(device), targets.to(device)), device, peak)


MAKERS = {"ours": make_ours, "bare": make_bare}


def begin(config: Config, device: torch.device) -> PeakMemory:
    """Memory counts from here, what is imported left out."""
    if config.compile:
        import torch._inductor.compile_fx  # noqa: F401
    return PeakMemory(device)


def draw(config: Config) -> torch.Tensor:
    """The ids of a step and one more of each row, the same for both."""
    shape = (config.data.global_batch, config.data.seq_len + 1)
    return torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def turns(step: Callable[[], Tensor], device: torch.device, peak: PeakMemory) -> Turn:
    """A turn is some steps: what they took, and the loss before the first of them; or their profile."""

    def turn(steps: int, profiling: bool = False) -> dict[str, Any]:
        losses: list[Tensor] = []

        def work() -> None:
            losses.extend(step() for _ in range(steps))

        if profiling:
            return {"profile": profiled(work, device)}
        strain = Strain()
        taken = seconds(work, device)
        return {"seconds": taken, "peak": peak.bytes(), "loss": losses[0].item(), **strain.taken()}

    return turn


def profiled(work: Callable[[], object], device: torch.device, most: int = 20) -> str:
    """The operators that `work` spends most time in by themselves, with their shares."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiler:
        seconds(work, device)
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    taken = sorted(((getattr(e, name), e.key, e.count) for e in profiler.key_averages()), reverse=True)
    whole = sum(each[0] for each in taken)
    rows = [(key[:60], calls, f"{micros / 1e3:.1f}", f"{micros / whole:.1%}") for micros, key, calls in taken[:most]]
    return table(("operator", "calls", "ms", "share"), rows)


def report(results: Results, options: argparse.Namespace) -> str:
    """The table."""
    names = ("ratio", "least", "most", "cpu_ratio", "mfu", "of_matmul", "bare_of_matmul", "memory")
    header = ["model", "precision", "compile", "recompute", "tokens", "ours tok/s", "bare tok/s", *names]
    header = [name.replace("bare_of_matmul", "bare's").replace("_", " ") for name in header]
    rows = []
    for row in results.rows:
        cells = [row["model"], row["precision"], "yes" if row["compile"] else "no", row["recompute"]]
        cells += [f"{row['batch']} x {row['seq_len']}", f"{row['ours']:,.0f}", f"{row['bare']:,.0f}"]
        cells += [f"{row[name]:.3f}" for name in names]
        cells += [f"{row['peak'] / 1e6:,.0f}", f"{row['system']:.0%}", f"{row['bare_system']:.0%}"]
        rows.append([*cells, f"{row['loss']:.5f}", f"{row['bare_loss']:.5f}"])
    limits = {row["precision"]: f"{row['limit'] / 1e12:.2f} TFLOP/s in {row['precision']}" for row in results.rows}
    what = f"{options.rounds} rounds of {options.steps} steps; a matrix product: {', '.join(limits.values())}"
    text = table([*header, "peak MB", "system", "bare's", "loss", "bare's"], rows)
    return f"{what}; MFU: {CONVENTION}\n\n{text}"


if __name__ == "__main__":
    main()
