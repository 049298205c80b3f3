"""Count the collectives and bytes that each rank sends per optimizer step in each layout; compare with a minimum.

The bytes are those that one rank sends in a ring. Over p ranks, an all-gather or reduce-scatter of a full tensor of n
bytes costs n (p - 1) / p, an all-reduce twice that, and a point-to-point message n at its sender. A collective over one
rank sends nothing and is not counted. If ranks differ, the rank that sends most is shown.

The program starts gloo processes, in which a small decoder takes one step to warm up and one step that is counted.

Prints one JSON line per layout on stdout, then the tables on stderr. --write writes docs/communication.md. It fails if
a layout sends over 5% more than its minimum and REASONS does not explain it.
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
from dist_llm.config.derive import AXES, resolve_config
from dist_llm.config.schema import Config, UnresolvedConfig
from dist_llm.engines.native import NativeEngine
from dist_llm.models import attention
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.parallel import p2p_collectives
from dist_llm.training.step import train_step

DOCUMENT_FILE = Path(__file__).parents[1] / "docs" / "communication.md"
ALLOWED_EXCESS = 0.05
FP32_BYTES = 4  # of an element

# The ratios of vocabulary and hidden units to width are near those of Llama 3 8B; no dimension needs padding.
MODEL: dict[str, Any] = {
    "d_model": 64,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "d_ff": 192,
    "vocab_size": 2048,
}
GLOBAL_BATCH, SEQ_LEN = 8, 128


@dataclass(frozen=True)
class Case:
    """A layout and a precision.

    `parallel` has the keys of the config section. `micro_batch` is the number of sequences in a microbatch; with 0 a
    microbatch has all sequences of the data-parallel rank.
    """

    parallel: dict[str, Any]
    micro_batch: int = 0
    precision: str = "fp32"

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return math.prod(self.parallel.get(axis, 1) for axis in AXES)

    @property
    def name(self) -> str:
        """The layout and the other settings as text, such as `dp_shard 2 x tp 2, 3 microbatches, bf16`."""
        labels = [" x ".join(f"{axis} {self.parallel[axis]}" for axis in AXES if axis in self.parallel)]
        labels += [f"{key}={json.dumps(value)}" for key, value in self.parallel.items() if key not in AXES]
        dp_size = self.parallel.get("dp_replicate", 1) * self.parallel.get("dp_shard", 1)
        labels += [f"{GLOBAL_BATCH // dp_size // self.micro_batch} microbatches"] if self.micro_batch else []
        labels += [self.precision] if self.precision != "fp32" else []
        return ", ".join(labels).replace('"', "")


def make_case(micro_batch: int = 0, precision: str = "fp32", **parallel: Any) -> Case:
    """Make a case; the keywords are keys of the config section `parallel`."""
    return Case(parallel, micro_batch, precision)


CASES = (
    make_case(dp_replicate=2),
    make_case(dp_replicate=2, micro_batch=2),
    make_case(dp_replicate=2, micro_batch=2, reduce_each_microbatch=True),
    make_case(dp_shard=2),
    make_case(dp_shard=2, reshard="always"),
    make_case(dp_shard=2, reshard="never"),
    make_case(dp_shard=4),
    make_case(dp_shard=4, reshard="always"),
    make_case(dp_shard=4, reshard="never"),
    make_case(dp_shard=2, micro_batch=2),
    make_case(dp_shard=2, micro_batch=2, reshard="never"),
    make_case(dp_replicate=2, dp_shard=2),
    make_case(tp=2),
    make_case(tp=2, sequence_parallel=False),
    make_case(cp=2),
    make_case(pp=2, micro_batch=2),
    make_case(dp_shard=2, tp=2),
    make_case(pp=2, dp_shard=2, micro_batch=2),
    make_case(dp_shard=2, recompute="full"),
    make_case(tp=2, recompute="full"),
    make_case(tp=2, recompute="selective"),
    make_case(cp=2, recompute="full"),
    make_case(dp_shard=2, precision="bf16"),
    make_case(tp=2, precision="bf16"),
    make_case(cp=2, precision="bf16"),
    make_case(pp=2, micro_batch=2, precision="bf16"),
    make_case(dp_shard=2, tp=2, precision="bf16"),
)

RECOMPUTED_FORWARD = (
    "Recomputation repeats the forward pass of each block with its collectives. Only the last reduce-scatter is not "
    "repeated, because backward does not need its result. This adds 3 A f(tp) bytes per block."
)
EMBEDDING = (
    "`always` frees all weights after forward and gathers them again for backward. Embedding and head are gathered as "
    "one group. Backward needs the weights of the head, but not the V D weights of the embedding. Gathering these once "
    "more adds 4 V D f(s) bytes."
)
# Why a layout sends over 5% more than its minimum, by the name of the case. `format_explanations` requires a reason
# for each of these layouts and for no other.
REASONS = {
    "dp_shard 2, reshard=always": EMBEDDING,
    "dp_shard 4, reshard=always": EMBEDDING,
    "tp 2, recompute=full": RECOMPUTED_FORWARD,
    "tp 2, recompute=selective": (
        "Selective recomputation keeps the outputs of matrix products, attention and reductions in memory, but not the "
        "gathered tensors. Each block gathers its two inputs once more, which adds 2 A f(tp) bytes."
    ),
    "cp 2, recompute=full": "Recomputation gathers the keys and values of each block once more.",
    "tp 2, bf16": (
        "Without FSDP, the residual stream and the last norm are fp32. The output of the embedding, the input of the "
        "head and their gradients have 4 bytes per element. The activations of the blocks have 2. The minimum assumes "
        "2 everywhere."
    ),
    "pp 2, 4 microbatches, bf16": (
        "Without FSDP, the stages send the residual stream in fp32. The minimum assumes bf16."
    ),
}


def main() -> None:
    """Count all cases, print the rows and tables, and write the document with --write."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT_FILE.name}")
    options = parser.parse_args()
    rows = [row for ranks in sorted({case.ranks for case in CASES}) for row in count_in_processes(ranks)]
    names = [case.name for case in CASES]
    rows.sort(key=lambda row: names.index(row["layout"]))
    for row in rows:
        print(json.dumps(row))
    sys.stdout.flush()
    print(format_overview(rows), format_by_axis(rows), sep="\n", file=sys.stderr)
    if options.write:
        DOCUMENT_FILE.write_text(format_document(rows))


