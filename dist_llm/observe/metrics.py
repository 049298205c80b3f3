"""Metrics: recorded each step without a device synchronisation, written once per logging interval."""

import json
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.io.atomic import replace_file

MetricsRow = dict[str, Any]
MetricsSink = Callable[[Sequence[MetricsRow]], None]


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step; tensors are still on the device."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    num_valid_tokens: Tensor
    lr: float
    tokens: int  # trained on since the start of the run, including this step
    data_wait_seconds: float
    by_source: Tensor | None = None  # [2, num_sources]: shares of the loss, and valid tokens
    terms: Mapping[str, Tensor] = field(default_factory=dict)  # of a regularised loss, by metric name


class MetricsRecorder:
    """Collects steps until `flush` converts them to rows for the sinks. Only rank 0 has sinks.

    A step time is the interval divided by its number of steps. On a GPU the host runs ahead of the device, so that the
    time of a single step is only known after a synchronisation, which happens once per flush.
    """

    def __init__(
        self,
        sinks: Sequence[MetricsSink],
        flops_per_token: float,
        peak_flops: float,
        device: torch.device,
        source_tokens: dict[str, int] | None = None,
    ) -> None:
        self.sinks, self.device = sinks, device
        self.source_tokens = dict(source_tokens or {})  # valid tokens so far by source, in the order of the sources
        self.mfu_per_rate = flops_per_token / peak_flops if peak_flops else math.nan
        self.pending: list[StepMetrics] = []
        self.start_tokens, self.start_time = 0, time.perf_counter()

    def restart_clock(self, tokens: int) -> None:
        """Start a new interval, so that setup, evaluation or a checkpoint does not count as step time."""
        self.start_tokens, self.start_time = tokens, time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        self.pending.append(metrics)

    def flush(self) -> list[MetricsRow]:
        """Write the pending steps. This is the only place that synchronises with the device."""
        if not self.pending:
            return []
        pending, self.pending = self.pending, []
        names = tuple(pending[0].terms)
        columns = torch.stack(
            [torch.stack([each.float() for each in (m.loss, m.grad_norm, *m.terms.values())]) for m in pending]
        ).tolist()
        seconds = time.perf_counter() - self.start_time
        rate = (pending[-1].tokens - self.start_tokens) / seconds
        of_interval = {
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(seconds / len(pending), 6),
            "mfu": round(rate * self.mfu_per_rate, 5),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        rows: list[MetricsRow] = [
            {
                "step": m.step,
                "loss": loss,
                **dict(zip(names, terms, strict=True)),
                "grad_norm": grad_norm,
                "lr": m.lr,
                "tokens": m.tokens,
                "data_wait_seconds": round(m.data_wait_seconds, 6),
                **of_interval,
            }
            for m, (loss, grad_norm, *terms) in zip(pending, columns, strict=True)
        ]
        for row, m in zip(rows, pending, strict=True):
            if m.by_source is not None:
                row |= self._source_columns(m.by_source.tolist(), float(m.num_valid_tokens))
        self.emit(rows)
        self.restart_clock(pending[-1].tokens)
        return rows

    def _source_columns(self, by_source: list[list[float]], num_valid_tokens: float) -> MetricsRow:
        """Return each source's valid tokens so far, and its mean loss in this step if the step has tokens of it."""
        row: MetricsRow = {}
        for name, share, tokens in zip(self.source_tokens, *by_source, strict=True):
            self.source_tokens[name] += round(tokens)
            row[f"tokens_{name}"] = self.source_tokens[name]
            if tokens:
                row[f"loss_{name}"] = share * num_valid_tokens / tokens
        return row

    def emit(self, rows: Sequence[MetricsRow]) -> None:
        for sink in self.sinks:
            sink(rows)


def read_rows(path: Path) -> Iterator[tuple[bytes, MetricsRow]]:
    """Yield (line, row) of each complete row that has a step; nothing if the file does not exist.

    Lines that a kill or a failing disk damaged are skipped.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and type(row.get("step")) is int:
                yield line.rstrip(b"\r\n"), row


class MetricsFile:
    """metrics.jsonl, one line per row. Rows after `resumed_step` are removed first, so that each step occurs once."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        lines = [line for line, row in read_rows(path) if row["step"] <= resumed_step]
        replace_file(path, b"".join(line + b"\n" for line in lines))
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, rows: Sequence[MetricsRow]) -> None:
        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
