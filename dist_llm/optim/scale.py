"""The dynamic loss scale of fp16 (Micikevicius et al. 2018, 3.2): small gradients would be zero without it."""

from dataclasses import dataclass

GROWTH_STEPS = 2000  # good steps in a row after which the scale doubles


@dataclass
class LossScale:
    """The loss is multiplied by `value` before backward. Two numbers, kept with the run's progress."""

    value: float = 2.0**16
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Halve after a step whose gradients overflowed (and which is left out); double after many that did not."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
