"""Count the collectives and bytes that each rank sends per optimizer step, for each layout, and compare with a minimum.

Bytes are those that one rank sends in a ring. Over p ranks, an all-gather or reduce-scatter of a full tensor of n bytes
costs n (p - 1) / p, an all-reduce twice that, and a point-to-point message n at its sender. A collective over one rank
sends nothing and is not counted. Of ranks that differ, the one that sends most is shown.

A small decoder takes one step to warm up and one that is counted, in gloo processes that this program starts.

Prints one JSON line per layout on stdout, then the tables on stderr. --write puts them into docs/communication.md and
fails if it does not explain an excess over 5%.
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
from dist_llm.training.step import train_step

DOCUMENT = Path(__file__).parents[1] / "docs" / "communication.md"
ALLOWED_EXCESS = 0.05
FP32 = 4  # bytes of an element

# ObjectiveVocabulary over width, and hidden units over width, near those of Llama 3 8B; nothing is padded.
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
    """A layout; `micro` is the number of rows in a microbatch, with 0 for all rows of the data rank."""

    parallel: dict[str, Any]
    micro: int = 0
    precision: str = "fp32"

    @property
    def ranks(self) -> int:
        return math.prod(self.parallel.get(axis, 1) for axis in AXES)

    @property
    def name(self) -> str:
        labels = [" x ".join(f"{axis} {self.parallel[axis]}" for axis in AXES if axis in self.parallel)]
        labels += [f"{key}={json.dumps(value)}" for key, value in self.parallel.items() if key not in AXES]
        data_ranks = self.parallel.get("dp_replicate", 1) * self.parallel.get("dp_shard", 1)
        labels += [f"{ROWS // data_ranks // self.micro} microbatches"] if self.micro else []
        labels += [self.precision] if self.precision != "fp32" else []
        return ", ".join(labels).replace('"', "")


def make_case(micro: int = 0, precision: str = "fp32", **parallel: Any) -> Case:
    """Make a case from `parallel` keys given as keywords."""
    return Case(parallel, micro, precision)


CASES = (
    make_case(dp_replicate=2),
    make_case(dp_replicate=2, micro=2),
    make_case(dp_replicate=2, micro=2, reduce_each_microbatch=True),
    make_case(dp_shard=2),
    make_case(dp_shard=2, reshard="always"),
    make_case(dp_shard=2, reshard="never"),
    make_case(dp_shard=4),
    make_case(dp_shard=4, reshard="always"),
    make_case(dp_shard=4, reshard="never"),
    make_case(dp_shard=2, micro=2),
    make_case(dp_shard=2, micro=2, reshard="never"),
    make_case(dp_replicate=2, dp_shard=2),
    make_case(tp=2),
    make_case(tp=2, sequence_parallel=False),
    make_case(cp=2),
    make_case(pp=2, micro=2),
    make_case(dp_shard=2, tp=2),
    make_case(pp=2, dp_shard=2, micro=2),
    make_case(dp_shard=2, recompute="full"),
    make_case(tp=2, recompute="full"),
    make_case(tp=2, recompute="selective"),
    make_case(cp=2, recompute="full"),
    make_case(dp_shard=2, precision="bf16"),
    make_case(tp=2, precision="bf16"),
    make_case(cp=2, precision="bf16"),
    make_case(pp=2, micro=2, precision="bf16"),
    make_case(dp_shard=2, tp=2, precision="bf16"),
)

RECOMPUTED_FORWARD = (
    "Recomputation repeats the forward pass of each block with its collectives, except for the last reduce-scatter, "
    "whose result is not needed: 3 A f(tp) per block."
)
EMBEDDING = (
    "`always` frees all weights after forward and gathers them again for backward. Embedding and head are gathered as "
    "one group. Backward reads the head's weights but not the embedding's, so the V D elements of the embedding are "
    "gathered once more than needed: 4 V D f(s) bytes."
)
# Why a layout sends more than 5% over its minimum, by name; `document` requires exactly these reasons.
REASONS = {
    "dp_shard 2, reshard=always": EMBEDDING,
    "dp_shard 4, reshard=always": EMBEDDING,
    "tp 2, recompute=full": RECOMPUTED_FORWARD,
    "tp 2, recompute=selective": (
        "Selective recomputation keeps the outputs of matrix products, attention and reductions in memory, but not the "
        "gathered tensors: each block gathers its two inputs once more, 2 A f(tp)."
    ),
    "cp 2, recompute=full": "Recomputation gathers keys and values once more.",
    "tp 2, bf16": (
        "Without FSDP the residual stream and the last norm are fp32. The output of the embedding, the input of the "
        "head and the gradients of both have four bytes per element; those of the blocks have two."
    ),
    "pp 2, 4 microbatches, bf16": "Without FSDP the residual stream, which the stages send, is fp32.",
}


def main() -> None:
    """Count and print all cases, and write the document with --write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    options = parser.parse_args()
    rows = [row for ranks in sorted({each.ranks for each in CASES}) for row in count_in_world(ranks)]
    names = [each.name for each in CASES]
    rows.sort(key=lambda row: names.index(row["layout"]))
    for row in rows:
        print(json.dumps(row))
    sys.stdout.flush()
    print(overview(rows), by_axis(rows), sep="\n", file=sys.stderr)
    if options.write:
        DOCUMENT.write_text(document(rows))


