"""Profile one training step for `gpu.py`: the times of kernels, and the ten largest gaps between kernels.

A gap is a time in which the device runs nothing, between the end of all earlier kernels and the start of the next
kernel. On a CPU, operators that call no other operator stand for kernels. A fake GPU runs no kernels: the result is
only the predicted peak memory. Times are in microseconds (`micros`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import memory
from gpu_context import CaseContext
from gpu_figures import make_training_config
from train import make_native_stepper

MAX_ROWS = 10


@dataclass(frozen=True)
class Span:
    """A kernel on the device or an operator on the host, in microseconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Gap:
    """A time without a kernel, in microseconds, and the kernels before and after it.

    `last_host_operator` is the last operator on the host that starts before the end of the gap.
    """

    start: float
    micros: float
    previous_kernel: str
    next_kernel: str
    last_host_operator: str


def profile_step(
    context: CaseContext, model: str, seq_len: int, batch: int, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """Profile one step after two warm-up steps, and save the trace for Perfetto or chrome://tracing beside the results.

    On a fake GPU, return only the predicted peak memory.
    """
    config = make_training_config(context, model, seq_len, batch, overrides)
    if context.active_fake_gpu is not None:
        return {"traced_peak": memory.trace_steps(config, context.active_fake_gpu)["peak"]}
    run_steps = make_native_stepper(config, context.device)
    run_steps(2)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if context.device_kind == "cuda" else [])]
    with profile(activities=activities) as profiler:
        run_steps(1)
    spans = collect_spans(profiler.events() or [], context.device_kind)
    trace = context.folder / f"gpu-{context.device_kind}-{'compiled' if config.compile else 'eager'}-trace.json.gz"
    context.folder.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return {"trace": trace.name, **summarize_spans(spans.device, spans.host)}


class ProfileSpans(NamedTuple):
    """The spans of a profile on the device and on the host, each sorted by start."""

    device: list[Span]
    host: list[Span]


def collect_spans(events: Iterable[Any], device_kind: str) -> ProfileSpans:
    """Return the spans of the events. On a CPU, the operators that call no other operators count as device spans."""
    device_spans, host_spans = [], []
    for event in events:
        if event.is_user_annotation:  # a range of record_function; it would hide the gaps within the range
            continue
        span = Span(event.name, event.time_range.start, event.time_range.end)
        is_on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if is_on_gpu or (device_kind == "cpu" and not event.cpu_children):
            device_spans.append(span)
        if not is_on_gpu:
            host_spans.append(span)
    device_spans.sort(key=lambda span: span.start)
    host_spans.sort(key=lambda span: span.start)
    return ProfileSpans(device_spans, host_spans)


def summarize_spans(device_spans: Sequence[Span], host_spans: Sequence[Span]) -> dict[str, Any]:
    """Sum up the idle time, and list the kernels that take most time and the largest gaps.

    `kernel_window_micros` is the time from the start of the first kernel to the end of the last one.
    """
    gaps = find_gaps(device_spans, host_spans)
    last_end = max((span.end for span in device_spans), default=0)
    window_micros = last_end - min((span.start for span in device_spans), default=0)
    idle_micros = sum(gap.micros for gap in gaps)
    micros_and_calls: dict[str, tuple[float, int]] = {}  # by the name of the kernel
    for span in device_spans:
        micros, calls = micros_and_calls.get(span.name, (0.0, 0))
        micros_and_calls[span.name] = micros + span.end - span.start, calls + 1
    largest_kernels = sorted(micros_and_calls.items(), key=lambda item: -item[1][0])[:MAX_ROWS]
    largest_gaps = sorted(gaps, key=lambda gap: -gap.micros)[:MAX_ROWS]
    failures = [] if device_spans else ["the profile has no kernel"]
    return {
        "kernel_window_micros": window_micros,
        "idle_micros": idle_micros,
        "idle_fraction": idle_micros / window_micros if window_micros else 0.0,
        "kernels": len(device_spans),
        "largest_kernels": [
            {"name": name[:80], "micros": micros, "calls": calls} for name, (micros, calls) in largest_kernels
        ],
        "gaps": [{**vars(gap), "start": round(gap.start - device_spans[0].start, 1)} for gap in largest_gaps],
        "broken": failures,
    }


def find_gaps(device_spans: Sequence[Span], host_spans: Sequence[Span]) -> list[Gap]:
    """Return all gaps in order of time. Kernels of several streams may overlap."""
    gaps: list[Gap] = []
    if not device_spans:
        return gaps
    latest_span, last_host_operator, next_host = device_spans[0], "", 0
    for span in device_spans[1:]:
        if span.start > latest_span.end:
            while next_host < len(host_spans) and host_spans[next_host].start <= span.start:
                last_host_operator, next_host = host_spans[next_host].name, next_host + 1
            micros = round(span.start - latest_span.end, 1)
            gaps.append(Gap(latest_span.end, micros, latest_span.name[:80], span.name[:80], last_host_operator[:80]))
        if span.end > latest_span.end:
            latest_span = span
    return gaps
