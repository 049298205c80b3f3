"""Count the bytes that a mixture of experts sends in a training step; experts.py prints them.

The models of experts.py are here, too.
"""

import gc
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from dist_llm.config.check import check
from dist_llm.config.derive import resolve_config
from dist_llm.config.feedforward_sections import MoEConfig
from dist_llm.config.load import load_config, raise_violations
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.training.step import train_step

SIZES = (
    *("model.d_model=256", "model.n_layers=4", "model.n_heads=4", "model.vocab_size=2048"),
    *("data.seq_len=256", "data.global_batch=4"),
)
DENSE = "dense"
EXPERT_MODELS = {
    DENSE: "model.d_ff=1024",
    "8 experts, top 2": "model.feedforward={name: moe, n_experts: 8, top_k: 2, d_expert: 512, balance_loss: 0.01}",
    "64 experts, top 8": "model.feedforward={name: moe, n_experts: 64, top_k: 8, d_expert: 128, balance_loss: 0.01}",
}
INT64_BYTES = 8
FP32_BYTES = 4
CPU = torch.device("cpu")


def make_expert_config(model: str, overrides: list[str], ranks: int = 1) -> Config:
    """Resolve the config of a model of EXPERT_MODELS."""
    keys = ("run.dir=unused", "run.steps=1000", "data.path=unused", *SIZES, EXPERT_MODELS[model])
    config, violations = load_config(None, [*keys, *overrides])
    raise_violations(violations)
    assert config is not None
    raise_violations(check(config, ranks, tokenizer_size=0))
    return resolve_config(config, ranks, tokenizer_size=0)


def make_microbatches(config: Config, engine: NativeEngine) -> list[Batch]:
    """Make the microbatches of this data-parallel rank from random tokens."""
    dp_rank, dp_size = engine.dp_rank_and_size
    generator = torch.Generator().manual_seed(dp_rank)
    shape = (config.data.global_batch // dp_size, config.data.seq_len + 1)
    windows = torch.randint(config.model.vocab_size, shape, generator=generator)
    return [Batch.build(ids[:, :-1], ids[:, 1:], CAUSAL) for ids in windows.split(config.data.micro_batch)]


@dataclass
class ExchangeCounter:
    """Bytes that this rank sends to other ranks by all-to-all: rows of tokens, and the numbers of rows."""

    calls: int = 0
    row_bytes: int = 0
    count_bytes: int = 0


@contextmanager
def count_exchanges() -> Iterator[ExchangeCounter]:
    """Count the all-to-all collectives of this rank."""
    counter, original = ExchangeCounter(), dist.all_to_all_single

    def count(received: Tensor, x: Tensor, num_received: list[int], num_sent: list[int], group: Any) -> None:
        sent_elsewhere = sum(num_sent) - num_sent[dist.get_rank(group)]
        num_bytes = sent_elsewhere * x[:1].new_empty(x.shape[1:]).numel() * x.element_size()
        counter.calls += 1
        if x.is_floating_point():
            counter.row_bytes += num_bytes
        else:
            counter.count_bytes += num_bytes
        original(received, x, num_received, num_sent, group=group)

    with patch.object(dist, "all_to_all_single", count):
        yield counter


def count_traffic(ranks: int, overrides: list[str]) -> dict[str, int]:
    """Count the exchanges of one training step on this rank, in a running process group of `ranks` ranks."""
    keys = [f"parallel.dp_shard={ranks}", f"parallel.ep={ranks}", *overrides]
    config = make_expert_config("8 experts, top 2", keys, ranks)
    engine = NativeEngine(config, CPU)
    microbatches = make_microbatches(config, engine)
    with count_exchanges() as counter:
        train_step(engine, microbatches, config.optim.lr, step=0)
    num_tokens = config.data.global_batch // ranks * config.data.seq_len
    balanced = compute_balanced_bytes(config, num_tokens, FP32_BYTES)
    return {"calls": counter.calls, "row_bytes": counter.row_bytes, "count_bytes": counter.count_bytes} | balanced


def compute_balanced_bytes(config: Config, num_tokens: int, element_bytes: int) -> dict[str, int]:
    """Return the bytes that a rank sends in a step if its tokens choose the experts of each rank equally often.

    `num_tokens` is the number of tokens that the rank routes in the step. Dispatch and combine send each row in forward
    and its gradient in backward. In forward, a rank also sends the numbers of rows, once per microbatch.
    """
    moe, ep = config.model.feedforward, config.parallel.ep
    assert isinstance(moe, MoEConfig)
    num_microbatches = num_tokens // (config.data.micro_batch * config.data.seq_len)
    row_bytes = 4 * num_tokens * moe.top_k * config.model.d_model * element_bytes * (ep - 1) // ep
    count_bytes = num_microbatches * moe.n_experts * INT64_BYTES * (ep - 1) // ep
    num_layers = config.model.n_layers
    return {"balanced_row_bytes": num_layers * row_bytes, "balanced_count_bytes": num_layers * count_bytes}


def count_in_processes(ranks: int, overrides: list[str]) -> dict[str, Any]:
    """Start gloo ranks, and return the sums of their counts."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_run_rank, (ranks, overrides, scratch), nprocs=ranks)
        counts = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(ranks)]
    sums = {name: sum(count[name] for count in counts) for name in counts[0]}
    return {"case": f"ep {ranks}", **sums, "ratio": sums["row_bytes"] / sums["balanced_row_bytes"]}


def _run_rank(rank: int, ranks: int, overrides: list[str], scratch: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{scratch}/store", ranks), rank=rank, world_size=ranks)
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(count_traffic(ranks, overrides)))
    gc.collect()  # models must be deleted before the process group
    dist.destroy_process_group()
