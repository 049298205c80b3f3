"""The learning-rate schedule, a pure function of the step."""

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
    """Return the learning rate of update `step`, counted from 1. T_w is warmup_steps, T_c is decay_steps.

    step < T_w: step * lr / T_w. After that, by name: cosine and linear decay to the floor at T_c and stay there;
    inverse_sqrt is lr * sqrt(T_w / step) (Vaswani et al. 2017, 5.3); wsd holds lr and decays linearly over the last
    decay_fraction of T_c (Hu et al. 2024); constant holds lr.
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
    """0 up to `start`, 1 from `end` on, linear between."""
    return min(1.0, max(0.0, (step - start) / max(end - start, 1)))
