"""Collectives and bytes on the wire per rank and optimizer step, for each layout, beside the least it needs.

Convention: what one rank sends in a ring. Over p ranks an all-gather or reduce-scatter whose whole is n bytes
costs n (p - 1) / p, an all-reduce twice that, a point-to-point message n at its sender. A collective over one
rank moves nothing and is not counted. Where ranks differ, the one that sends most is shown.

A small decoder in fp32 takes one step to warm up and one that is counted, in gloo processes on this machine.
Bytes follow from shapes, not from the network: what is counted here holds for NCCL too, to the extent that the
same calls are made.

Prints one JSON line per layout on stdout, then the tables on stderr. --write puts them into
docs/communication.md and fails if an excess over 5% has no explanation there.
"""

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from dist_llm.config.check import AXES, check, resolve
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.models import attention
from dist_llm.models.visibility import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.train.step import train_step

DOCUMENT = Path(__file__).parents[1] / "docs" / "communication.md"
ALLOWED_EXCESS = 0.05
BYTES = 4  # of an element, in fp32

# Vocabulary over width, and hidden units over width, near those of Llama 3 8B; nothing is padded.
MODEL: dict[str, Any] = {
    "d_model": 64,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "d_ff": 192,
    "vocab_size": 2048,
}
ROWS, SEQ_LEN = 8, 128


@dataclass(frozen=True)
class Case:
    """A layout; `micro`: rows of a microbatch, 0: all that the data rank has."""

    ranks: int
    parallel: dict[str, Any]
    micro: int = 0

    @property
    def name(self) -> str:
        axes = " x ".join(f"{axis} {self.parallel[axis]}" for axis in AXES if axis in self.parallel)
        options = [f"{key} {str(value).lower()}" for key, value in self.parallel.items() if key not in AXES]
        share = ROWS // (self.parallel.get("dp_replicate", 1) * self.parallel.get("dp_shard", 1))
        options += [f"{share // self.micro} microbatches"] if self.micro else []
        return ", ".join([axes, *options])


def _case(ranks: int, micro: int = 0, **parallel: Any) -> Case:
    return Case(ranks, parallel, micro)


CASES = (
    _case(2, dp_replicate=2),
    _case(2, dp_replicate=2, micro=2),
    _case(2, dp_replicate=2, reduce_each_microbatch=True, micro=2),
    _case(2, dp_shard=2),
    _case(2, dp_shard=2, reshard="always"),
    _case(2, dp_shard=2, reshard="never"),
    _case(2, dp_shard=2, micro=2),
    _case(2, dp_shard=2, reshard="never", micro=2),
    _case(4, dp_shard=4),
    _case(4, dp_shard=4, reshard="always"),
    _case(4, dp_shard=4, reshard="never"),
    _case(4, dp_replicate=2, dp_shard=2),
    _case(2, tp=2),
    _case(2, tp=2, sequence_parallel=False),
    _case(2, cp=2),
    _case(2, pp=2, micro=2),
    _case(4, dp_shard=2, tp=2),
    _case(4, pp=2, dp_shard=2, micro=2),
)

# Why a layout sends more than 5% over its minimum; by name.
REASONS: dict[str, str] = {}


def main() -> None:
    """Count every case, print, and write the document if asked to."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    top.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    options = top.parse_args()
    rows = [row for ranks in sorted({case.ranks for case in CASES}) for row in in_a_world(ranks)]
    rows.sort(key=lambda row: [case.name for case in CASES].index(row["layout"]))
    for row in rows:
        print(json.dumps(row))
    sys.stdout.flush()
    print(overview(rows), by_axis(rows), sep="\n", file=sys.stderr)
    if options.write:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(rows))


def in_a_world(ranks: int) -> list[dict[str, Any]]:
    """The cases of that many ranks, counted in processes started for them."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_rank, (ranks, scratch), nprocs=ranks)
        found = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [busiest(rows) for rows in zip(*found, strict=True)]


def _rank(rank: int, ranks: int, scratch: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{scratch}/store", ranks), rank=rank, world_size=ranks)
    rows = [count(case) for case in CASES if case.ranks == ranks]
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(rows))
    gc.collect()  # models must be gone before the group is
    dist.destroy_process_group()


def busiest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one case's ranks, the one that sends most."""
    return max(rows, key=lambda row: row["bytes"])


