"""Detect anomalies and act on them as section `guard` of the config says: warn, skip the update, rewind or stop.

Anomalies are non-finite losses, gradients or weights, loss spikes, and differences between ranks that should agree.
"""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import GuardState
from dist_llm.config.schema import GuardConfig
from dist_llm.engines.base import Engine
from dist_llm.errors import DivergedError
from dist_llm.observe.metrics import MetricsRow

log = logging.getLogger("dist_llm")

MAD_TO_SIGMA = 1.4826  # standard deviation / median absolute deviation of a normal distribution
STEP_KEYS = ("not_finite", "spike")  # keys of section `guard` for the anomalies of a single step
MIN_RELATIVE_SIGMA = 1e-3  # of the median; a smaller spread would make every deviation a spike


@dataclass(frozen=True)
class Anomaly:
    """The problem of a step, the key of section `guard` that selects the action, and advice for the user."""

    key: str
    problem: str
    advice: str = (
        "lower optim.lr, or leave out the step's samples with data.skip (dist-llm data show --run {run} --step "
        "{step} shows them), or let the run do so: guard.{key}: rewind; to continue anyway, guard.{key}: warn"
    )


class RewindRequest(Exception):  # noqa: N818  # control flow, which the run catches
    """A step had an anomaly, and the run has to continue from a checkpoint before that step."""

    def __init__(self, step: int, anomaly: Anomaly) -> None:
        super().__init__(f"step {step}: {anomaly.problem}")
        self.step, self.skips_samples = step, anomaly.key != "corrupt"


