"""The learning-rate schedule, a pure function of the step."""

import math

from dist_llm.config.schema import OptimConfig, ScheduleConfig


def learning_rate(optim: OptimConfig, schedule: ScheduleConfig, step: int) -> float:
    """Return the learning rate of update `step`, counted from 1. T_w is warmup_steps, T_c is decay_steps.

    step < T_w: step * lr / T_w. After that, by name: cosine and linear decay to the floor at T_c and stay there;
    inverse_sqrt is lr * sqrt(T_w / step) (Vaswani et al. 2017, 5.3); wsd holds lr and decays linearly over the last
    decay_fraction of T_c (Hu et al. 2024); constant holds lr.
    """
    peak, floor = optim.lr, optim.lr * schedule.min_ratio
    warmup, end = schedule.warmup_steps, schedule.decay_steps
    assert end or schedule.name in ("constant", "inverse_sqrt"), "decay_steps is not resolved"
    if step < warmup:
        return peak * step / warmup
    match schedule.name:
        case "constant":
            return peak
        case "inverse_sqrt":
            return max(floor, peak * math.sqrt(max(warmup, 1) / step))
        case "wsd":
            start = max(warmup, end - round(schedule.decay_fraction * end))
            return peak + (floor - peak) * _progress(step, start, end)
        case "linear":
            return peak + (floor - peak) * _progress(step, warmup, end)
        case "cosine":
            return floor + (peak - floor) * (1 + math.cos(math.pi * _progress(step, warmup, end))) / 2


def _progress(step: int, start: int, end: int) -> float:
    """0 up to `start`, 1 from `end` on, linear between."""
    return min(1.0, max(0.0, (step - start) / max(end - start, 1)))
