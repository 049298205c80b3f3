"""The learning rate at its landmarks, and within its bounds for any setting."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.optim_sections import AdamWConfig, ScheduleConfig
from dist_llm.config.section import union_members
from dist_llm.optim.schedule import learning_rate

PEAK, FLOOR = 2.0, 0.5
WARMUP, END = 10, 110
NAMES = ("cosine", "linear", "inverse_sqrt", "wsd", "constant")
FALLING_TO_THE_FLOOR = ("cosine", "linear", "wsd")


def rate(name, step, warmup=WARMUP, end=END, min_ratio=FLOOR / PEAK, **more):
    keys = {"warmup_steps": warmup, "decay_steps": end, "min_ratio": min_ratio, **more}
    member = union_members(ScheduleConfig)[name]
    schedule = member(**{key: value for key, value in keys.items() if key in member.model_fields})
    return learning_rate(AdamWConfig(lr=PEAK), schedule, step)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_linear_from_zero_and_ends_at_the_peak(name):
    assert [rate(name, step) for step in (0, 1, 5, 9)] == pytest.approx([0.0, 0.2, 1.0, 1.8])
    assert rate(name, WARMUP) == PEAK


@pytest.mark.parametrize("name", NAMES)
def test_without_warm_up_the_first_step_is_at_the_peak_or_just_below(name):
    assert PEAK * 0.97 < rate(name, 1, warmup=0) <= PEAK


@pytest.mark.parametrize("name", FALLING_TO_THE_FLOOR)
def test_the_floor_is_reached_at_the_end_and_kept(name):
    assert [rate(name, step) for step in (END, END + 1, 10 * END)] == pytest.approx([FLOOR] * 3, abs=1e-15)
    assert rate(name, END - 1) > FLOOR


LANDMARKS = {
    # a quarter, a half and three quarters of the way from 10 to 110
    "cosine": [(35, 1.25 + 0.75 * math.sqrt(0.5)), (60, 1.25), (85, 1.25 - 0.75 * math.sqrt(0.5))],
    "linear": [(35, 1.625), (60, 1.25), (85, 0.875)],
    "inverse_sqrt": [(40, 1.0), (90, PEAK / 3), (160, 0.5), (1000, 0.5)],
    "wsd": [(11, PEAK), (88, PEAK), (99, 1.25)],  # decay_fraction 0.2 of 110: 22 steps of decay
    "constant": [(11, PEAK), (110, PEAK), (10**6, PEAK)],
}


@pytest.mark.parametrize("name", NAMES)
def test_landmarks(name):
    for step, want in LANDMARKS[name]:
        assert rate(name, step) == pytest.approx(want), step


def test_wsd_decay_does_not_begin_before_the_warm_up_ends():
    rates = [rate("wsd", step, warmup=100, end=110, decay_fraction=0.5) for step in range(95, 112)]
    assert rates[5] == PEAK
    assert rates[10] == pytest.approx((PEAK + FLOOR) / 2)
    assert max(rates) == PEAK


@pytest.mark.parametrize("name", NAMES)
def test_rising_then_falling_without_a_jump(name):
    rates = [rate(name, step) for step in range(2 * END)]
    assert all(a < b for a, b in pairwise(rates[: WARMUP + 1]))
    assert all(a >= b for a, b in pairwise(rates[WARMUP:]))
    # The steepest is cosine's middle (pi/2 times linear), the warm-up, or wsd's 22 steps of decay.
    assert max(abs(a - b) for a, b in pairwise(rates)) <= PEAK / WARMUP + 1e-12


SETTINGS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(NAMES),
        "end": st.integers(1, 1000),
        "warmup_share": st.floats(0, 1),
        "min_ratio": st.floats(0, 1),
        "decay_fraction": st.floats(0, 1, exclude_max=True),
        "step": st.integers(1, 3000),
    }
)


@settings(deadline=None)  # other work on the machine is no failure
@given(SETTINGS)
def test_every_rate_is_within_its_bounds(setting):
    warmup = int(setting.pop("warmup_share") * setting["end"])
    step, floor = setting["step"], PEAK * setting["min_ratio"]
    got = rate(**setting, warmup=warmup)
    assert math.isfinite(got)
    assert got <= PEAK + 1e-12
    if step < warmup:
        assert got == pytest.approx(PEAK * step / warmup)
    else:
        assert got >= floor - 1e-12
    if step > setting["end"] and setting["name"] in FALLING_TO_THE_FLOOR:
        assert got == pytest.approx(floor, abs=1e-12)


def test_a_trial_that_ends_inside_the_warm_up_is_the_start_of_the_long_run():
    assert [rate("cosine", step, end=5) for step in range(1, 6)] == [rate("cosine", step) for step in range(1, 6)]
