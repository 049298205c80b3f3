"""The learning rate at selected steps, and its bounds for any setting."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.optim_sections import AdamWConfig, ScheduleConfig
from dist_llm.config.section import get_union_members
from dist_llm.optim.schedule import learning_rate

PEAK, FLOOR = 2.0, 0.5
WARMUP, END = 10, 110
NAMES = ("cosine", "linear", "inverse_sqrt", "wsd", "constant")
FALLING_TO_THE_FLOOR = ("cosine", "linear", "wsd")


def rate(name, step, warmup=WARMUP, end=END, min_ratio=FLOOR / PEAK, **kwargs):
    """Return the learning rate of a step; `kwargs` are further keys of the schedule."""
    keys = {"warmup_steps": warmup, "decay_steps": end, "min_ratio": min_ratio, **kwargs}
    member = get_union_members(ScheduleConfig)[name]
    schedule = member(**{key: value for key, value in keys.items() if key in member.model_fields})
    return learning_rate(AdamWConfig(lr=PEAK), schedule, step)


@pytest.mark.parametrize("name", NAMES)
def test_the_warmup_is_linear_from_zero_to_the_peak(name):
    assert [rate(name, step) for step in (0, 1, 5, 9)] == pytest.approx([0.0, 0.2, 1.0, 1.8])
    assert rate(name, WARMUP) == PEAK


@pytest.mark.parametrize("name", NAMES)
def test_first_step_without_warmup_is_near_the_peak(name):
    assert PEAK * 0.97 < rate(name, 1, warmup=0) <= PEAK


@pytest.mark.parametrize("name", FALLING_TO_THE_FLOOR)
def test_rate_stays_at_the_minimum_after_the_decay(name):
    assert [rate(name, step) for step in (END, END + 1, 10 * END)] == pytest.approx([FLOOR] * 3, abs=1e-15)
    assert rate(name, END - 1) > FLOOR


EXPECTED_RATES = {
    # a quarter, half and three quarters of the steps from 10 to 110
    "cosine": [(35, 1.25 + 0.75 * math.sqrt(0.5)), (60, 1.25), (85, 1.25 - 0.75 * math.sqrt(0.5))],
    "linear": [(35, 1.625), (60, 1.25), (85, 0.875)],
    "inverse_sqrt": [(40, 1.0), (90, PEAK / 3), (160, 0.5), (1000, 0.5)],
    "wsd": [(11, PEAK), (88, PEAK), (99, 1.25)],  # decay_fraction 0.2 of 110 steps: 22 steps of decay
    "constant": [(11, PEAK), (110, PEAK), (10**6, PEAK)],
}


@pytest.mark.parametrize("name", NAMES)
def test_rates_at_selected_steps(name):
    for step, expected in EXPECTED_RATES[name]:
        assert rate(name, step) == pytest.approx(expected), step


def test_wsd_decay_does_not_start_before_the_warmup_ends():
    rates = [rate("wsd", step, warmup=100, end=110, decay_fraction=0.5) for step in range(95, 112)]
    assert rates[5] == PEAK
    assert rates[10] == pytest.approx((PEAK + FLOOR) / 2)
    assert max(rates) == PEAK


@pytest.mark.parametrize("name", NAMES)
def test_rate_rises_and_then_falls_without_jumps(name):
    rates = [rate(name, step) for step in range(2 * END)]
    assert all(rate < next_rate for rate, next_rate in pairwise(rates[: WARMUP + 1]))
    assert all(rate >= next_rate for rate, next_rate in pairwise(rates[WARMUP:]))
    # The steepest parts are cosine's middle (pi/2 times linear), the warmup, and wsd's 22 steps of decay.
    assert max(abs(rate - next_rate) for rate, next_rate in pairwise(rates)) <= PEAK / WARMUP + 1e-12


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


@settings(deadline=None)  # the machine may be busy
@given(SETTINGS)
def test_rate_stays_within_its_bounds(setting):
    warmup = int(setting.pop("warmup_share") * setting["end"])
    step, floor = setting["step"], PEAK * setting["min_ratio"]
    actual = rate(**setting, warmup=warmup)
    assert math.isfinite(actual)
    assert actual <= PEAK + 1e-12
    if step < warmup:
        assert actual == pytest.approx(PEAK * step / warmup)
    else:
        assert actual >= floor - 1e-12
    if step > setting["end"] and setting["name"] in FALLING_TO_THE_FLOOR:
        assert actual == pytest.approx(floor, abs=1e-12)


def test_warmup_does_not_depend_on_the_run_length():
    assert [rate("cosine", step, end=5) for step in range(1, 6)] == [rate("cosine", step) for step in range(1, 6)]
