"""The learning-rate schedule: the learning rate as a function of the step."""

import math

from dist_llm.config.optim_sections import (
    ConstantConfig,
    CosineConfig,
    DecayKeys,
    InverseSqrtConfig,
    LinearConfig,
    OptimKeys,
    ScheduleConfig,
    WSDConfig,
)


def learning_rate(optim: OptimKeys, schedule: ScheduleConfig, step: int) -> float:
    """Return the learning rate of update `step`, counted from 1.

    During warm-up (step < warmup_steps) it is lr * step / warmup_steps. After that it depends on the schedule:
    cosine, linear: decay to lr * min_ratio at decay_steps, and stay there.
    inverse_sqrt: lr * sqrt(warmup_steps / step) (Vaswani et al. 2017, 5.3), but at least lr * min_ratio.
    wsd: stay at lr, then decay linearly over the last decay_fraction of decay_steps (Hu et al. 2024).
    constant: stay at lr.
    """
    peak, warmup = optim.lr, schedule.warmup_steps
    assert not isinstance(schedule, DecayKeys) or schedule.decay_steps, "decay_steps is not resolved"
    if step < warmup:
        return peak * step / warmup
    if isinstance(schedule, ConstantConfig):
        return peak
    floor = peak * schedule.min_ratio
    match schedule:
        case InverseSqrtConfig():
            return max(floor, peak * math.sqrt(max(warmup, 1) / step))
        case WSDConfig(decay_steps=end):
            start = max(warmup, end - round(schedule.decay_fraction * end))
            return peak + (floor - peak) * _progress(step, start, end)
        case LinearConfig(decay_steps=end):
            return peak + (floor - peak) * _progress(step, warmup, end)
        case CosineConfig(decay_steps=end):
            return floor + (peak - floor) * (1 + math.cos(math.pi * _progress(step, warmup, end))) / 2


def _progress(step: int, start: int, end: int) -> float:
    """Return 0 up to step `start`, 1 from step `end` on, and a linear function of the step between them."""
    return min(1.0, max(0.0, (step - start) / max(end - start, 1)))
