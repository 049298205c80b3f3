"""Metrics of training steps: recorded in each step, written once per logging interval.

Recording does not synchronize with the device, so the host can run ahead of it.
"""

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
from dist_llm.observe.router_metrics import RouterMetrics, RouterStatsByLayer

MetricsRow = dict[str, Any]  # {metric name: value}: one line of metrics.jsonl
MetricsSink = Callable[[Sequence[MetricsRow]], None]


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one step; tensors are still on the device."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    loss_denominator: Tensor  # by which the sum of the losses was divided
    lr: float
    tokens: int  # tokens of the run so far, including this step
    data_wait_seconds: float
    by_source: Tensor | None = None  # [3, num_sources]: share of the loss, loss weights and valid tokens of each
    loss_terms: Mapping[str, Tensor] = field(default_factory=dict)  # terms of a regularized loss, by metric name
    router_stats: RouterStatsByLayer = field(default_factory=dict)  # of the layers with a mixture of experts


class MetricsRecorder:
    """Collects the metrics of steps until `flush` converts them to rows for the sinks. Only rank 0 has sinks.

    A sink writes rows: to metrics.jsonl, TensorBoard or the console. The step time is the mean over the interval since
    the last flush, because only a flush synchronizes with the device.
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
        self.mfu_per_token_rate = flops_per_token / peak_flops if peak_flops else math.nan
        self.router_metrics = RouterMetrics()
        self.pending: list[StepMetrics] = []
        self.start_tokens, self.start_time = 0, time.perf_counter()

    def restart_clock(self, tokens: int) -> None:
        """Start a new interval at `tokens` tokens of the run.

        Call this after setup, an evaluation or a checkpoint, whose duration is not part of the step time.
        """
        self.start_tokens, self.start_time = tokens, time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        """Record the metrics of one step."""
        self.pending.append(metrics)

    def flush(self) -> list[MetricsRow]:
        """Write the rows of the recorded steps to the sinks, and return the rows. Synchronizes with the device."""
        if not self.pending:
            return []
        pending, self.pending = self.pending, []
        term_names = tuple(pending[0].loss_terms)
        device_values = [torch.stack([value.float() for value in _device_values(metrics)]) for metrics in pending]
        values_by_step = torch.stack(device_values).tolist()  # one synchronization for all steps
        seconds = time.perf_counter() - self.start_time
        tokens_per_second = (pending[-1].tokens - self.start_tokens) / seconds
        interval_values = {
            "tokens_per_second": round(tokens_per_second, 1),
            "step_seconds": round(seconds / len(pending), 6),
            "mfu": round(tokens_per_second * self.mfu_per_token_rate, 5),
            "peak_memory_bytes": get_peak_memory_bytes(self.device),
        }
        rows: list[MetricsRow] = [
            {
                "step": metrics.step,
                "loss": loss,
                **dict(zip(term_names, terms, strict=True)),
                "grad_norm": grad_norm,
                "lr": metrics.lr,
                "tokens": metrics.tokens,
                "data_wait_seconds": round(metrics.data_wait_seconds, 6),
                **interval_values,
            }
            for metrics, (loss, grad_norm, *terms) in zip(pending, values_by_step, strict=True)
        ]
        router_rows = self.router_metrics.summarize([metrics.router_stats for metrics in pending])
        for row, metrics, router_row in zip(rows, pending, router_rows, strict=True):
            row |= router_row
            if metrics.by_source is not None:
                row |= self._source_metrics(metrics.by_source.tolist(), float(metrics.loss_denominator))
        self.emit(rows)
        self.restart_clock(pending[-1].tokens)
        return rows

    def _source_metrics(self, by_source: list[list[float]], loss_denominator: float) -> MetricsRow:
        """Return the metrics of each data source: its valid tokens so far, and its mean loss in this step.

        A source without tokens in this step has no loss.
        """
        row: MetricsRow = {}
        for name, loss_share, loss_weight, num_tokens in zip(self.source_tokens, *by_source, strict=True):
            self.source_tokens[name] += round(num_tokens)
            row[f"tokens_{name}"] = self.source_tokens[name]
            if loss_weight:
                row[f"loss_{name}"] = loss_share * loss_denominator / loss_weight
        return row

    def emit(self, rows: Sequence[MetricsRow]) -> None:
        """Pass rows to all sinks."""
        for sink in self.sinks:
            sink(rows)


def _device_values(metrics: StepMetrics) -> tuple[Tensor, ...]:
    """Return the values of a step that are on the device, in the order in which `flush` reads them."""
    return (metrics.loss, metrics.grad_norm, *metrics.loss_terms.values())


def read_rows(path: Path) -> Iterator[tuple[bytes, MetricsRow]]:
    """Yield (line, row) for each row of metrics.jsonl that has a step; nothing if the file does not exist.

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
    """A sink that writes metrics.jsonl, one line per row. Rows after `resumed_step` are removed first.

    A resumed run writes those rows again.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        lines = [line for line, row in read_rows(path) if row["step"] <= resumed_step]
        replace_file(path, b"".join(line + b"\n" for line in lines))
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, rows: Sequence[MetricsRow]) -> None:
        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def get_peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
