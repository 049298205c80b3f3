"""The dynamic loss scale of fp16 training (Micikevicius et al. 2018, 3.2).

It keeps small gradients from underflowing to zero.
"""

from dataclasses import dataclass

GROWTH_STEPS = 2000  # consecutive finite steps after which the scale doubles


@dataclass
class LossScale:
    """The factor of the loss before backward, and the steps since its last change. Checkpoints have both fields."""

    value: float = 2.0**16
    good_steps: int = 0  # consecutive steps with finite gradients

    def update(self, is_finite: bool) -> None:
        """Update the scale after a step whose gradients are finite or not.

        Halve the scale after an overflow. Double it after GROWTH_STEPS consecutive finite steps.
        """
        self.good_steps = self.good_steps + 1 if is_finite else 0
        if not is_finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
