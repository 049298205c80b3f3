"""The dynamic loss scale of fp16 (Micikevicius et al. 2018, 3.2).

Without it small gradients would underflow to zero.
"""

from dataclasses import dataclass

GROWTH_STEPS = 2000  # consecutive finite steps after which the scale doubles


@dataclass
class LossScale:
    """The loss is multiplied by `value` before backward. Both numbers are saved in the checkpoint."""

    value: float = 2.0**16
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Halve after a step with overflow, which is skipped. Double after GROWTH_STEPS finite steps."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps == GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
