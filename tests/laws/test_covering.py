"""The law on a covering array: every pair of values that a run can have together is in one of these cases."""

import random

import pytest

from tests.laws import covering
from tests.laws.covering import Target
from tests.laws.space import FACTORS, Case, describe, hold_case, random_case, violations

CASES, INCOMPATIBLE = covering.load()


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_a_case_computes_the_step_of_one_process(case: Case) -> None:
    hold_case(case)


def test_every_case_is_a_run() -> None:
    assert all(case.keys() == FACTORS.keys() for case in CASES)
    assert not [(describe(case), broken) for case in CASES if (broken := list(violations(case)))]


def test_every_compatible_pair_of_values_is_in_a_case() -> None:
    """So is each triple of axes."""
    targets = list(covering.targets())
    assert len(targets) > 1000
    missing = [each for each in targets if each not in INCOMPATIBLE and not covering.covered(each, CASES)]
    assert not missing, "write the array again: python -m tests.laws.covering"


@pytest.mark.parametrize("target", INCOMPATIBLE, ids=str)
def test_no_run_has_a_pair_that_is_left_out(target: Target) -> None:
    found = random_case(random.Random(1), dict(target), tries=100)
    assert found is None, f"{describe(found or {})} is a run: write the array again: python -m tests.laws.covering"