def count_in_world(ranks: int) -> list[dict[str, Any]]:
    """Count the cases of that many ranks, in processes started for them."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_rank, (ranks, scratch), nprocs=ranks)
        rows_by_rank = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [busiest(rows) for rows in zip(*rows_by_rank, strict=True)]


def _rank(rank: int, ranks: int, scratch: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{scratch}/store", ranks), rank=rank, world_size=ranks)
    with patch.object(p2p_collectives, "uses_p2p", lambda device: False):
        rows = [count(each) for each in CASES if each.ranks == ranks]
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(rows))
    gc.collect()  # models must be deleted before the group
    dist.destroy_process_group()


def busiest(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of the rank that sends most."""
    return max(rows, key=lambda row: row["bytes"])


def count(case: Case) -> dict[str, Any]:
    """Count one step of a case on this rank of a running process group."""
    config = make_config(case)
    engine = NativeEngine(config, torch.device("cpu"))
    assert engine.mesh is not None
    train_step(engine, make_batches(config, engine), config.optim.lr, step=0)  # pipelines exchange shapes once
    mask = patch.object(attention, "causal_lower_right", _outside_modes(attention.causal_lower_right))
    with mask, WireCounter(engine.mesh) as wire:
        train_step(engine, make_batches(config, engine), config.optim.lr, step=1)
    min_bytes = minimum(config, engine)
    return {
        "layout": case.name,
        "ranks": case.ranks,
        "calls": wire.calls.total(),
        "bytes": round(wire.bytes.total()),
        "minimum": round(sum(min_bytes.values())),
        "excess": wire.bytes.total() / sum(min_bytes.values()) - 1,
        "by_axis": [
            {"axis": axis, "kind": kind, "calls": calls, "bytes": round(wire.bytes[axis, kind])}
            for (axis, kind), calls in sorted(wire.calls.items())
        ],
        "minimum_by_axis": {axis: round(value) for axis, value in min_bytes.items()},
    }


def make_config(case: Case) -> Config:
    """Make the resolved config of a case."""
    raw = {
        "run": {"dir": "unused", "steps": 2},
        "model": MODEL,
        "data": {"path": "unused", "seq_len": SEQ_LEN, "global_batch": ROWS, "micro_batch": case.micro},
        "parallel": case.parallel,
        "precision": case.precision,
    }
    config = Config.model_validate(raw)
    assert not (broken := check(config, case.ranks, 0)), broken
    return resolve(config, case.ranks, 0)


