"""Peak memory of a training step on one GPU of a run, traced without a GPU: sizes alone, no values (pretend.py).

  weights  GiB between two steps: this rank's parameters, and the optimizer's moments
  peak     GiB, the most at a time in the second step
  at       the operator that was run then
  whole    the peak if the loss were F.cross_entropy over whole logits (not under tp)

The rank is the first of --ranks; its layout is in `parallel.*` of the key=value words. Sequences are causal and have no
other mask. Not counted: what kernels and NCCL need for themselves, and gaps in the allocator's memory. Blocks are not
compiled, and need more so.

  python benchmarks/memory.py
  python benchmarks/memory.py --models llama-1b --recompute none selective full data.seq_len=4096
  python benchmarks/memory.py --models llama-8b --ranks 64 model.n_layers=32 parallel.dp_shard=16 parallel.tp=4
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import pretend
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.models import decoder
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.train.step import train_step
from measure import DTYPES
from models import MODELS, config_of
from results import Results, parse, parser, table

GIB = 2**30


def main() -> None:
    """Trace each case and print."""
    options = arguments()
    pretend.preload()
    results = Results("memory", torch.device("cpu"))
    for model in options.models:
        for precision in options.precision:
            for recompute in options.recompute:
                keys = [f"precision={precision}", f"parallel.recompute={recompute}", *options.overrides]
                config = config_of(model, keys, options.ranks)
                refuse(config)
                row = {"model": model, "precision": precision, "recompute": recompute, "tokens": tokens(config)}
                found = trace(config, options.ranks)
                if config.parallel.tp == 1:
                    with whole_logits():
                        found["whole"] = trace(config, options.ranks)["peak"]
                results.add({**row, **found})
    results.finish(f"one of {options.ranks} GPUs, traced\n\n{report(results)}", options.write)


def arguments() -> argparse.Namespace:
    """The command line."""
    top = parser(__doc__)
    top.add_argument("--models", nargs="+", choices=MODELS, default=["llama-1b"], help="default: llama-1b")
    top.add_argument("--precision", nargs="+", choices=DTYPES, default=["bf16"], help="default: bf16")
    recomputes = ("none", "selective", "full")
    top.add_argument("--recompute", nargs="+", choices=recomputes, default=["none"], help="default: none")
    top.add_argument("--ranks", type=int, default=1, help="GPUs of the run; default: %(default)s")
    top.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: parallel.tp=4 data.seq_len=8192")
    return parse(top)


def refuse(config: Config) -> None:
    """SystemExit where the trace would not be of what the config says."""
    found = {
        "parallel.pp": config.parallel.pp > 1,
        "parallel.activations_gib": config.parallel.activations_gib > 0,
        "data.document_mask": config.data.document_mask,
        "objective": [each.name for each in config.objective.components] != ["causal"],
    }
    if keys := [key for key, wanted in found.items() if wanted]:
        raise SystemExit(
            f"error: not traced: {', '.join(keys)}. Causal rows are, and of a pipeline a stage by itself: "
            "model.n_layers=<blocks of a stage>"
        )


def tokens(config: Config) -> int:
    """Of a microbatch on one rank."""
    return config.data.micro_batch * config.data.seq_len // config.parallel.cp


def trace(config: Config, ranks: int) -> dict[str, Any]:
    """Two steps of a rank of so many."""
    with pretend.gpu(ranks) as gpu:
        return steps(config, gpu)


def steps(config: Config, gpu: pretend.Gpu) -> dict[str, Any]:
    """Two steps of one microbatch after another: the optimizer's moments come with the first."""
    data, shards = config.data, config.parallel.dp_replicate * config.parallel.dp_shard
    rows = torch.zeros(data.global_batch // shards, data.seq_len + 1, dtype=torch.long)
    batches = [Batch.of(each[:, :-1], each[:, 1:], CAUSAL) for each in rows.split(data.micro_batch)]
    engine = NativeEngine(config, pretend.DEVICE)
    train_step(engine, batches, config.optim.lr)
    weights = gpu.peak = gpu.now
    gpu.at = ""
    train_step(engine, batches, config.optim.lr, step=1)
    return {"weights": weights, "peak": gpu.peak, "at": gpu.at}


@contextmanager
def whole_logits() -> Iterator[None]:
    """The last layer as others write it."""

    def loss(x_BSD: Tensor, weight_WD: Tensor, bias_W: Any, targets_BS: Tensor, *rest: Any) -> Tensor:
        logits_BSW = F.linear(x_BSD, weight_WD, bias_W)
        losses = F.cross_entropy(logits_BSW.flatten(0, -2), targets_BS.flatten(), ignore_index=IGNORE, reduction="none")
        return losses.view(targets_BS.shape).sum(-1)

    with patch.object(decoder, "linear_cross_entropy", loss):
        yield


def report(results: Results) -> str:
    """The table."""
    rows = []
    for row in results.rows:
        sizes = [f"{row[name] / GIB:.1f}" if name in row else "" for name in ("weights", "peak", "whole")]
        rows.append((row["model"], row["precision"], row["recompute"], f"{row['tokens']:,}", *sizes, row["at"]))
    return table(("model", "precision", "recompute", "tokens", "weights", "peak", "whole", "at"), rows)


if __name__ == "__main__":
    main()
