"""The guard detects anomalies and applies the policy of the config."""

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.checkpoint.checkpoint_state import GuardState, Progress
from dist_llm.config.schema import GuardConfig
from dist_llm.errors import DivergedError
from dist_llm.optim.loss_scale import LossScale
from dist_llm.training.guard import Guard, RewindRequest, compute_robust_z_score

STEADY_LOSSES = [2.0 + 0.01 * (step % 5) for step in range(20)]


def build_guard(
    losses: list[float] = STEADY_LOSSES, *, checks_norm: bool = True, num_used: int = 0, **config: Any
) -> Guard:
    """Build a guard after steps with these losses, which has used `num_used` bad steps of its budget.

    With `checks_norm`, there is no loss scale, so a norm that is not finite is an anomaly. `config` are keys of section
    `guard`.
    """
    engine = SimpleNamespace(all_gather_ints=lambda value: [value], loss_scale=None if checks_norm else LossScale())
    state = GuardState(list(losses), num_used=num_used)
    return Guard(GuardConfig(window=20, **config), state, engine, Path("runs/a"))  # type: ignore[arg-type]


def make_row(step: int, loss: float, norm: float = 1.0) -> dict[str, Any]:
    """Return the metrics of a step."""
    return {"step": step, "loss": loss, "grad_norm": norm}