def make_batches(config: Config, engine: NativeEngine) -> list[Batch]:
    """Make this data rank's microbatches of random tokens."""
    rank, ranks = engine.dp_rank_and_size
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(config.model.vocab_size, (ROWS // ranks, SEQ_LEN + 1), generator=generator)
    return [Batch.build(rows[:, :-1], rows[:, 1:], CAUSAL) for rows in tokens.split(config.data.micro_batch)]


# --- counting


def _bytes(tensors: Tensor | Iterable[Any]) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(each) for each in tensors)


FullBytes = Callable[[Sequence[Any], int], int]

# Each call that layouts make: its kind, and a function of (arguments, ranks) for the bytes of the full tensor.
CALLS: dict[str, tuple[str, FullBytes]] = {
    "c10d::allreduce_": ("all-reduce", lambda args, p: _bytes(args[0])),
    "c10d::_allgather_base_": ("all-gather", lambda args, p: _bytes(args[0])),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", lambda args, p: _bytes(args[1])),
    "c10d::send": ("send", lambda args, p: _bytes(args[0])),
    "_c10d_functional::all_reduce": ("all-reduce", lambda args, p: _bytes(args[0])),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", lambda args, p: _bytes(args[0]) * p),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", lambda args, p: _bytes(args[0])),
}
# Calls that send nothing; a receive is counted at its sender.
SILENT = {"c10d::recv_", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}
NAMESPACES = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"}
RING = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


class WireCounter(TorchDispatchMode):
    """Counts calls and bytes that this rank sends, by (axis, kind); an unknown call is an error."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.coords = {rank: coord for coord, rank in np.ndenumerate(mesh.mesh.numpy())}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # a DTensor calls collectives on plain tensors, which come here in turn
        if isinstance(func, torch._ops.OpOverload) and func.namespace in NAMESPACES:
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: torch._ops.OpOverload, args: Sequence[Any]) -> None:
        name = func._schema.name
        if name in SILENT:
            return
        kind, full_bytes = CALLS[name]
        group = _group(func, args)
        ranks = group.size()
        if ranks == 1:
            return
        key = self._axes(group), kind
        ring_factor = RING[kind] * (ranks - 1) / ranks if kind in RING else 1
        self.calls[key] += 1
        self.bytes[key] += ring_factor * full_bytes(args, ranks)  # type: ignore[assignment]

    def _axes(self, group: dist.ProcessGroup) -> str:
        """Return the axes along which the group's ranks differ."""
        coords = zip(*(self.coords[rank] for rank in dist.get_process_group_ranks(group)), strict=True)
        return " x ".join(axis for axis, values in zip(AXES, coords, strict=True) if len(set(values)) > 1)


