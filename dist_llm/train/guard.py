"""What becomes of a bad step: one whose loss or gradient is not finite, or whose loss is a spike. The config says."""

import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dist_llm.checkpoint.state import Guarded
from dist_llm.config.schema import GuardConfig
from dist_llm.engines.base import Engine
from dist_llm.errors import DivergedError
from dist_llm.observe.metrics import Row

log = logging.getLogger("dist_llm")

DEVIATION = 1.4826  # of a normal distribution: its standard deviation over its median absolute deviation
KEYS = ("not_finite", "spike")
LEAST = 1e-3  # share of the median below which a deviation is no sign of anything


@dataclass(frozen=True)
class Bad:
    """What is wrong with a step, the key of the section `guard` that says what to do, and what a user may do."""

    key: str
    what: str
    advice: str = (
        "lower optim.lr, or leave out the step's samples by data.skip (tools/inspect_data.py show --run {run} --step "
        "{step} shows them), or let the run do so: guard.{key}: rewind; to go on anyway, guard.{key}: warn"
    )


class RewindError(Exception):
    """A step was bad, and the run is to go on from a checkpoint before it."""

    def __init__(self, step: int, bad: Bad) -> None:
        super().__init__(f"step {step}: {bad.what}")
        self.step, self.by_samples = step, bad.key != "corrupt"


class Guard:
    """Judges each step once, in order; ranks tell each other, so that all come to the same verdict.

    `norms`: whether a gradient norm that is not finite is bad (under fp16 it is how the loss scale is found).
    """

    def __init__(self, config: GuardConfig, state: Guarded, engine: Engine, run: Path) -> None:
        self.config, self.state, self.gather, self.run = config, state, engine.all_gather_ints, run
        self.norms = engine.loss_scale is None
        self.skips = "skip" in (config.not_finite, config.spike)
        self.rewinds = "rewind" in (config.not_finite, config.spike, config.corrupt)
        self.judged: dict[int, Bad | None] = {}  # steps that were judged before they were taken
        self.warned = 0  # the newest step that was warned of

    def should_apply(self, step: int, loss: Tensor, norm: Tensor) -> bool:
        """Whether to take the step. Waits for the device and for all ranks: asked only if `skips`."""
        bad = self._agreed(self._judge(*torch.stack((loss.float(), norm.float())).tolist()))
        self.judged[step] = bad
        return bad is None or self._policy(bad) != "skip"

    def look(self, rows: Sequence[Row]) -> list[Row]:
        """Judge the steps of these rows, and return what to note of them.

        Raises, on all ranks, DivergedError where the run is to end, RewindError where it is to go back.
        """
        # DeepSpeed has not asked before.
        found = {r["step"]: self._judge(r["loss"], r["grad_norm"]) for r in rows if r["step"] not in self.judged}
        if found and any(self.gather(int(any(found.values())))):
            self.judged |= {step: self._agreed(bad) for step, bad in found.items()}
        judged, self.judged = self.judged, {}
        return [note for step, bad in sorted(judged.items()) if bad for note in self._act(step, bad, self._policy(bad))]

    def corrupt(self, step: int, lines: Sequence[str]) -> None:
        """After ranks compared what they hold, or computed. Raises as `look` does if there is a line."""
        if lines:
            advice = "take out the machine that errs (sbatch --exclude NODE), or set guard.corrupt: rewind"
            bad = Bad("corrupt", f"ranks do not agree: {'; '.join(lines)}", advice)
            self._act(step, bad, self.config.corrupt)

    def weigh(self, step: int, finite: bool) -> None:
        """Before a checkpoint, with whether all of this rank's weights are finite. Raises as `look` does."""
        wrong = [rank for rank, each in enumerate(self.gather(int(finite))) if not each]
        if wrong and self.config.not_finite != "warn":
            bad = Bad("not_finite", f"weights of rank {wrong[0]} are not finite after it")
            self._act(step, bad, "rewind" if self.config.not_finite == "rewind" else "stop")

    def _act(self, step: int, bad: Bad, policy: str) -> list[Row]:
        if policy == "stop":
            advice = bad.advice.format(run=self.run, step=step, key=bad.key)
            raise DivergedError(
                f"step {step}: {bad.what}; nothing was saved since. To go on from the last checkpoint, {advice}"
            )
        if policy == "warn":
            repeated, self.warned = self.warned == step - 1, step
            return [] if repeated else [{"step": step, "event": f"step {step}: {bad.what}"}]
        if self.state.spent >= self.config.budget:
            raise DivergedError(
                f"step {step}: {bad.what}, and guard.budget of {self.config.budget} bad steps is spent; nothing was "
                "saved since. Lower optim.lr or look at the data (tools/inspect_data.py), or raise guard.budget"
            )
        self.state.spent += 1
        if policy == "rewind":
            raise RewindError(step, bad)
        return [{"step": step, "event": f"step {step}: {bad.what}; its update was left out"}]

    def _agreed(self, mine: Bad | None) -> Bad | None:
        """A step is bad if one rank finds it so."""
        every = self.gather(1 + KEYS.index(mine.key) if mine else 0)
        worst = min((found for found in every if found), default=0)
        if not worst or (mine and mine.key == KEYS[worst - 1]):
            return mine
        return Bad(KEYS[worst - 1], f"{KEYS[worst - 1]} on rank {every.index(worst)}, and not here")

    def _policy(self, bad: Bad) -> str:
        policy: str = getattr(self.config, bad.key)
        return policy

    def _judge(self, loss: float, norm: float) -> Bad | None:
        """What is wrong with the newest step, if something is; else later losses are compared with its loss, too."""
        if not math.isfinite(loss):
            return Bad("not_finite", f"the loss is {loss}")
        if self.norms and not math.isfinite(norm):
            return Bad("not_finite", f"the gradient's norm is {norm}")
        losses, bad = self.state.losses, None
        if len(losses) == self.config.window and (z := deviations(loss, losses)) > self.config.spike_z:
            bad = Bad("spike", f"a loss of {loss:.4f} is {z:.1f} deviations above the median of those before it")
        if bad is None or self.config.spike == "warn":
            self.state.losses = [*losses, loss][-self.config.window :]
        return bad


def deviations(loss: float, losses: Sequence[float]) -> float:
    """How many robust standard deviations `loss` lies above the median of `losses`."""
    median = statistics.median(losses)
    spread = statistics.median(abs(each - median) for each in losses)
    return (loss - median) / max(DEVIATION * spread, LEAST * abs(median), 1e-12)