def count_in_processes(ranks: int) -> list[dict[str, Any]]:
    """Start `ranks` gloo processes, count all cases of that size in them, and return one row per case."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_run_rank, (ranks, scratch), nprocs=ranks)
        rows_by_rank = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return [select_busiest_rank(rows) for rows in zip(*rows_by_rank, strict=True)]


def _run_rank(rank: int, ranks: int, scratch: str) -> None:
    """Count the traffic of all cases with this number of ranks; write the rows to the folder `scratch`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{scratch}/store", ranks), rank=rank, world_size=ranks)
    with patch.object(p2p_collectives, "uses_p2p", lambda device: False):
        rows = [count_traffic(case) for case in CASES if case.ranks == ranks]
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(rows))
    gc.collect()  # models must be deleted before the process group
    dist.destroy_process_group()


def select_busiest_rank(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of the rank that sends most; `rows` has one row per rank."""
    return max(rows, key=lambda row: row["bytes"])


def count_traffic(case: Case) -> dict[str, Any]:
    """Count the traffic of one step of a case on this rank, in a running process group; return the row."""
    config = make_case_config(case)
    engine = NativeEngine(config, torch.device("cpu"))
    assert engine.mesh is not None
    # In the first step pipeline stages also exchange shapes, so the second step is counted.
    train_step(engine, make_batches(config, engine), config.optim.lr, step=0)
    mask = patch.object(attention, "causal_lower_right", _outside_modes(attention.causal_lower_right))
    with mask, WireCounter(engine.mesh) as wire:
        train_step(engine, make_batches(config, engine), config.optim.lr, step=1)
    min_bytes = compute_minimum(config, engine)
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


def make_case_config(case: Case) -> Config:
    """Make the resolved config of a case."""
    raw = {
        "run": {"dir": "unused", "steps": 2},
        "model": MODEL,
        "data": {"path": "unused", "seq_len": SEQ_LEN, "global_batch": GLOBAL_BATCH, "micro_batch": case.micro_batch},
        "parallel": case.parallel,
        "precision": case.precision,
    }
    config = UnresolvedConfig.model_validate(raw)
    assert not (violations := check(config, case.ranks, tokenizer_size=0)), violations
    return resolve_config(config, case.ranks, tokenizer_size=0)


def make_batches(config: Config, engine: NativeEngine) -> list[Batch]:
    """Make the microbatches of this data-parallel rank from random tokens."""
    dp_rank, dp_size = engine.dp_rank_and_size
    generator = torch.Generator().manual_seed(dp_rank)
    windows = torch.randint(config.model.vocab_size, (GLOBAL_BATCH // dp_size, SEQ_LEN + 1), generator=generator)
    return [Batch.build(ids[:, :-1], ids[:, 1:], CAUSAL) for ids in windows.split(config.data.micro_batch)]


# --- counting


def _tensor_bytes(tensors: Tensor | Iterable[Any]) -> int:
    """Return the size of a tensor, or of all tensors in nested iterables."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_tensor_bytes(tensor) for tensor in tensors)


FullBytes = Callable[[Sequence[Any], int], int]

# The communication operators that layouts call: (kind, function of (arguments, ranks) -> bytes of the full tensor).
CALLS: dict[str, tuple[str, FullBytes]] = {
    "c10d::allreduce_": ("all-reduce", lambda args, p: _tensor_bytes(args[0])),
    "c10d::_allgather_base_": ("all-gather", lambda args, p: _tensor_bytes(args[0])),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", lambda args, p: _tensor_bytes(args[1])),
    "c10d::send": ("send", lambda args, p: _tensor_bytes(args[0])),
    "_c10d_functional::all_reduce": ("all-reduce", lambda args, p: _tensor_bytes(args[0])),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", lambda args, p: _tensor_bytes(args[0]) * p),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", lambda args, p: _tensor_bytes(args[0])),
}
# Operators that send nothing. The sender counts the bytes of a message, so a receive counts nothing.
SILENT_CALLS = {"c10d::recv_", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"}
NAMESPACES = {"c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor"}
RING_FACTORS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}  # times n (p - 1) / p bytes