def _outside_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` to run outside of all modes, in which torch cannot make its causal mask."""

    def run(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return run


def _group(func: torch._ops.OpOverload, args: Sequence[Any]) -> dist.ProcessGroup:
    """Return a call's group: an object in older calls, a name in functional ones."""
    for parameter, value in zip(func._schema.arguments, args, strict=False):
        if parameter.name == "process_group":
            return dist.ProcessGroup.unbox(value)
        if parameter.name == "group_name":
            return dist.distributed_c10d._resolve_process_group(value)
    raise AssertionError(f"{func} has no group")


# --- the minimum of a layout


def minimum(config: Config, engine: NativeEngine) -> dict[str, float]:
    """Compute the bytes that this rank must send in a step, by axis, for its layout.

    Weights. P: parameters of this rank's stage and tensor shard; s = dp_shard * cp; r = dp_replicate; f(p) = (p - 1) /
    p. Gradients are reduce-scattered once, 4 P f(s) bytes, and their shards are all-reduced over the replicas, 8 P / s
    f(r). A gather of all weights is 4 P f(s), and half of that in bf16. Weights do not change within a step, so with
    `reshard` never they are gathered once. Weights that are freed after forward are gathered twice a microbatch, except
    for the embedding, whose backward reads no weights; others are gathered once a microbatch.

    Tensor. A: bytes of the activations [B, S, D] in the rank's share of the step. Each of a block's two pairs of
    matrices needs full inputs and produces partial sums. With a split sequence, that is an all-gather and a
    reduce-scatter of A in forward and the same in backward, 8 A f(tp) a block; without, an all-reduce of A in each,
    which is as much. Embedding and head take 2 A f(tp) each. With a split sequence the norms' gradients are partial
    sums, of which a rank reduces its 1 / s. The loss needs three numbers per token: the largest logit, the sum of
    exponentials and the target's logit.

    Context. Each block gathers all keys and values, [2, B, S, K, E], in forward, and reduce-scatters their gradients in
    backward. Pipeline. A goes to the next stage, and as much to the previous one.

    The minimum excludes the counts, losses and norms that a step sums up, which are a few scalars, and recomputation.
    With a pipeline it supports only `reshard` default, which frees nothing until the step ends.
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

    min_bytes = _weights(config, blocks, first, last, microbatches=rows // config.data.micro_batch)
    norms = model.d_model * (2 * blocks + last) / (parallel.dp_shard * parallel.cp) if parallel.sequence_parallel else 0
    min_bytes["tp"] = (
        (parallel.tp - 1)
        / parallel.tp
        * (activations * (8 * blocks + 2 * first + 2 * last) + 2 * FP32 * (norms + 3 * tokens * last))
    )
    keys_and_values = 2 * width * tokens * parallel.cp * model.n_kv_heads * model.head_dim / parallel.tp
    min_bytes["cp"] = min_bytes.get("cp", 0) + blocks * 2 * keys_and_values * (parallel.cp - 1) / parallel.cp
    slices = parallel.tp if parallel.sequence_parallel else 1
    min_bytes["pp"] = activations / slices * (2 - first - last)
    return {axis: value for axis, value in min_bytes.items() if value}


def _weights(config: Config, blocks: int, first: bool, last: bool, microbatches: int) -> dict[str, float]:
    """Compute gathers of weights and reductions of gradients, by axis."""
    model, parallel = config.model, config.parallel
    matrix_params = (
        2 * model.d_model * model.head_dim * (model.n_heads + model.n_kv_heads) + 3 * model.d_model * model.d_ff
    )
    vocab_params = model.vocab_size * model.d_model / parallel.tp
    block, embedding = matrix_params / parallel.tp + 2 * model.d_model, vocab_params * first
    stored_params = blocks * block + embedding + (vocab_params + model.d_model) * last
    assert parallel.pp == 1 or parallel.reshard == "default"
    if parallel.reshard == "always":
        gathered = microbatches * (2 * stored_params - embedding)
    elif parallel.reshard == "default" and parallel.pp == 1:  # the last block and parameters outside of blocks stay
        gathered = microbatches * (stored_params + (blocks - 1) * block)
    else:
        gathered = stored_params
    reduced = stored_params * (microbatches if parallel.reduce_each_microbatch and parallel.pp == 1 else 1)
    shards, replicas = parallel.dp_shard * parallel.cp, parallel.dp_replicate
    width = FP32 if config.precision == "fp32" else 2
    sharded = " x ".join(axis for axis in ("dp_shard", "cp") if getattr(parallel, axis) > 1)
    return {
        sharded: (width * gathered + FP32 * reduced) * (shards - 1) / shards,
        "dp_replicate": 2 * FP32 * reduced / shards * (replicas - 1) / replicas,
    }


# --- the document


def overview(rows: Sequence[dict[str, Any]]) -> str:
    """Format a Markdown table with a line per layout."""
    lines = ["| layout | ranks | calls | bytes | minimum | excess |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['layout']} | {row['ranks']} | {row['calls']} | {row['bytes']:,} | {row['minimum']:,} | "
            f"{row['excess']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def by_axis(rows: Sequence[dict[str, Any]]) -> str:
    """Format a Markdown table with a line per layout, axis and kind of call."""
    lines = ["| layout | dimension | kind | calls | bytes |", "| --- | --- | --- | ---: | ---: |"]
    for row in rows:
        for entry in row["by_axis"]:
            lines.append(
                f"| {row['layout']} | {entry['axis']} | {entry['kind']} | {entry['calls']} | {entry['bytes']:,} |"
            )
    return "\n".join(lines) + "\n"


def explanations(rows: Sequence[dict[str, Any]]) -> str:
    """Format a line per reason.

    Raises SystemExit if an excess has no reason, or a reason no excess.
    """
    large = {row["layout"]: row["excess"] for row in rows if row["excess"] > ALLOWED_EXCESS}
    if unmatched := large.keys() ^ REASONS.keys():
        raise SystemExit(f"excess without a reason, or a reason without an excess: {sorted(unmatched)}")
    names_by_reason: dict[str, list[str]] = {}
    for name, excess in large.items():
        names_by_reason.setdefault(REASONS[name], []).append(f"{name}: {excess:.1%}")
    return (
        "\n".join(_wrapped(f"- **{'; '.join(names)}.** {reason}") for reason, names in names_by_reason.items()) + "\n"
    )


def _wrapped(text: str, indent: str = "  ") -> str:
    return textwrap.fill(text, 115, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def document(rows: Sequence[dict[str, Any]]) -> str:
    """Format docs/communication.md."""
    with torch.device("meta"):
        parameters = sum(each.numel() for each in Decoder(make_config(CASES[0]).model).parameters())
    model = ", ".join(f"{key} {value}" for key, value in MODEL.items())
    counted = (
        f"The model: {model}; {parameters:,} parameters. {ROWS} sequences of {SEQ_LEN} tokens per step; fp32 unless "
        "stated otherwise."
    )
    return f"""\
# Communication

This page compares the bytes that a rank sends in one optimizer step with the minimum that its layout needs. To plan a
layout, use the formulas in [layouts.md](layouts.md#traffic).

`python benchmarks/communication.py --write` writes this page; edit `benchmarks/communication.py` instead. The counts
are from torch {torch.__version__} and Python {platform.python_version()}, with gloo on a CPU.

{_wrapped(counted, indent="")}

- Over p ranks, an all-gather or a reduce-scatter of n bytes in total costs n (p - 1) / p, as in a ring. An all-reduce
  costs twice that. A message of n bytes costs its sender n.
- If ranks differ, the table shows the rank that sends most.
- `calls` are collectives and sends over two or more ranks.
- `benchmarks/communication.py:minimum` computes the minimum.
- `reshard` says when the weights that dp_shard gathers are freed. By default the blocks except the last are freed after
  forward and gathered again for backward; the last block, the embedding and the head stay in memory. With pp nothing
  is freed by default. `always` frees all of them after forward, and `never` frees none until the step ends.

{overview(rows)}
## Layouts with an excess over 5%

- V: vocabulary size; D: model width.
- A: bytes of one activation tensor [B, S, D], where B and S are a rank's sequences in the step and their length.
- s: number of ranks over which the weights are sharded, dp_shard x cp.
- f(p) = (p - 1) / p: the share of a tensor that an all-gather or a reduce-scatter over p ranks sends.

{explanations(rows)}
In all other layouts the remaining excess is a few scalars per step: the number of valid tokens, the loss, the gradient
norm.

## By mesh dimension

Each mesh dimension has its own traffic. dp_shard gathers weights and reduce-scatters gradients, dp_replicate
all-reduces gradients, tp gathers and reduce-scatters activations, cp does the same with keys and values and also shards
the weights, and pp sends activations. All-reduces of up to 24 bytes are the scalars of the step.

{by_axis(rows)}
## How it is counted

A `TorchDispatchMode` sees each operator of torch's communication namespaces before the backend runs it
(`benchmarks/communication.py:WireCounter`). An unknown operator is an error, so none is missed. The ranks of the
process group determine the mesh dimensions. The bytes are computed from the shapes with the cost of a ring, so the
counts do not depend on the backend.

What a backend sends depends on its algorithms. gloo implements a reduce-scatter as an all-reduce, which sends more than
a ring. On CPUs, training therefore replaces gathers and reductions by point-to-point messages, which send as many bytes
as the table says (`dist_llm/parallel/p2p_collectives.py`, `tests/laws/test_p2p_collectives.py`). This page counts the
collectives, not these messages.
"""


if __name__ == "__main__":
    main()