def count(case: Case) -> dict[str, Any]:
    """One counted step of the case on this rank of a running process group, as a row."""
    config = config_of(case)
    engine = NativeEngine(config, torch.device("cpu"))
    assert engine.mesh is not None
    train_step(engine, batches_of(config, engine), config.optim.lr, step=0)  # pipelines exchange shapes once
    mask = patch.object(attention, "causal_lower_right", _unseen(attention.causal_lower_right))
    with mask, WireCounter(engine.mesh) as wire:
        train_step(engine, batches_of(config, engine), config.optim.lr, step=1)
    least = minimum(config, engine)
    return {
        "layout": case.name,
        "ranks": case.ranks,
        "calls": wire.calls.total(),
        "bytes": round(wire.bytes.total()),
        "minimum": round(sum(least.values())),
        "excess": wire.bytes.total() / sum(least.values()) - 1,
        "by_axis": [
            {"axis": axis, "kind": kind, "calls": calls, "bytes": round(wire.bytes[axis, kind])}
            for (axis, kind), calls in sorted(wire.calls.items())
        ],
        "minimum_by_axis": {axis: round(value) for axis, value in least.items()},
    }


def config_of(case: Case) -> Config:
    """The case as a resolved config."""
    raw = {
        "run": {"dir": "unused", "steps": 2},
        "model": MODEL,
        "data": {"path": "unused", "seq_len": SEQ_LEN, "global_batch": ROWS, "micro_batch": case.micro},
        "parallel": case.parallel,
    }
    config = Config.model_validate(raw)
    assert not (broken := check(config, case.ranks, 0)), broken
    return resolve(config, case.ranks, 0)


def batches_of(config: Config, engine: NativeEngine) -> list[Batch]:
    """This data rank's microbatches, of random tokens."""
    rank, ranks = engine.data_rank
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(config.model.vocab_size, (ROWS // ranks, SEQ_LEN + 1), generator=generator)
    return [Batch.of(rows[:, :-1], rows[:, 1:], CAUSAL) for rows in tokens.split(config.data.micro_batch)]


# --- counting


def _bytes(tensors: Tensor | Iterable[Any]) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(each) for each in tensors)


Whole = Callable[[Sequence[Any], int], int]

# Kind, and the bytes of the whole from (arguments, ranks): every call that the layouts make.
CALLS: dict[str, tuple[str, Whole]] = {
    "c10d::allreduce_": ("all-reduce", lambda args, p: _bytes(args[0])),
    "c10d::_allgather_base_": ("all-gather", lambda args, p: _bytes(args[0])),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", lambda args, p: _bytes(args[1])),
    "c10d::send": ("send", lambda args, p: _bytes(args[0])),
    "_c10d_functional::all_reduce": ("all-reduce", lambda args, p: _bytes(args[0])),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", lambda args, p: _bytes(args[0]) * p),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", lambda args, p: _bytes(args[0])),
}
# Sends nothing: a receive is counted where it is sent.
SILENT = {"c10d::recv_", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}
NAMESPACES = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"}
RING = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


class WireCounter(TorchDispatchMode):
    """Counts, by (axis, kind), the calls and the bytes that this rank sends. A call it does not know is an error."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.places = {rank: place for place, rank in np.ndenumerate(mesh.mesh.numpy())}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # a DTensor does it by collectives on plain tensors, which come here in turn
        if isinstance(func, torch._ops.OpOverload) and func.namespace in NAMESPACES:
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: torch._ops.OpOverload, args: Sequence[Any]) -> None:
        name = func._schema.name
        if name in SILENT:
            return
        kind, whole = CALLS[name]
        group = _group(func, args)
        ranks = group.size()
        if ranks == 1:
            return
        where = self._axes(group), kind
        sent = RING[kind] * (ranks - 1) / ranks if kind in RING else 1
        self.calls[where] += 1
        self.bytes[where] += sent * whole(args, ranks)  # type: ignore[assignment]

    def _axes(self, group: dist.ProcessGroup) -> str:
        """Those along which the group's ranks differ."""
        places = zip(*(self.places[rank] for rank in dist.get_process_group_ranks(group)), strict=True)
        return " x ".join(axis for axis, along in zip(AXES, places, strict=True) if len(set(along)) > 1)


