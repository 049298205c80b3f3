"""A profile of one training step for `gpu.py`: the times of kernels, and the ten largest gaps between them.

In a gap the device runs nothing: it lies between the end of all earlier kernels and the start of the next. On a CPU,
operators that call no other stand for kernels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import memory
from gpu_context import Context
from gpu_figures import training_config
from train import make_ours

MAX_ROWS = 10


@dataclass(frozen=True)
class Span:
    """A kernel on the device or an operator on the host, in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Gap:
    """A time without a kernel in microseconds, the kernels around it, and the last host operator before its end."""

    start: float
    micros: float
    after: str
    before: str
    host: str


def profile_step(context: Context, model: str, seq_len: int, batch: int, keys: tuple[str, ...]) -> dict[str, Any]:
    """Profile one step after two to warm up, and save the trace for chrome://tracing or Perfetto beside the rows."""
    config = training_config(context, model, seq_len, batch, keys)
    if context.gpu is not None:
        return {"traced_peak": memory.trace_steps(config, context.gpu)["peak"]}
    run_steps = make_ours(config, context.device)
    run_steps(2)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.kind == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run_steps(1)
    kernels, host = spans(profiler.events() or [], context.kind)
    trace = context.folder / f"gpu-{context.kind}-{'compiled' if config.compile else 'eager'}-trace.json.gz"
    context.folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return {"trace": trace.name, **summary(kernels, host)}


def spans(events: Iterable[Any], kind: str) -> tuple[list[Span], list[Span]]:
    """Return (kernels, host operators), each sorted by start."""
    kernels, host = [], []
    for event in events:
        if event.is_user_annotation:  # a range of record_function, which hides the gaps within it
            continue
        span = Span(event.name, event.time_range.start, event.time_range.end)
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device or (kind == "cpu" and not event.cpu_children):
            kernels.append(span)
        if not on_device:
            host.append(span)
    return sorted(kernels, key=lambda span: span.start), sorted(host, key=lambda span: span.start)


def summary(kernels: Sequence[Span], host: Sequence[Span]) -> dict[str, Any]:
    """Sum up busy and idle time, the largest kernels and the largest gaps."""
    all_gaps = gaps(kernels, host)
    total = max((span.end for span in kernels), default=0) - min((span.start for span in kernels), default=0)
    idle = sum(gap.micros for gap in all_gaps)
    times: dict[str, tuple[float, int]] = {}
    for span in kernels:
        micros, calls = times.get(span.name, (0.0, 0))
        times[span.name] = micros + span.end - span.start, calls + 1
    top = sorted(times.items(), key=lambda item: -item[1][0])[:MAX_ROWS]
    largest = sorted(all_gaps, key=lambda gap: -gap.micros)[:MAX_ROWS]
    broken = [] if kernels else ["the profile has no kernel"]
    return {
        "step_micros": total,
        "idle_micros": idle,
        "idle": idle / total if total else 0.0,
        "kernels": len(kernels),
        "largest_kernels": [{"name": name[:80], "micros": micros, "calls": calls} for name, (micros, calls) in top],
        "gaps": [{**vars(gap), "start": round(gap.start - kernels[0].start, 1)} for gap in largest],
        "broken": broken,
    }


def gaps(kernels: Sequence[Span], host: Sequence[Span]) -> list[Gap]:
    """List all gaps in order; kernels of several streams may overlap."""
    result: list[Gap] = []
    if not kernels:
        return result
    last, started, number = kernels[0], "", 0
    for span in kernels[1:]:
        if span.start > last.end:
            while number < len(host) and host[number].start <= span.start:
                started, number = host[number].name, number + 1
            result.append(Gap(last.end, round(span.start - last.end, 1), last.name[:80], span.name[:80], started[:80]))
        if span.end > last.end:
            last = span
    return result
