"""Trace the peak memory of a training step on one GPU of a run, without a GPU: from the sizes of tensors (fake_gpu.py).

  weights  GiB in use between two steps: the parameters of this rank and their optimizer moments
  peak     GiB, the peak within the second step
  at       the operator that runs at the peak
  whole    the peak if the loss were F.cross_entropy over all logits at once (not with tp)

The traced rank is rank 0 of --ranks; the key=value arguments `parallel.*` define its layout. The attention mask is
causal. The peak excludes the workspace of kernels, the buffers of NCCL, and fragmentation. Blocks are not compiled, so
they need more memory than compiled blocks.

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
from named_models import NAMED_MODELS, make_named_config
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
                overrides = [f"precision={precision}", f"parallel.recompute={recompute}", *options.overrides]
                config = make_named_config(model, overrides, ranks=options.ranks)
                check_traceable(config)
                row = {"model": model, "precision": precision, "recompute": recompute, "tokens": count_tokens(config)}
                result = trace(config, options.ranks)
                if config.parallel.tp == 1:
                    with full_logits():
                        result["whole"] = trace(config, options.ranks)["peak"]
                results.add({**row, **result})
    results.finish(f"one of {options.ranks} GPUs, traced\n\n{make_report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=NAMED_MODELS, default=["llama-1b"], help="default: llama-1b")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["bf16"], help="default: bf16")
    recomputes = ("none", "selective", "full")
    parser.add_argument("--recompute", nargs="+", choices=recomputes, default=["none"], help="default: none")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs of the run; default: %(default)s")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys, as for train: parallel.tp=4 data.seq_len=8192"
    )
    return parse_options(parser)


def check_traceable(config: Config) -> None:
    """Raise SystemExit if the config uses a feature that the trace does not cover."""
    unsupported = {
        "parallel.pp": config.parallel.pp > 1,
        "parallel.activations_gib": config.parallel.activations_gib is not None,
        "data.document_mask": config.data.document_mask,
        "objective": [component.name for component in config.objective.components] != ["causal"],
    }
    if keys := [key for key, is_used in unsupported.items() if is_used]:
        raise SystemExit(
            f"error: this program cannot trace {', '.join(keys)}. Remove these keys. To trace a pipeline stage, trace "
            "a model of its blocks: model.n_layers=<blocks of a stage>"
        )


def count_tokens(config: Config) -> int:
    """Return the number of tokens of a microbatch on one rank."""
    return config.data.micro_batch * config.data.seq_len // config.parallel.cp


def trace(config: Config, ranks: int) -> dict[str, Any]:
    """Trace two steps of rank 0 of `ranks` ranks."""
    with fake_gpu.activate(ranks) as active_gpu:
        return trace_steps(config, active_gpu)


def trace_steps(config: Config, active_gpu: fake_gpu.FakeGpu) -> dict[str, Any]:
    """Trace two steps. The first step allocates the optimizer moments; the second step is measured.

    Returns bytes: `weights`, what is allocated between the steps, and `peak`; and `at`, the operator at the peak.
    """
    data, dp_size = config.data, config.parallel.dp_replicate * config.parallel.dp_shard
    windows = torch.zeros(data.global_batch // dp_size, data.seq_len + 1, dtype=torch.long)
    microbatches = [Batch.build(ids[:, :-1], ids[:, 1:], CAUSAL) for ids in windows.split(data.micro_batch)]
    engine = NativeEngine(config, fake_gpu.DEVICE)
    train_step(engine, microbatches, config.optim.lr)
    weights_bytes = active_gpu.peak_bytes = active_gpu.allocated_bytes
    active_gpu.peak_operator = ""
    train_step(engine, microbatches, config.optim.lr, step=1)
    return {"weights": weights_bytes, "peak": active_gpu.peak_bytes, "at": active_gpu.peak_operator}


@contextmanager
def full_logits() -> Iterator[None]:
    """Patch the last layer to compute its loss over all logits at once."""

    def full_logits_loss(x_BSD: Tensor, weight_WD: Tensor, bias_W: Any, targets_BS: Tensor, *args: Any) -> Tensor:
        logits_BSW = F.linear(x_BSD, weight_WD, bias_W)
        losses = F.cross_entropy(
            logits_BSW.flatten(0, -2), targets_BS.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return losses.view(targets_BS.shape).sum(-1)

    with patch.object(decoder, "linear_cross_entropy", full_logits_loss):
        yield


def make_report(results: Results) -> str:
    """Format the table."""
    rows = []
    for row in results.rows:
        gib_cells = [f"{row[name] / GIB:.1f}" if name in row else "" for name in ("weights", "peak", "whole")]
        rows.append((row["model"], row["precision"], row["recompute"], f"{row['tokens']:,}", *gib_cells, row["at"]))
    return format_table(("model", "precision", "recompute", "tokens", "weights", "peak", "whole", "at"), rows)


if __name__ == "__main__":
    main()