def test_good_steps_enter_the_loss_window() -> None:
    guard = build_guard()
    assert guard.check_metrics([make_row(step=21, loss=2.03), make_row(step=22, loss=1.5)]) == []
    assert guard.state.losses == [*STEADY_LOSSES[2:], 2.03, 1.5]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (make_row(step=21, loss=math.nan), "step 21: the loss is nan"),
        (make_row(step=21, loss=math.inf), "step 21: the loss is inf"),
        (make_row(step=21, loss=2.0, norm=math.nan), "step 21: the gradient's norm is nan"),
    ],
)
def test_non_finite_values_end_the_run_by_default(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(DivergedError) as error:
        build_guard().check_metrics([make_row(step=20, loss=2.0), bad, make_row(step=22, loss=math.nan)])
    assert str(error.value).startswith(message)
    assert "--run runs/a --step 21" in str(error.value)


def test_under_fp16_a_non_finite_norm_is_accepted() -> None:
    assert build_guard(checks_norm=False).check_metrics([make_row(step=21, loss=2.0, norm=math.inf)]) == []
    with pytest.raises(DivergedError, match="the loss is nan"):
        build_guard(checks_norm=False).check_metrics([make_row(step=21, loss=math.nan, norm=math.nan)])


def test_a_lasting_spike_is_reported_once() -> None:
    guard = build_guard()
    notes = guard.check_metrics([make_row(step, loss=4.0) for step in range(21, 24)])
    assert [note["step"] for note in notes] == [21]
    assert "a loss of 4.0000 is " in notes[0]["event"]
    assert guard.check_metrics([make_row(step, loss=4.0) for step in range(24, 60)]) == [], (
        "a series of spikes has a second event"
    )
    assert guard.check_metrics([make_row(step=60, loss=8.0)])[0]["step"] == 60


@pytest.mark.parametrize(
    ("key", "bad"),
    [("not_finite", make_row(step=21, loss=math.nan)), ("spike", make_row(step=21, loss=4.0))],
    ids=["not_finite", "spike"],
)
def test_each_policy_takes_its_action(key: str, bad: dict[str, Any]) -> None:
    with pytest.raises(DivergedError):
        build_guard(**{key: "stop"}).check_metrics([bad])
    rewinding = build_guard(**{key: "rewind"})
    with pytest.raises(RewindRequest, match=r"^step 21: ") as excinfo:
        rewinding.check_metrics([bad, make_row(step=22, loss=2.0)])
    assert (excinfo.value.step, rewinding.state.num_used) == (21, 1)
    skipping = build_guard(**{key: "skip"})
    (note,) = skipping.check_metrics([bad])
    assert note["event"].endswith("its update was skipped")
    assert (skipping.state.num_used, skipping.state.losses) == (1, STEADY_LOSSES)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_a_used_up_budget_ends_the_run(policy: str) -> None:
    with pytest.raises(DivergedError, match=r"step 21: the loss is nan, and guard.budget of 3 bad steps is used up"):
        build_guard(num_used=3, budget=3, not_finite=policy).check_metrics([make_row(step=21, loss=math.nan)])


def test_a_step_is_checked_once_before_its_update() -> None:
    guard = build_guard(not_finite="skip")
    finite_loss = torch.tensor(1.0)
    assert guard.should_apply(21, torch.tensor(2.0625), finite_loss)
    assert not guard.should_apply(22, torch.tensor(2.0), torch.tensor(math.inf))
    assert not guard.should_apply(23, torch.tensor(math.nan), finite_loss)
    assert guard.should_apply(24, torch.tensor(9.0), finite_loss), (
        "should_apply rejects a spike, which check_metrics handles"
    )
    notes = guard.check_metrics(
        [
            make_row(step=21, loss=2.0625),
            make_row(step=22, loss=2.0, norm=math.inf),
            make_row(step=23, loss=math.nan),
            make_row(step=24, loss=9.0),
        ]
    )
    assert [note["step"] for note in notes] == [22, 23, 24]
    assert guard.state.num_used == 2
    assert guard.state.losses == [*STEADY_LOSSES[2:], 2.0625, 9.0]


def test_no_step_is_a_spike_before_the_window_is_full() -> None:
    assert build_guard(STEADY_LOSSES[:19], spike="stop").check_metrics([make_row(step=20, loss=100.0)]) == []


@given(st.lists(st.floats(0.1, 20), min_size=4, max_size=40), st.floats(0.1, 20), st.floats(0.5, 8))
def test_the_z_score_is_scale_invariant(losses: list[float], loss: float, factor: float) -> None:
    z_score = compute_robust_z_score(loss, losses)
    assert math.isfinite(z_score)
    assert (z_score > 0) == (loss > statistics.median(losses))
    assert compute_robust_z_score(loss * factor, [recent_loss * factor for recent_loss in losses]) == pytest.approx(
        z_score, rel=1e-6, abs=1e-9
    )


def test_the_z_score_matches_a_normal_distribution() -> None:
    losses = torch.randn(10_001, generator=torch.Generator().manual_seed(0)).add(50).tolist()
    assert compute_robust_z_score(53.0, losses) == pytest.approx(3.0, rel=0.05)
    assert compute_robust_z_score(3.003, [3.0] * 10) == pytest.approx(1.0), (
        "a deviation of zero is not raised to the minimum"
    )


def test_progress_stores_the_guard_state() -> None:
    before = Progress(step=3, samples=30, tokens=300, guard=GuardState([1.0, 2.0], num_used=4, skipped_ranges=[(3, 9)]))
    assert Progress.parse(json.dumps(before.as_dict()).encode()) == before
    assert before.as_dict()["guard"] == {"losses": [1.0, 2.0], "num_used": 4, "left_out": [(3, 9)]}
    without_guard = {key: value for key, value in before.as_dict().items() if key != "guard"}
    assert Progress.parse(json.dumps(without_guard).encode()).guard == GuardState()
    guard_of_0_1 = {"losses": [1.0, 2.0], "spent": 4, "left_out": [[3, 9]]}
    assert Progress.parse(json.dumps({**without_guard, "guard": guard_of_0_1}).encode()) == before


def test_weights_that_are_not_finite_are_not_saved() -> None:
    build_guard().check_weights_finite(5, finite=True)
    build_guard(not_finite="warn").check_weights_finite(5, finite=False)
    with pytest.raises(DivergedError, match="step 5: weights of rank 0 are not finite after it"):
        build_guard(not_finite="skip").check_weights_finite(5, finite=False)
    with pytest.raises(RewindRequest):
        build_guard(not_finite="rewind").check_weights_finite(5, finite=False)