class WireCounter(TorchDispatchMode):
    """Counts the calls and the bytes that this rank sends, by (mesh dimension, kind).

    An unknown communication operator raises KeyError.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.coords = {rank: coord for coord, rank in np.ndenumerate(mesh.mesh.numpy())}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(tensor_type, DTensor) for tensor_type in types):
            return NotImplemented  # DTensor calls the collectives again, on local tensors
        if isinstance(func, torch._ops.OpOverload) and func.namespace in NAMESPACES:
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: torch._ops.OpOverload, args: Sequence[Any]) -> None:
        name = func._schema.name
        if name in SILENT_CALLS:
            return
        kind, compute_full_bytes = CALLS[name]
        group = _find_group(func, args)
        ranks = group.size()
        if ranks == 1:
            return
        key = self._name_axes(group), kind
        ring_factor = RING_FACTORS[kind] * (ranks - 1) / ranks if kind in RING_FACTORS else 1
        self.calls[key] += 1
        self.bytes[key] += ring_factor * compute_full_bytes(args, ranks)  # type: ignore[assignment]

    def _name_axes(self, group: dist.ProcessGroup) -> str:
        """Return the names of the mesh dimensions in which the ranks of the group differ."""
        coords = zip(*(self.coords[rank] for rank in dist.get_process_group_ranks(group)), strict=True)
        return " x ".join(axis for axis, values in zip(AXES, coords, strict=True) if len(set(values)) > 1)


def _outside_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` to run without dispatch modes: torch cannot make its causal mask within a mode."""

    def run_without_modes(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return run_without_modes


def _find_group(func: torch._ops.OpOverload, args: Sequence[Any]) -> dist.ProcessGroup:
    """Return the process group of a call: c10d operators take the object, functional collectives its name."""
    for parameter, value in zip(func._schema.arguments, args, strict=False):
        if parameter.name == "process_group":
            return dist.ProcessGroup.unbox(value)
        if parameter.name == "group_name":
            return dist.distributed_c10d._resolve_process_group(value)
    raise AssertionError(f"{func} has no group")


# --- the minimum of a layout


def compute_minimum(config: Config, engine: NativeEngine) -> dict[str, float]:
    """Compute the bytes that this rank must send in a step, by mesh dimension, for its layout.

    Symbols: P, the parameters of the pipeline stage and tensor shard of this rank; A, the bytes of the activations
    [B, S, D] of this rank in the step; s = dp_shard * cp; r = dp_replicate; f(p) = (p - 1) / p.

    Weights (dp_shard, cp): the gradients are reduce-scattered once, 4 P f(s) bytes. An all-gather of all weights takes
    4 P f(s) bytes, in bf16 half of that. With `reshard` never, weights are gathered once per step, since they do not
    change within a step. Weights that are freed after forward are gathered twice per microbatch, except for the
    embedding, whose backward reads no weights. All other weights are gathered once per microbatch.

    Replicas (dp_replicate): the shards of the gradients are all-reduced, 8 P / s f(r) bytes.

    Tensor parallel (tp): a block has two pairs of matrices, each of which needs full inputs and produces partial sums.
    With sequence parallelism, each pair takes an all-gather and a reduce-scatter of A in forward and in backward:
    8 A f(tp) bytes per block. Without, an all-reduce of A in forward and in backward takes as much. Embedding and head
    take 2 A f(tp) each. With sequence parallelism the gradients of the norms are partial sums, of which a rank reduces
    1 / s. The loss needs three numbers per token: the largest logit, the sum of exponentials, and the target logit.

    Context parallel (cp): each block all-gathers keys and values, [2, B, S, K, E], in forward, and reduce-scatters
    their gradients in backward. Pipeline (pp): A goes to the next stage, and its gradient to the previous stage.

    The minimum excludes recomputation and the few scalars that a step sums up: token counts, losses and norms. With a
    pipeline it supports only `reshard` default, which frees no weights until the step ends.
    """
    model, parallel = config.model, config.parallel
    num_sequences = config.data.global_batch // engine.dp_rank_and_size.size
    num_blocks = sum(len(part.blocks) for part in engine.model_parts)
    is_first = any(part.is_first_stage for part in engine.model_parts)
    is_last = any(part.is_last_stage for part in engine.model_parts)
    num_tokens = num_sequences * config.data.seq_len // parallel.cp
    element_bytes = FP32_BYTES if config.precision == "fp32" else 2
    activation_bytes = element_bytes * num_tokens * model.d_model

    num_microbatches = num_sequences // config.data.micro_batch
    min_bytes = _compute_weight_bytes(config, num_blocks, is_first, is_last, num_microbatches)

    num_norm_params = 0.0
    if parallel.sequence_parallel:
        num_norm_params = model.d_model * (2 * num_blocks + is_last) / (parallel.dp_shard * parallel.cp)
    num_all_reduced = num_norm_params + 3 * num_tokens * is_last
    tp_activation_bytes = activation_bytes * (8 * num_blocks + 2 * is_first + 2 * is_last)
    min_bytes["tp"] = (parallel.tp - 1) / parallel.tp * (tp_activation_bytes + 2 * FP32_BYTES * num_all_reduced)

    kv_bytes = 2 * element_bytes * num_tokens * parallel.cp * model.n_kv_heads * model.head_dim / parallel.tp
    min_bytes["cp"] = min_bytes.get("cp", 0) + num_blocks * 2 * kv_bytes * (parallel.cp - 1) / parallel.cp

    num_sequence_shards = parallel.tp if parallel.sequence_parallel else 1
    min_bytes["pp"] = activation_bytes / num_sequence_shards * (2 - is_first - is_last)
    return {axis: num_bytes for axis, num_bytes in min_bytes.items() if num_bytes}


def _compute_weight_bytes(
    config: Config, num_blocks: int, is_first: bool, is_last: bool, num_microbatches: int
) -> dict[str, float]:
    """Compute the bytes of all-gathers of weights and reductions of gradients, by mesh dimension."""
    model, parallel = config.model, config.parallel
    matrix_params = (
        2 * model.d_model * model.head_dim * (model.n_heads + model.n_kv_heads) + 3 * model.d_model * model.d_ff
    )
    vocab_params = model.vocab_size * model.d_model / parallel.tp
    block_params, embedding_params = matrix_params / parallel.tp + 2 * model.d_model, vocab_params * is_first
    stored_params = num_blocks * block_params + embedding_params + (vocab_params + model.d_model) * is_last
    assert parallel.pp == 1 or parallel.reshard == "default"
    if parallel.reshard == "always":
        gathered_params = num_microbatches * (2 * stored_params - embedding_params)
    elif parallel.reshard == "default" and parallel.pp == 1:
        # The last block and the parameters outside of blocks are not freed after forward.
        gathered_params = num_microbatches * (stored_params + (num_blocks - 1) * block_params)
    else:
        gathered_params = stored_params
    reduced_params = stored_params * (num_microbatches if parallel.reduce_each_microbatch and parallel.pp == 1 else 1)
    num_shards, num_replicas = parallel.dp_shard * parallel.cp, parallel.dp_replicate
    element_bytes = FP32_BYTES if config.precision == "fp32" else 2
    shard_axes = " x ".join(axis for axis in ("dp_shard", "cp") if getattr(parallel, axis) > 1)
    return {
        shard_axes: (element_bytes * gathered_params + FP32_BYTES * reduced_params) * (num_shards - 1) / num_shards,
        "dp_replicate": 2 * FP32_BYTES * reduced_params / num_shards * (num_replicas - 1) / num_replicas,
    }


# --- the document


def format_overview(rows: Sequence[dict[str, Any]]) -> str:
    """Format a Markdown table with a line per layout."""
    lines = ["| layout | ranks | calls | bytes | minimum | excess |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        lines.append(
            f"| {row['layout']} | {row['ranks']} | {row['calls']} | {row['bytes']:,} | {row['minimum']:,} | "
            f"{row['excess']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def format_by_axis(rows: Sequence[dict[str, Any]]) -> str:
    """Format a Markdown table with a line per layout, mesh dimension and kind of call."""
    lines = ["| layout | dimension | kind | calls | bytes |", "| --- | --- | --- | ---: | ---: |"]
    for row in rows:
        for entry in row["by_axis"]:
            lines.append(
                f"| {row['layout']} | {entry['axis']} | {entry['kind']} | {entry['calls']} | {entry['bytes']:,} |"
            )
    return "\n".join(lines) + "\n"


def format_explanations(rows: Sequence[dict[str, Any]]) -> str:
    """Format a line per reason, with the layouts to which it applies.

    Raises SystemExit if a layout has an excess over ALLOWED_EXCESS but no reason, or a reason but no such excess.
    """
    large_excesses = {row["layout"]: row["excess"] for row in rows if row["excess"] > ALLOWED_EXCESS}
    if unmatched := large_excesses.keys() ^ REASONS.keys():
        raise SystemExit(
            f"error: these layouts have an excess over {ALLOWED_EXCESS:.0%} without an entry in REASONS, or an entry "
            f"without this excess: {sorted(unmatched)}. Update REASONS"
        )
    names_by_reason: dict[str, list[str]] = {}
    for name, excess in large_excesses.items():
        names_by_reason.setdefault(REASONS[name], []).append(f"{name}: {excess:.1%}")
    return "\n".join(_wrap(f"- **{'; '.join(names)}.** {reason}") for reason, names in names_by_reason.items()) + "\n"


def _wrap(text: str, indent: str = "  ") -> str:
    """Wrap a text of the output."""
    return textwrap.fill(text, 115, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def format_document(rows: Sequence[dict[str, Any]]) -> str:
    """Return the text of docs/communication.md."""
    with torch.device("meta"):
        num_parameters = sum(parameter.numel() for parameter in Decoder(make_case_config(CASES[0]).model).parameters())
    model = ", ".join(f"{key} {value}" for key, value in MODEL.items())
    workload = (
        f"The model: {model}; {num_parameters:,} parameters. {GLOBAL_BATCH} sequences of {SEQ_LEN} tokens per step; "
        "fp32 unless stated otherwise."
    )
    return f"""\
# Communication

See how many bytes a rank sends in one optimizer step, and which layouts send more than they need. To plan a layout,
use the formulas in [layouts.md](layouts.md#traffic).

`python benchmarks/communication.py --write` writes this page; edit `benchmarks/communication.py` instead. The counts
are from torch {torch.__version__} and Python {platform.python_version()}, with gloo on a CPU.

{_wrap(workload, indent="")}

How to read the table:

- `bytes` are the bytes that a rank sends. Over p ranks, an all-gather or reduce-scatter of a full tensor of n bytes
  counts n (p - 1) / p, as in a ring. An all-reduce counts twice as much. A message of n bytes counts n at its sender.
- If ranks send different amounts, the table shows the rank that sends most.
- `calls` is the number of collectives and messages between two or more ranks.
- `minimum` is the number of bytes that the layout needs (`benchmarks/communication.py:compute_minimum`). `excess` is
  the share by which `bytes` exceeds it.
- A case without a number of microbatches has one. `reduce_each_microbatch` reduces gradients after each microbatch;
  otherwise they are reduced once per step.
- `reshard` says when the weights that dp_shard gathers are freed. `always`: after forward, and they are gathered again
  for backward. `never`: at the end of the step. `default`: like `always` for all blocks but the last; the last block,
  the embedding and the head stay in memory. With pp, `default` means `never`.

{format_overview(rows)}
## Layouts with an excess over 5%

- V: vocabulary size. D: width of the model.
- A: bytes of one activation tensor [B, S, D]. B is the number of sequences of a rank in the step, S their length.
- s: number of ranks over which the weights are sharded, dp_shard x cp.
- f(p) = (p - 1) / p: the share of a tensor that an all-gather or a reduce-scatter over p ranks sends.

{format_explanations(rows)}
In all other layouts, the excess consists of a few scalars per step: the number of valid tokens, the loss and the
gradient norm.

## By mesh dimension

Each mesh dimension has its own traffic:

- dp_shard all-gathers weights and reduce-scatters gradients.
- dp_replicate all-reduces gradients.
- tp all-gathers and reduce-scatters activations.
- cp all-gathers keys and values and reduce-scatters their gradients. It also shards the weights, as dp_shard does.
- pp sends activations and their gradients.

All-reduces of up to 24 bytes are the scalars of the step.

{format_by_axis(rows)}
## How it is counted

A `TorchDispatchMode` intercepts each communication operator of torch before the backend runs it
(`benchmarks/communication.py:WireCounter`). An operator that the program does not know raises an error. The ranks of
the process group of a call show to which mesh dimension the call belongs. The program computes the bytes from the
shapes of the tensors and the cost of a ring, so the counts do not depend on the backend.

The bytes that a backend really sends depend on its algorithms. gloo implements a reduce-scatter as an all-reduce, which
sends more than a ring. On CPUs, training therefore replaces all-gathers and reduce-scatters by point-to-point messages
(`dist_llm/parallel/p2p_collectives.py`). These messages send as many bytes as the table says
(`tests/laws/test_p2p_collectives.py`). For this page, the collectives are counted instead of the messages.
"""


if __name__ == "__main__":
    main()
