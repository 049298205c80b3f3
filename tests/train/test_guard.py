"""Which steps are bad, and what becomes of them."""

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

from dist_llm.checkpoint.state import Guarded, Progress
from dist_llm.config.schema import GuardConfig
from dist_llm.errors import DivergedError
from dist_llm.optim.scale import LossScale
from dist_llm.train.guard import Guard, RewindError, deviations

STEADY = [2.0 + 0.01 * (number % 5) for number in range(20)]


def guard(losses: list[float] = STEADY, norms: bool = True, spent: int = 0, **config: Any) -> Guard:
    engine = SimpleNamespace(gather=lambda value: [value], loss_scale=None if norms else LossScale())
    return Guard(GuardConfig(window=20, **config), Guarded(list(losses), spent), engine, Path("runs/a"))  # type: ignore[arg-type]


def row(step: int, loss: float, norm: float = 1.0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": norm}


def test_good_steps_move_the_window() -> None:
    state = (found := guard()).state
    assert found.look([row(21, 2.03), row(22, 1.5)]) == []
    assert state.losses == [*STEADY[2:], 2.03, 1.5]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (row(21, math.nan), "step 21: the loss is nan"),
        (row(21, math.inf), "step 21: the loss is inf"),
        (row(21, 2.0, math.nan), "step 21: the gradient's norm is nan"),
    ],
)
def test_what_is_not_finite_ends_the_run_by_default(bad: dict[str, Any], what: str) -> None:
    with pytest.raises(DivergedError) as error:
        guard().look([row(20, 2.0), bad, row(22, math.nan)])
    assert str(error.value).startswith(what)
    assert "--run runs/a --step 21" in str(error.value)


def test_under_fp16_norms_are_how_the_scale_is_found() -> None:
    assert guard(norms=False).look([row(21, 2.0, math.inf)]) == []
    with pytest.raises(DivergedError, match="the loss is nan"):
        guard(norms=False).look([row(21, math.nan, math.nan)])


def test_a_spike_is_told_of_once_and_its_level_becomes_the_usual_one() -> None:
    found = guard()
    notes = found.look([row(step, 4.0) for step in range(21, 24)])
    assert [note["step"] for note in notes] == [21]
    assert "a loss of 4.0000 is " in notes[0]["event"]
    assert found.look([row(step, 4.0) for step in range(24, 60)]) == [], "one in a row is enough"
    assert found.look([row(60, 8.0)])[0]["step"] == 60


@pytest.mark.parametrize(
    ("key", "bad"), [("not_finite", row(21, math.nan)), ("spike", row(21, 4.0))], ids=["not_finite", "spike"]
)
def test_policies(key: str, bad: dict[str, Any]) -> None:
    with pytest.raises(DivergedError):
        guard(**{key: "stop"}).look([bad])
    going_back = guard(**{key: "rewind"})
    with pytest.raises(RewindError, match=r"^step 21: ") as error:
        going_back.look([bad, row(22, 2.0)])
    assert (error.value.step, going_back.state.spent) == (21, 1)
    leaving_out = guard(**{key: "skip"})
    (note,) = leaving_out.look([bad])
    assert note["event"].endswith("its update was left out")
    assert (leaving_out.state.spent, leaving_out.state.losses) == (1, STEADY)


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_the_budget_ends_the_run(policy: str) -> None:
    with pytest.raises(DivergedError, match=r"step 21: the loss is nan, and guard.budget of 3 bad steps is spent"):
        guard(spent=3, budget=3, not_finite=policy).look([row(21, math.nan)])


def test_a_step_is_judged_before_it_is_taken_and_once() -> None:
    found = guard(not_finite="skip")
    one = torch.tensor(1.0)
    assert found.accept(21, torch.tensor(2.0625), one)
    assert not found.accept(22, torch.tensor(2.0), torch.tensor(math.inf))
    assert not found.accept(23, torch.tensor(math.nan), one)
    assert found.accept(24, torch.tensor(9.0), one), "a spike is another matter"
    notes = found.look([row(21, 2.0625), row(22, 2.0, math.inf), row(23, math.nan), row(24, 9.0)])
    assert [note["step"] for note in notes] == [22, 23, 24]
    assert found.state.spent == 2
    assert found.state.losses == [*STEADY[2:], 2.0625, 9.0]


def test_no_step_is_a_spike_before_the_window_is_full() -> None:
    assert guard(STEADY[:19], spike="stop").look([row(20, 100.0)]) == []


@given(st.lists(st.floats(0.1, 20), min_size=4, max_size=40), st.floats(0.1, 20), st.floats(0.5, 8))
def test_deviations(losses: list[float], loss: float, factor: float) -> None:
    found = deviations(loss, losses)
    assert math.isfinite(found)
    assert (found > 0) == (loss > statistics.median(losses))
    assert deviations(loss * factor, [each * factor for each in losses]) == pytest.approx(found, rel=1e-6, abs=1e-9)


def test_deviations_are_those_of_a_normal_distribution() -> None:
    losses = torch.randn(10_001, generator=torch.Generator().manual_seed(0)).add(50).tolist()
    assert deviations(53.0, losses) == pytest.approx(3.0, rel=0.05)
    assert deviations(3.003, [3.0] * 10) == pytest.approx(1.0), "a deviation of nothing is no measure"


def test_progress_keeps_it() -> None:
    before = Progress(3, 30, 300, guard=Guarded([1.0, 2.0], 4, [(3, 9)]))
    assert Progress.parse(json.dumps(before.as_dict()).encode()) == before
    older = {key: value for key, value in before.as_dict().items() if key != "guard"}
    assert Progress.parse(json.dumps(older).encode()).guard == Guarded()


def test_weights_that_are_not_finite_are_not_saved() -> None:
    guard().weigh(5, finite=True)
    guard(not_finite="warn").weigh(5, finite=False)
    with pytest.raises(DivergedError, match="step 5: weights of rank 0 are not finite after it"):
        guard(not_finite="skip").weigh(5, finite=False)
    with pytest.raises(RewindError):
        guard(not_finite="rewind").weigh(5, finite=False)
