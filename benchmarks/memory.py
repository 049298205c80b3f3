"""Trace the peak memory of a training step on one GPU of a run, without a GPU (fake_gpu.py), by sizes alone.

  weights  GiB between two steps: this rank's parameters, and the optimizer's moments
  peak     GiB, the peak within the second step
  at       the operator that runs at the peak
  whole    the peak if the loss were F.cross_entropy over all logits (not with tp)

The rank is the first of --ranks; the key=value arguments `parallel.*` define its layout. Sequences are causal without
another mask. Not counted: what kernels and NCCL need themselves, and gaps in the allocator's memory. Blocks are not
compiled, and so need more.

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

import fake_gpu
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models import decoder
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.training.step import train_step
from measure import DTYPES
from models import MODELS, make_config
from results import Results, format_table, make_parser, parse_options

GIB = 2**30


def main() -> None:
    """Trace and print each case."""
    options = parse_arguments()
    fake_gpu.preload()
    results = Results("memory", torch.device("cpu"))
    for model in options.models:
        for precision in options.precision:
            for recompute in options.recompute:
                keys = [f"precision={precision}", f"parallel.recompute={recompute}", *options.overrides]
                config = make_config(model, keys, options.ranks)
                check_traceable(config)
                row = {"model": model, "precision": precision, "recompute": recompute, "tokens": count_tokens(config)}
                result = trace(config, options.ranks)
                if config.parallel.tp == 1:
                    with full_logits():
                        result["whole"] = trace(config, options.ranks)["peak"]
                results.add({**row, **result})
    results.finish(f"one of {options.ranks} GPUs, traced\n\n{report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-1b"], help="default: llama-1b")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["bf16"], help="default: bf16")
    recomputes = ("none", "selective", "full")
    parser.add_argument("--recompute", nargs="+", choices=recomputes, default=["none"], help="default: none")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of the run; default: %(default)s")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as for train: parallel.tp=4 data.seq_len=8192"
    )
    return parse_options(parser)


def check_traceable(config: Config) -> None:
    """Raise SystemExit if the trace would not follow the config."""
    unsupported = {
        "parallel.pp": config.parallel.pp > 1,
        "parallel.activations_gib": config.parallel.activations_gib > 0,
        "data.document_mask": config.data.document_mask,
        "objective": [each.name for each in config.objective.components] != ["causal"],
    }
    if keys := [key for key, is_set in unsupported.items() if is_set]:
        raise SystemExit(
            f"error: not traced: {', '.join(keys)}. Causal rows are, and of a pipeline a stage by itself: "
            "model.n_layers=<blocks of a stage>"
        )


def count_tokens(config: Config) -> int:
    """Return the number of tokens of a microbatch on one rank."""
    return config.data.micro_batch * config.data.seq_len // config.parallel.cp


def trace(config: Config, ranks: int) -> dict[str, Any]:
    """Trace two steps of one of so many ranks."""
    with fake_gpu.activate(ranks) as active_gpu:
        return trace_steps(config, active_gpu)


def trace_steps(config: Config, active_gpu: fake_gpu.FakeGpu) -> dict[str, Any]:
    """Trace two steps with one microbatch after another; the first allocates the optimizer's moments."""
    data, shards = config.data, config.parallel.dp_replicate * config.parallel.dp_shard
    rows = torch.zeros(data.global_batch // shards, data.seq_len + 1, dtype=torch.long)
    batches = [Batch.build(each[:, :-1], each[:, 1:], CAUSAL) for each in rows.split(data.micro_batch)]
    engine = NativeEngine(config, fake_gpu.DEVICE)
    train_step(engine, batches, config.optim.lr)
    weights = active_gpu.peak = active_gpu.now
    active_gpu.at = ""
    train_step(engine, batches, config.optim.lr, step=1)
    return {"weights": weights, "peak": active_gpu.peak, "at": active_gpu.at}


@contextmanager
def full_logits() -> Iterator[None]:
    """Patch the last layer to compute its loss over all logits at once."""

    def loss(x_BSD: Tensor, weight_WD: Tensor, bias_W: Any, targets_BS: Tensor, *rest: Any) -> Tensor:
        logits_BSW = F.linear(x_BSD, weight_WD, bias_W)
        losses = F.cross_entropy(
            logits_BSW.flatten(0, -2), targets_BS.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return losses.view(targets_BS.shape).sum(-1)

    with patch.object(decoder, "linear_cross_entropy", loss):
        yield


def report(results: Results) -> str:
    """Format the table."""
    rows = []
    for row in results.rows:
        sizes = [f"{row[name] / GIB:.1f}" if name in row else "" for name in ("weights", "peak", "whole")]
        rows.append((row["model"], row["precision"], row["recompute"], f"{row['tokens']:,}", *sizes, row["at"]))
    return format_table(("model", "precision", "recompute", "tokens", "weights", "peak", "whole", "at"), rows)


if __name__ == "__main__":
    main()
