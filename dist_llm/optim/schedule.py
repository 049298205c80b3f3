"""The learning-rate schedule: the learning rate as a function of the step."""

import math

from dist_llm.config.optim_sections import (
    ConstantConfig,
    CosineConfig,
    InverseSqrtConfig,
    LinearConfig,
    OptimKeys,
    ScheduleConfig,
    WSDConfig,
)


def learning_rate(optim: OptimKeys, schedule: ScheduleConfig, step: int) -> float:
    """Return the learning rate of update `step`, counted from 1.

    During warmup (step < warmup_steps) it is lr * step / warmup_steps. After that it depends on the schedule:
    cosine, linear: decay to lr * min_ratio at decay_steps, and stay there.
    inverse_sqrt: lr * sqrt(warmup_steps / step) (Vaswani et al. 2017, 5.3), but at least lr * min_ratio.
    wsd: stay at lr, then decay linearly over the last decay_fraction of decay_steps (Hu et al. 2024).
    constant: stay at lr.
    """
    peak, warmup = optim.lr, schedule.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if isinstance(schedule, ConstantConfig):
        return peak
    floor = peak * schedule.min_ratio
    if isinstance(schedule, InverseSqrtConfig):
        return max(floor, peak * math.sqrt(max(warmup, 1) / step))
    decay_end = schedule.decay_steps
    assert decay_end, "decay_steps is not set: resolve_schedule has not run"
    match schedule:
        case WSDConfig():
            decay_start = max(warmup, decay_end - round(schedule.decay_fraction * decay_end))
            return peak + (floor - peak) * _decay_progress(step, decay_start, decay_end)
        case LinearConfig():
            return peak + (floor - peak) * _decay_progress(step, warmup, decay_end)
        case CosineConfig():
            return floor + (peak - floor) * (1 + math.cos(math.pi * _decay_progress(step, warmup, decay_end))) / 2


def _decay_progress(step: int, start: int, end: int) -> float:
    """Return 0 up to step `start`, 1 from step `end` on, and a linear function of the step between them."""
    return min(1.0, max(0.0, (step - start) / max(end - start, 1)))
