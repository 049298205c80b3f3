"""Collectives and bytes on the wire per rank and optimizer step, for each layout, beside the least it needs.

Convention: what one rank sends in a ring. Over p ranks an all-gather or reduce-scatter whose whole is n bytes
costs n (p - 1) / p, an all-reduce twice that, a point-to-point message n at its sender. A collective over one
rank moves nothing and is not counted. Where ranks differ, the one that sends most is shown.

A small decoder takes one step to warm up and one that is counted, in gloo processes that this program starts.

Prints one JSON line per layout on stdout, then the tables on stderr. --write puts them into
docs/communication.md and fails if an excess over 5% has no explanation there.
"""

import argparse
import gc
import json
import math
import platform
import sys
import tempfile
import textwrap
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

from dist_llm.config.check import check
from dist_llm.config.derive import AXES, resolve
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.models import attention
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.parallel import p2p_collectives
from dist_llm.train.step import train_step

DOCUMENT = Path(__file__).parents[1] / "docs" / "communication.md"
ALLOWED_EXCESS = 0.05
FP32 = 4  # bytes of an element

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

    parallel: dict[str, Any]
    micro: int = 0
    precision: str = "fp32"

    @property
    def ranks(self) -> int:
        return math.prod(self.parallel.get(axis, 1) for axis in AXES)

    @property
    def name(self) -> str:
        words = [" x ".join(f"{axis} {self.parallel[axis]}" for axis in AXES if axis in self.parallel)]
        words += [f"{key}={json.dumps(value)}" for key, value in self.parallel.items() if key not in AXES]
        data_ranks = self.parallel.get("dp_replicate", 1) * self.parallel.get("dp_shard", 1)
        words += [f"{ROWS // data_ranks // self.micro} microbatches"] if self.micro else []
        words += [self.precision] if self.precision != "fp32" else []
        return ", ".join(words).replace('"', "")


def case(micro: int = 0, precision: str = "fp32", **parallel: Any) -> Case:
    """A case, its `parallel` keys as keywords."""
    return Case(parallel, micro, precision)


CASES = (
    case(dp_replicate=2),
    case(dp_replicate=2, micro=2),
    case(dp_replicate=2, micro=2, reduce_each_microbatch=True),
    case(dp_shard=2),
    case(dp_shard=2, reshard="always"),
    case(dp_shard=2, reshard="never"),
    case(dp_shard=4),
    case(dp_shard=4, reshard="always"),
    case(dp_shard=4, reshard="never"),
    case(dp_shard=2, micro=2),
    case(dp_shard=2, micro=2, reshard="never"),
    case(dp_replicate=2, dp_shard=2),
    case(tp=2),
    case(tp=2, sequence_parallel=False),
    case(cp=2),
    case(pp=2, micro=2),
    case(dp_shard=2, tp=2),
    case(pp=2, dp_shard=2, micro=2),
    case(dp_shard=2, recompute="full"),
    case(tp=2, recompute="full"),
    case(tp=2, recompute="selective"),
    case(cp=2, recompute="full"),
    case(dp_shard=2, precision="bf16"),
    case(tp=2, precision="bf16"),
    case(cp=2, precision="bf16"),
    case(pp=2, micro=2, precision="bf16"),
    case(dp_shard=2, tp=2, precision="bf16"),
)

AGAIN = (
    "Recomputation repeats the forward pass of each block with its collectives, except the last reduce-scatter, whose "
    "result is not needed: 3 A f(tp) per block."
)
EMBEDDING = (
    "`always` frees embedding and head after forward and gathers them again as one group for backward. The backward "
    "pass of the embedding reads no weights, so its V D elements are sent once too often: 4 V D f(s) bytes."
)
# Why a layout sends more than 5% over its minimum, by name. `document` refuses one too few and one too many.
REASONS = {
    "dp_shard 2, reshard=always": EMBEDDING,
    "dp_shard 4, reshard=always": EMBEDDING,
    "tp 2, recompute=full": AGAIN,
    "tp 2, recompute=selective": (
        "Selective recomputation saves matrix products, attention and reductions over the ranks, but no gathered "
        "tensors: each block gathers its two inputs once more, 2 A f(tp)."
    ),
    "cp 2, recompute=full": "Recomputation gathers keys and values once more.",
    "tp 2, bf16": (
        "Without FSDP the residual stream and the last norm are fp32. The output of the embedding, the input of the "
        "head and the gradients of both have four bytes per element; those of the blocks have two."
    ),
    "pp 2, 4 microbatches, bf16": "Without FSDP the residual stream, which the stages send, is fp32.",
}


def main() -> None:
    """Count every case, print, and write the document if asked to."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    top.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    options = top.parse_args()
    rows = [row for ranks in sorted({each.ranks for each in CASES}) for row in in_a_world(ranks)]
    names = [each.name for each in CASES]
    rows.sort(key=lambda row: names.index(row["layout"]))
    for row in rows:
        print(json.dumps(row))
    sys.stdout.flush()
    print(overview(rows), by_axis(rows), sep="\n", file=sys.stderr)
    if options.write:
        DOCUMENT.write_text(document(rows))


def in_a_world(ranks: int) -> list[dict[str, Any]]:
    """The cases of that many ranks, counted in processes started for them."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_rank, (ranks, scratch), nprocs=ranks)
        found = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [busiest(rows) for rows in zip(*found, strict=True)]


