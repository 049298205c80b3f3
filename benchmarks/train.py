"""How fast a model trains: tokens/s, MFU and peak memory of our step beside a bare PyTorch loop and the device's limit.

Ours is the native engine's step as in training, on a batch that is made beforehand (benchmarks/data.py is about
those). The bare loop (benchmarks/bare.py) is another implementation of the same model, begun with the same weights on
the same tokens; `loss` and `bare_loss` are those of the first step and should agree. Each is a process of its own, so
that `peak` is its own; both live at once and take turns of a few steps, in the order ours, bare, bare, ours, and
between them a matrix product of the same precision is timed: the limit, its best over all rounds, 2048 x 2048 on a
CPU and 8192 x 8192 on a GPU.

  ratio       of tokens/s, ours over bare: the median over the rounds
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
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bare import Loop, Model
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.models.init import fill, rule_for
from dist_llm.models.visibility import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.observe.flops import CONVENTION, flops_per_token, matmul_weights, peak_flops
from dist_llm.train.step import train_step
from measure import PeakMemory, Strain, any_device, matmul_rate, seconds, take_turns, workers
from models import MODELS, config_of
from results import Results, parser, table

WARM_UP = 2  # steps
Turn = Callable[[], dict[str, Any]]
Step = Callable[[int], torch.Tensor]


def main() -> None:
    """Measure each case and print."""
    options = arguments()
    device = any_device()
    models = options.models or (["gpt2-124m", "llama-160m"] if device.type == "cuda" else ["gpt2-cpu", "llama-cpu"])
    results = Results("train", device)
    profiles: list[str] = []
    grid = itertools.product(models, options.precision, options.compile, options.recompute, options.seq_len)
    for name, precision, compiled, recompute, seq_len in grid:
        keys = [f"precision={precision}", f"compile={compiled == 'yes'}", f"parallel.recompute={recompute}"]
        keys += [f"data.seq_len={seq_len}"] if seq_len else []
        keys += [f"data.global_batch={options.batch}"] if options.batch else []
        row, profiled = case(config_of(name, [*keys, *options.overrides]), options, device)
        results.add({"model": name, **row})
        profiles += [f"\n{name}, {precision}, {who}\n{text}" for who, text in profiled.items()]
    results.finish("\n".join([report(results, options), *profiles]), options.write)


def arguments() -> argparse.Namespace:
    """The command line."""
    top = parser(__doc__)
    top.add_argument(
        "--models", nargs="+", choices=MODELS, help=f"default: two that fit the device; {' '.join(MODELS)}"
    )
    top.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="default: both")
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
    options, rest = top.parse_known_args()  # `--models a b key=value` leaves the last one to nobody
    if wrong := [word for word in rest if "=" not in word or word.startswith("-")]:
        top.error(f"unknown: {' '.join(wrong)}")
    options.overrides += rest
    return options


def case(config: Config, options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
    """One row, and the profiles where asked for."""
    asked = (config, options.steps, device)
    with workers({who: (MAKERS[who], *asked, options.profile) for who in MAKERS}) as started:
        turns: dict[str, Callable[[], Any]] = {who: worker.turn for who, worker in started.items()}
        turns["limit"] = partial(matmul_rate, device, config.precision)
        first = {who: started[who].turn() for who in MAKERS}  # warm
        found = take_turns(turns, options.rounds)
        profiled = {who: started[who].turn()["profile"] for who in MAKERS} if options.profile else {}
    limit = max(found["limit"])
    tokens = config.data.global_batch * config.data.seq_len
    rates = {who: [tokens * options.steps / turn["seconds"] for turn in found[who]] for who in MAKERS}
    ours, bare = (statistics.median(rates[who]) for who in MAKERS)
    peak, source = peak_flops(device, config.precision) if device.type == "cuda" else (limit, "the limit")
    exact = exact_flops(config)
    peaks = {who: found[who][-1]["peak"] for who in MAKERS}
    return {
        "precision": config.precision,
        "compile": config.compile,
        "recompute": config.parallel.recompute,
        "seq_len": config.data.seq_len,
        "batch": config.data.global_batch,
        "ours": ours,
        "bare": bare,
        "ratio": statistics.median(a / b for a, b in zip(rates["ours"], rates["bare"], strict=True)),
        "least": min(a / b for a, b in zip(rates["ours"], rates["bare"], strict=True)),
        "most": max(a / b for a, b in zip(rates["ours"], rates["bare"], strict=True)),
        "peak": peaks["ours"],
        "bare_peak": peaks["bare"],
        "memory": peaks["ours"] / peaks["bare"],
        "mfu": ours * flops_per_token(config.model, config.data.seq_len) / peak,
        "mfu_of": source,
        "limit": limit,
        "of_matmul": ours * exact / limit,
        "bare_of_matmul": bare * exact / limit,
        "loss": first["ours"]["loss"],
        "bare_loss": first["bare"]["loss"],
        **{name: statistics.median(turn[name] for turn in found["ours"]) for name in ("faults", "system")},
        **{f"bare_{name}": statistics.median(turn[name] for turn in found["bare"]) for name in ("faults", "system")},
    }, profiled


def exact_flops(config: Config) -> float:
    """FLOPs per token of the products that a step does; see above."""
    model, seq_len = config.model, config.data.seq_len
    again = config.parallel.recompute == "full"
    blocks = matmul_weights(model) - model.d_model * model.vocab_size
    seen = (seq_len + 1) / 2  # keys of a token, on average
    attention = 2 * model.n_layers * model.n_heads * model.head_dim * seen
    return 6 * matmul_weights(model) + 2 * blocks * again + (9 if again else 7) * attention


def make_ours(config: Config, steps: int, device: torch.device, profiling: bool) -> Turn:
    """The native engine."""
    peak = begin(config, device)
    engine = NativeEngine(config, device)
    tokens = draw(config)
    batches = [Batch.of(tokens[:, :-1], tokens[:, 1:], CAUSAL)]
    return turns(lambda step: train_step(engine, batches, config.optim.lr, step).loss, steps, device, peak, profiling)


def make_bare(config: Config, steps: int, device: torch.device, profiling: bool) -> Turn:
    """The bare loop, with the engine's initial weights."""
    peak = begin(config, device)
    with torch.device(device):
        model = Model(config.model, recompute=config.parallel.recompute != "none")
    with torch.no_grad():
        for name, tensor in model.ours():
            rule = rule_for(name, tensor.shape, config.model)
            fill(tensor, name, rule, config.run.seed, tensor.shape, (0,) * tensor.ndim)
    if config.compile:
        model.compile()
    loop = Loop(model, config.optim, config.precision, device)
    tokens = draw(config)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return turns(lambda _: loop.step(inputs.to(device), targets.to(device)), steps, device, peak, profiling)


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


def turns(step: Step, steps: int, device: torch.device, peak: PeakMemory, profiling: bool) -> Turn:
    """The first turn warms up and knows the first loss; the others are timed. When asked for, each has a profile."""
    count, strain = 0, Strain()

    def some(number: int) -> list[torch.Tensor]:
        nonlocal count
        count += number
        return [step(count - number + each) for each in range(number)]

    def turn() -> dict[str, Any]:
        if count == 0:
            return {"loss": some(WARM_UP)[0].item()}
        strain.start()
        taken = seconds(lambda: some(steps), device)
        faults, system = strain.taken()
        found = {"seconds": taken, "peak": peak.bytes(), "faults": faults / steps, "system": system}
        return found | ({"profile": profiled(lambda: some(1), device)} if profiling else {})

    return turn


def profiled(work: Callable[[], object], device: torch.device, most: int = 16) -> str:
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
    names = ("ratio", "least", "most", "mfu", "of_matmul", "bare_of_matmul", "memory")
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