class Guard:
    """Checks the metrics of each step once, in order.

    Ranks all-gather their results, so all ranks take the same action.
    """

    def __init__(self, config: GuardConfig, state: GuardState, engine: Engine, run_dir: Path) -> None:
        self.config, self.state, self.all_gather, self.run_dir = config, state, engine.all_gather_ints, run_dir
        # Under fp16, gradients overflow until the loss scale fits. Only the loss is checked there.
        self.checks_norm = engine.loss_scale is None
        self.can_skip = "skip" in (config.not_finite, config.spike)
        self.can_rewind = "rewind" in (config.not_finite, config.spike, config.corrupt)
        self.anomaly_by_step: dict[int, Anomaly | None] = {}  # of the steps that `should_apply` has checked
        self.last_warned_step = 0

    def should_apply(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Return whether to apply the update of this step.

        Called only if `can_skip`, because it waits for the device and all ranks.
        """
        anomaly = self._all_gather_anomaly(self._find_anomaly(*torch.stack((loss.float(), norm.float())).tolist()))
        self.anomaly_by_step[step] = anomaly
        return anomaly is None or self._policy(anomaly) != "skip"

    def check_metrics(self, rows: Sequence[MetricsRow]) -> list[MetricsRow]:
        """Check the steps of `rows` and return rows with events.

        Raises on all ranks: DivergedError if the run has to end, RewindRequest if it has to rewind.
        """
        # DeepSpeed's partitioned optimizers do not call `should_apply`.
        unchecked = [row for row in rows if row["step"] not in self.anomaly_by_step]
        anomalies = {row["step"]: self._find_anomaly(row["loss"], row["grad_norm"]) for row in unchecked}
        if anomalies and any(self.all_gather(int(any(anomalies.values())))):
            self.anomaly_by_step |= {step: self._all_gather_anomaly(anomaly) for step, anomaly in anomalies.items()}
        anomaly_by_step, self.anomaly_by_step = self.anomaly_by_step, {}
        return [
            event
            for step, anomaly in sorted(anomaly_by_step.items())
            if anomaly
            for event in self._handle(step, anomaly, self._policy(anomaly))
        ]

    def handle_divergence(self, step: int, lines: Sequence[str]) -> None:
        """Handle differences between ranks: one line for each difference. Raises the errors of `check_metrics`."""
        if lines:
            advice = "take out the faulty machine (sbatch --exclude NODE), or set guard.corrupt: rewind"
            anomaly = Anomaly("corrupt", f"ranks do not agree: {'; '.join(lines)}", advice)
            self._handle(step, anomaly, self.config.corrupt)

    def check_weights_finite(self, step: int, finite: bool) -> None:
        """Check the weights before a checkpoint. `finite`: all weights of this rank are finite.

        Raises the errors of `check_metrics`.
        """
        bad_ranks = [rank for rank, is_finite in enumerate(self.all_gather(int(finite))) if not is_finite]
        if bad_ranks and self.config.not_finite != "warn":
            anomaly = Anomaly("not_finite", f"weights of rank {bad_ranks[0]} are not finite after it")
            self._handle(step, anomaly, "rewind" if self.config.not_finite == "rewind" else "stop")

    def _handle(self, step: int, anomaly: Anomaly, policy: str) -> list[MetricsRow]:
        if policy == "stop":
            advice = anomaly.advice.format(run=self.run_dir, step=step, key=anomaly.key)
            raise DivergedError(
                f"step {step}: {anomaly.problem}; nothing was saved since. To continue from the last checkpoint, "
                f"{advice}"
            )
        if policy == "warn":
            is_repeated, self.last_warned_step = self.last_warned_step == step - 1, step
            return [] if is_repeated else [{"step": step, "event": f"step {step}: {anomaly.problem}"}]
        if self.state.num_used >= self.config.budget:
            raise DivergedError(
                f"step {step}: {anomaly.problem}, and guard.budget of {self.config.budget} bad steps is used up; "
                "nothing was saved since. Lower optim.lr, inspect the data (dist-llm data), or raise "
                "guard.budget"
            )
        self.state.num_used += 1
        if policy == "rewind":
            raise RewindRequest(step, anomaly)
        return [{"step": step, "event": f"step {step}: {anomaly.problem}; its update was skipped"}]

    def _all_gather_anomaly(self, local: Anomaly | None) -> Anomaly | None:
        """All-gather the anomalies of all ranks and return the one to act on; None if no rank has an anomaly."""
        codes = self.all_gather(1 + STEP_KEYS.index(local.key) if local else 0)
        code = min((rank_code for rank_code in codes if rank_code), default=0)
        if not code:
            return local
        key = STEP_KEYS[code - 1]
        return local if local and local.key == key else Anomaly(key, f"{key} on rank {codes.index(code)}, and not here")

    def _policy(self, anomaly: Anomaly) -> str:
        policy: str = getattr(self.config, anomaly.key)
        return policy

    def _find_anomaly(self, loss: float, norm: float) -> Anomaly | None:
        """Return the anomaly of the newest step, if any. Otherwise add its loss to the recent losses of good steps."""
        if not math.isfinite(loss):
            return Anomaly("not_finite", f"the loss is {loss}")
        if self.checks_norm and not math.isfinite(norm):
            return Anomaly("not_finite", f"the gradient's norm is {norm}")
        losses, anomaly = self.state.losses, None
        if len(losses) == self.config.window and (z := compute_robust_z_score(loss, losses)) > self.config.spike_z:
            anomaly = Anomaly("spike", f"a loss of {loss:.4f} is {z:.1f} deviations above the median of recent losses")
        if anomaly is None or self.config.spike == "warn":
            self.state.losses = [*losses, loss][-self.config.window :]
        return anomaly


def compute_robust_z_score(loss: float, losses: Sequence[float]) -> float:
    """Return how many standard deviations `loss` is above the median of `losses`.

    The standard deviation is estimated from the median absolute deviation (MAD).
    """
    median = statistics.median(losses)
    mad = statistics.median(abs(recent_loss - median) for recent_loss in losses)
    return (loss - median) / max(MAD_TO_SIGMA * mad, MIN_RELATIVE_SIGMA * abs(median), 1e-12)