def _unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` outside of any mode: torch cannot make its causal mask, a kind of tensor, inside one."""

    def run(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return run


def _group(func: torch._ops.OpOverload, args: Sequence[Any]) -> dist.ProcessGroup:
    """A call's group: an object to the older calls, a name to the functional ones."""
    for parameter, value in zip(func._schema.arguments, args, strict=False):
        if parameter.name == "process_group":
            return dist.ProcessGroup.unbox(value)
        if parameter.name == "group_name":
            return dist.distributed_c10d._resolve_process_group(value)
    raise AssertionError(f"{func} has no group")


# --- the least that a layout needs


def minimum(config: Config, engine: NativeEngine) -> dict[str, float]:
    """Bytes that this rank must send in a step, by axis, given what the layout is.

    Weights. P: parameters of this rank's stage and tensor share, s = dp_shard * cp, r = dp_replicate, f(p) =
    (p - 1) / p. Gradients are reduce-scattered once, 4 P f(s), and what is left of them all-reduced over the
    replicas, 8 P / s f(r). A gather of everything is 4 P f(s). Weights do not change within a step, so those
    that are not freed are gathered once; those that `reshard` frees after forward, twice a microbatch, but for
    the embedding, whose backward needs no weights; the rest once a microbatch.

    Tensor. A: bytes of the activations [B, S, D] of the rank's whole share of the step. Each of a block's two
    pairs of matrices wants whole inputs and leaves partial sums: with the sequence split an all-gather and a
    reduce-scatter of A forward, the same backward, 8 A f(tp) a block; without, an all-reduce of A forward and
    one backward, which is as much. Embedding and head: 2 A f(tp) each. With the sequence split, the norms'
    gradients are partial sums too. The loss needs three numbers per token: the largest logit, the sum of
    exponentials, the target's logit.

    Context. Per block keys and values of all, [2, B, S, K, E], gathered forward and their gradient
    reduce-scattered. Pipeline. A to the next stage and as much to the one before.

    A step's counts and norms, a few scalars, are not in it.
    """
    model, parallel = config.model, config.parallel
    rows = config.data.global_batch // engine.data_rank[1]
    microbatches = rows // config.data.micro_batch
    blocks = sum(len(part.blocks) for part in engine.parts)
    first, last = any(part.first for part in engine.parts), any(part.last for part in engine.parts)
    tokens = rows * config.data.seq_len // parallel.cp
    activations = BYTES * tokens * model.d_model

    least = _weights(config, blocks, first, last, microbatches)
    f = (parallel.tp - 1) / parallel.tp
    norms = BYTES * model.d_model * (2 * blocks + last) if parallel.sequence_parallel else 0
    least["tp"] = f * (activations * (8 * blocks + 2 * first + 2 * last) + 2 * norms + 2 * BYTES * 3 * tokens * last)
    keys_and_values = 2 * BYTES * tokens * parallel.cp * model.n_kv_heads * model.head_dim / parallel.tp
    least["cp"] = least.get("cp", 0) + blocks * 2 * keys_and_values * (parallel.cp - 1) / parallel.cp
    slices = parallel.tp if parallel.sequence_parallel else 1
    least["pp"] = activations / slices * (2 - first - last)
    return {axis: value for axis, value in least.items() if value}


def _weights(config: Config, blocks: int, first: bool, last: bool, microbatches: int) -> dict[str, float]:
    """Gathers of weights and reductions of gradients, by axis."""
    model, parallel = config.model, config.parallel
    width = model.d_model
    matrices = 2 * width * model.head_dim * (model.n_heads + model.n_kv_heads) + 3 * width * model.d_ff
    table = model.vocab_size * width / parallel.tp
    block, embedding, head = matrices / parallel.tp + 2 * width, table * first, (table + width) * last
    held = blocks * block + embedding + head
    if parallel.reshard == "always":
        gathered = microbatches * (2 * held - embedding)
    elif parallel.reshard == "default" and parallel.pp == 1:
        gathered = microbatches * (held + (blocks - 1) * block)
    else:
        gathered = held
    reduced = held * (microbatches if parallel.reduce_each_microbatch else 1)
    shards, replicas = parallel.dp_shard * parallel.cp, parallel.dp_replicate
    sharded = " x ".join(axis for axis in ("dp_shard", "cp") if getattr(parallel, axis) > 1)
    return {
        sharded: BYTES * (gathered + reduced) * (shards - 1) / shards,
        "dp_replicate": 2 * BYTES * reduced / shards * (replicas - 1) / replicas,
    }


# --- the document


def overview(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a line per layout."""
    lines = ["| layout | ranks | calls | bytes | minimum | excess |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['layout']} | {row['ranks']} | {row['calls']} | {row['bytes']:,} | {row['minimum']:,} | "
            f"{row['excess']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def by_axis(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, a line per layout, axis and kind of call."""
    lines = ["| layout | axis | kind | calls | bytes |", "| --- | --- | --- | ---: | ---: |"]
    for row in rows:
        for part in row["by_axis"]:
            lines.append(
                f"| {row['layout']} | {part['axis']} | {part['kind']} | {part['calls']} | {part['bytes']:,} |"
            )
    return "\n".join(lines) + "\n"


def document(rows: Sequence[dict[str, Any]]) -> str:
    """docs/communication.md."""
    return ""


if __name__ == "__main__":
    main()
