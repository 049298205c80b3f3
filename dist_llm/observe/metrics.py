"""The run's numbers: gathered each step without a device sync, written in one go per interval."""

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

Row = dict[str, Any]
Sink = Callable[[Sequence[Row]], None]


@dataclass(frozen=True)
class Measured:
    """One step's numbers as they come; the tensors are still on the device."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    scored: Tensor
    lr: float
    tokens: int  # consumed since the start of the run, this step included
    data_wait_seconds: float
    by_source: Tensor | None = None  # [2, sources]: their shares of the loss, and their scored tokens
    terms: Mapping[str, Tensor] = field(default_factory=dict)  # of the loss, by the names of the metrics


class Recorder:
    """Holds steps until `flush` turns them into rows for every sink (rank 0), or drops them (the others).

    Times are those of the interval divided by its steps: on a GPU the host runs ahead, so the
    time of a single step means nothing until the device is asked, which is done once per flush.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        flops_per_token: float,
        peak_flops: float,
        device: torch.device,
        source_tokens: dict[str, int] | None = None,
    ) -> None:
        self.sinks, self.device = sinks, device
        self.source_tokens = dict(source_tokens or {})  # scored so far, by source, in the sources' order
        self.mfu_per_rate = flops_per_token / peak_flops if peak_flops else math.nan
        self.held: list[Measured] = []
        self.tokens, self.start = 0, time.perf_counter()

    def restart_clock(self, tokens: int) -> None:
        """Begin an interval now: what came before (set-up, evaluation, a save) is not step time."""
        self.tokens, self.start = tokens, time.perf_counter()

    def add(self, measured: Measured) -> None:
        self.held.append(measured)

    def flush(self) -> list[Row]:
        """Write the held steps. The only place that waits for the device."""
        if not self.held:
            return []
        held, self.held = self.held, []
        names = tuple(held[0].terms)
        columns = torch.stack(
            [torch.stack([each.float() for each in (m.loss, m.grad_norm, *m.terms.values())]) for m in held]
        ).tolist()
        seconds = time.perf_counter() - self.start
        rate = (held[-1].tokens - self.tokens) / seconds
        shared = {
            "tokens_per_second": round(rate, 1),
            "step_seconds": round(seconds / len(held), 6),
            "mfu": round(rate * self.mfu_per_rate, 5),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }
        rows: list[Row] = [
            {
                "step": m.step,
                "loss": loss,
                **dict(zip(names, terms, strict=True)),
                "grad_norm": grad_norm,
                "lr": m.lr,
                "tokens": m.tokens,
                "data_wait_seconds": round(m.data_wait_seconds, 6),
                **shared,
            }
            for m, (loss, grad_norm, *terms) in zip(held, columns, strict=True)
        ]
        for row, m in zip(rows, held, strict=True):
            if m.by_source is not None:
                row |= self._by_source(m.by_source.tolist(), float(m.scored))
        self.emit(rows)
        self.restart_clock(held[-1].tokens)
        return rows

    def _by_source(self, by_source: list[list[float]], scored: float) -> Row:
        """Of each source: the mean loss of this step, where it has tokens in it, and its scored tokens so far."""
        row: Row = {}
        for name, share, tokens in zip(self.source_tokens, *by_source, strict=True):
            self.source_tokens[name] += round(tokens)
            row[f"tokens_{name}"] = self.source_tokens[name]
            if tokens:
                row[f"loss_{name}"] = share * scored / tokens
        return row

    def emit(self, rows: Sequence[Row]) -> None:
        for sink in self.sinks:
            sink(rows)


def read_rows(path: Path) -> Iterator[tuple[bytes, Row]]:
    """(line, row) of each whole row that has a step; none where there is no file.

    A line that a kill or a failing disk left is none.
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
    """metrics.jsonl: each step once. What lies beyond the step resumed from is dropped first."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        kept = [line for line, row in read_rows(path) if row["step"] <= resumed_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        temporary.rename(path)
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, rows: Sequence[Row]) -> None:
        self.file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def peak_memory_bytes(device: torch.device) -> int:
    """Of this process: allocated on its GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
