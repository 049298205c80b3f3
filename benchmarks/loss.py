"""What the last layer costs: norm, product with the vocabulary and cross-entropy, forward and backward.

  whole   F.linear, then F.cross_entropy over all logits at once
  head    dist_llm.models.decoder.Head with its loss, as in training
  liger   Liger's fused linear cross-entropy, on a GPU where liger_kernel is installed

Each starts from the same values, in a process of its own, so that its peak of memory is its own; they take turns.
`peak` is above what was in use before the activations, the weight and their gradients were made. `ratio` is the
seconds of `whole` over its own, round by round, and `memory` its peak over that of `whole`. `of_matmul` is 6NDV, the
three products of forward and backward, over the rate of a plain matrix product: what a head computes twice is a loss.

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
from measure import PeakMemory, any_device, matmul_rate, precisions, seconds, take_turns, workers
from models import config_of
from results import Results, parse, parser, table

Loss = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Measure each case and print."""
    options = arguments()
    device = any_device()
    results = Results("loss", device)
    limits = {}
    for precision in precisions(options.precision, device):
        keys = [f"model.d_model={options.d_model}", f"model.vocab_size={options.vocabulary}", f"precision={precision}"]
        config = config_of("llama-cpu", [*keys, "model.n_heads=1", "model.n_kv_heads=1", *options.overrides])
        names = [name for name in LOSSES if name != "liger" or (device.type == "cuda" and find_spec("liger_kernel"))]
        with workers({name: (make, name, config, options.tokens, device) for name in names}) as started:
            turns: dict[str, Callable[[], Any]] = {name: worker.turn for name, worker in started.items()}
            take_turns(turns, 1)
            turns["limit"] = partial(matmul_rate, device, precision)
            found = take_turns(turns, options.rounds)
        limits[precision] = max(found["limit"])
        for name in names:
            results.add({"case": name, "precision": precision, **row(name, found, options)})
    shown = ", ".join(f"{rate / 1e12:.2f} TFLOP/s in {precision}" for precision, rate in limits.items())
    what = f"{options.tokens} tokens x {options.d_model} x {options.vocabulary}; {options.rounds} rounds; "
    results.finish(f"{what}a matrix product: {shown}\n\n{report(results)}", options.write)


def arguments() -> argparse.Namespace:
    """The command line."""
    top = parser(__doc__)
    top.add_argument("--tokens", type=int, default=2048, help="default: %(default)s")
    top.add_argument("--d-model", type=int, default=512, help="default: %(default)s")
    top.add_argument("--vocabulary", type=int, default=32000, help="default: %(default)s")
    top.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), help="default: both, without bf16 on a CPU that has none"
    )
    top.add_argument("--rounds", type=int, default=5, help="turns of each; default: %(default)s")
    top.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: loss.z_loss=1e-4")
    return parse(top)


def make(name: str, config: Config, tokens: int, device: torch.device) -> Callable[[], dict[str, Any]]:
    """Forward and backward of one case."""
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

    def once() -> float:
        with autocast:
            mean = loss(x_BSD, targets_BS)
        mean.backward()
        return mean.item()

    def turn() -> dict[str, Any]:
        x_BSD.grad = None
        head.zero_grad()
        values: list[float] = []
        taken = seconds(lambda: values.append(once()), device)
        assert x_BSD.grad is not None
        return {"seconds": taken, "peak": peak.bytes(), "loss": values[0], "grad_norm": x_BSD.grad.norm().item()}

    return turn


def whole(head: Head) -> Loss:
    """All logits at once."""
    assert head.out is not None
    weight_VD = head.out.weight

    def loss(x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        logits_BSV = F.linear(head.norm(x_BSD), weight_VD[: head.vocab_size])
        return F.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten())

    return loss


def ours(head: Head) -> Loss:
    """Whatever the head does."""
    return lambda x_BSD, targets_BS: head(x_BSD, None, targets_BS).sum() / targets_BS.numel()


def liger(head: Head) -> Loss:
    """Liger's, which knows no autocast: it is given what autocast would give a product."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy  # type: ignore[import-not-found]

    assert head.out is not None
    weight_VD = head.out.weight

    def loss(x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
        hidden_ND = head.norm(x_BSD).flatten(0, 1).to(dtype)
        return liger_fused_linear_cross_entropy(hidden_ND, weight_VD[: head.vocab_size].to(dtype), targets_BS.flatten())

    return loss


LOSSES: dict[str, Callable[[Head], Loss]] = {"whole": whole, "head": ours, "liger": liger}


def row(name: str, found: dict[str, list[Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds, beside those of `whole`."""
    mine, base = found[name], found["whole"]
    taken = statistics.median(turn["seconds"] for turn in mine)
    flops = 6 * options.tokens * options.d_model * options.vocabulary
    return {
        "seconds": taken,
        "ratio": statistics.median(b["seconds"] / a["seconds"] for a, b in zip(mine, base, strict=True)),
        "peak": mine[-1]["peak"],
        "memory": mine[-1]["peak"] / base[-1]["peak"],
        "of_matmul": flops / taken / max(found["limit"]),
        "loss": mine[-1]["loss"],
        "grad_norm": mine[-1]["grad_norm"],
    }


def report(results: Results) -> str:
    """The table."""
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
    return table(header, rows)


if __name__ == "__main__":
    main()