def _rank(rank: int, ranks: int, scratch: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{scratch}/store", ranks), rank=rank, world_size=ranks)
    with patch.object(p2p_collectives, "uses_p2p", lambda device: False):
        rows = [count(each) for each in CASES if each.ranks == ranks]
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(rows))
    gc.collect()  # models must be gone before the group is
    dist.destroy_process_group()


def busiest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one case's ranks, the one that sends most."""
    return max(rows, key=lambda row: row["bytes"])


def count(chosen: Case) -> dict[str, Any]:
    """One counted step of a case on this rank of a running process group, as a row."""
    config = config_of(chosen)
    engine = NativeEngine(config, torch.device("cpu"))
    assert engine.mesh is not None
    train_step(engine, batches_of(config, engine), config.optim.lr, step=0)  # pipelines exchange shapes once
    mask = patch.object(attention, "causal_lower_right", _unseen(attention.causal_lower_right))
    with mask, WireCounter(engine.mesh) as wire:
        train_step(engine, batches_of(config, engine), config.optim.lr, step=1)
    least = minimum(config, engine)
    return {
        "layout": chosen.name,
        "ranks": chosen.ranks,
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


def config_of(chosen: Case) -> Config:
    """A case as a resolved config."""
    raw = {
        "run": {"dir": "unused", "steps": 2},
        "model": MODEL,
        "data": {"path": "unused", "seq_len": SEQ_LEN, "global_batch": ROWS, "micro_batch": chosen.micro},
        "parallel": chosen.parallel,
        "precision": chosen.precision,
    }
    config = Config.model_validate(raw)
    assert not (broken := check(config, chosen.ranks, 0)), broken
    return resolve(config, chosen.ranks, 0)


def batches_of(config: Config, engine: NativeEngine) -> list[Batch]:
    """This data rank's microbatches, of random tokens."""
    rank, ranks = engine.dp_rank_and_size
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
        super().__init__()  # type: ignore[no-untyped-call]
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

    Weights. P: parameters of this rank's stage and tensor share; s = dp_shard * cp; r = dp_replicate;
    f(p) = (p - 1) / p. Gradients are reduce-scattered once, 4 P f(s) bytes, and what is left of them all-reduced
    over the replicas, 8 P / s f(r). A gather of all weights is 4 P f(s), in bf16 half of that. Within a step
    weights do not change, so with `reshard` never they are gathered once. Those that it frees after forward are
    gathered twice a microbatch, but for the embedding, whose backward reads no weights; those that it does not,
    once a microbatch.

    Tensor. A: bytes of the activations [B, S, D] of the rank's share of the step. Each of a block's two pairs of
    matrices wants whole inputs and leaves partial sums: with the sequence split an all-gather and a
    reduce-scatter of A forward and the same backward, 8 A f(tp) a block; without, an all-reduce of A forward and
    one backward, which is as much. Embedding and head: 2 A f(tp) each. With the sequence split, the norms'
    gradients are partial sums, of which a rank adds up the 1 / s that is left to it. The loss needs three numbers
    per token: the largest logit, the sum of exponentials, the target's logit.

    Context. Per block the keys and values of all, [2, B, S, K, E], are gathered forward, and their gradients
    reduce-scattered backward. Pipeline. A to the next stage and as much to the one before.

    Left out: the counts, losses and norms that a step adds up, a few scalars; and recomputation. With a pipeline
    it knows of `reshard` default alone, which frees nothing until the step's end.
    """
    model, parallel = config.model, config.parallel
    rows = config.data.global_batch // engine.dp_rank_and_size[1]
    blocks = sum(len(part.blocks) for part in engine.model_parts)
    first, last = (
        any(part.is_first_stage for part in engine.model_parts),
        any(part.is_last_stage for part in engine.model_parts),
    )
    tokens = rows * config.data.seq_len // parallel.cp
    width = FP32 if config.precision == "fp32" else 2
    activations = width * tokens * model.d_model

    least = _weights(config, blocks, first, last, microbatches=rows // config.data.micro_batch)
    norms = model.d_model * (2 * blocks + last) / (parallel.dp_shard * parallel.cp) if parallel.sequence_parallel else 0
    least["tp"] = (
        (parallel.tp - 1)
        / parallel.tp
        * (activations * (8 * blocks + 2 * first + 2 * last) + 2 * FP32 * (norms + 3 * tokens * last))
    )
    keys_and_values = 2 * width * tokens * parallel.cp * model.n_kv_heads * model.head_dim / parallel.tp
    least["cp"] = least.get("cp", 0) + blocks * 2 * keys_and_values * (parallel.cp - 1) / parallel.cp
    slices = parallel.tp if parallel.sequence_parallel else 1
    least["pp"] = activations / slices * (2 - first - last)
    return {axis: value for axis, value in least.items() if value}


def _weights(config: Config, blocks: int, first: bool, last: bool, microbatches: int) -> dict[str, float]:
    """Gathers of weights and reductions of gradients, by axis."""
    model, parallel = config.model, config.parallel
    matrices = 2 * model.d_model * model.head_dim * (model.n_heads + model.n_kv_heads) + 3 * model.d_model * model.d_ff
    table = model.vocab_size * model.d_model / parallel.tp
    block, embedding = matrices / parallel.tp + 2 * model.d_model, table * first
    held = blocks * block + embedding + (table + model.d_model) * last
    assert parallel.pp == 1 or parallel.reshard == "default"
    if parallel.reshard == "always":
        gathered = microbatches * (2 * held - embedding)
    elif parallel.reshard == "default" and parallel.pp == 1:  # the last block and what is in no block stay
        gathered = microbatches * (held + (blocks - 1) * block)
    else:
        gathered = held
    reduced = held * (microbatches if parallel.reduce_each_microbatch and parallel.pp == 1 else 1)
    shards, replicas = parallel.dp_shard * parallel.cp, parallel.dp_replicate
    width = FP32 if config.precision == "fp32" else 2
    sharded = " x ".join(axis for axis in ("dp_shard", "cp") if getattr(parallel, axis) > 1)
    return {
        sharded: (width * gathered + FP32 * reduced) * (shards - 1) / shards,
        "dp_replicate": 2 * FP32 * reduced / shards * (replicas - 1) / replicas,
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
    lines = ["| layout | dimension | kind | calls | bytes |", "| --- | --- | --- | ---: | ---: |"]
    for row in rows:
        for part in row["by_axis"]:
            lines.append(f"| {row['layout']} | {part['axis']} | {part['kind']} | {part['calls']} | {part['bytes']:,} |")
    return "\n".join(lines) + "\n"


def explanations(rows: Sequence[dict[str, Any]]) -> str:
    """A line per reason. Raises SystemExit where an excess has none, or a reason no excess."""
    large = {row["layout"]: row["excess"] for row in rows if row["excess"] > ALLOWED_EXCESS}
    if wrong := large.keys() ^ REASONS.keys():
        raise SystemExit(f"excess without a reason, or a reason without an excess: {sorted(wrong)}")
    found: dict[str, list[str]] = {}
    for name, excess in large.items():
        found.setdefault(REASONS[name], []).append(f"{name}: {excess:.1%}")
    return "\n".join(_wrapped(f"- **{'; '.join(names)}.** {reason}") for reason, names in found.items()) + "\n"


def _wrapped(text: str, indent: str = "  ") -> str:
    return textwrap.fill(text, 115, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def document(rows: Sequence[dict[str, Any]]) -> str:
    """docs/communication.md."""
    with torch.device("meta"):
        parameters = sum(each.numel() for each in Decoder(config_of(CASES[0]).model).parameters())
    model = ", ".join(f"{key} {value}" for key, value in MODEL.items())
    counted = (
        f"The model: {model}; {parameters:,} parameters. {ROWS} sequences of {SEQ_LEN} tokens per step; fp32 unless "
        "stated otherwise."
    )
    return f"""\
# Communication

Compare the bytes that a rank sends in one optimizer step with the minimum that its layout needs.
[layouts.md](layouts.md#traffic) has formulas to plan with.

`python benchmarks/communication.py --write` writes this page; edit `benchmarks/communication.py` instead. Counted with
torch {torch.__version__}, Python {platform.python_version()}, gloo on a CPU.

{_wrapped(counted, indent="")}

- Over p ranks, an all-gather or a reduce-scatter of n bytes in total costs n (p - 1) / p, as in a ring. An all-reduce
  costs twice that. A message of n bytes costs its sender n.
- If ranks differ, the table shows the rank that sends most.
- `calls` are collectives and sends over two or more ranks.
- `benchmarks/communication.py:minimum` computes the minimum.

{overview(rows)}
## Layouts with an excess over 5%

V: vocabulary; D: width; A: bytes of the activations of a rank's share of the step; f(p) = (p - 1) / p.

{explanations(rows)}
Smaller excesses are a few scalars per step: the number of valid tokens, the loss, the gradient norm.

## By mesh dimension

{by_axis(rows)}
## How it is counted

A `TorchDispatchMode` sees each operator of torch's communication namespaces before the backend runs it
(`benchmarks/communication.py:WireCounter`). An unknown operator is an error, so none is missed. The ranks of the
process group determine the mesh dimensions. The bytes follow from the shapes, so another backend sends the same for
the same calls.

gloo itself implements a reduce-scatter as an all-reduce, so it sends more bytes. On CPUs, gathers and reductions are
therefore point-to-point messages with as many bytes as in the table (`dist_llm/parallel/p2p_collectives.py`,
`tests/laws/test_p2p_collectives.py`).
"""


if __name__ == "__main__":
    main()
