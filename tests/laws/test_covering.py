"""Each case of the covering array computes the steps of one process, and the array contains each compatible pair."""

import random

import pytest

from tests.laws import covering
from tests.laws.covering import Target
from tests.laws.run_space import (
    FACTORS,
    Case,
    assert_case_matches_one_process,
    draw_valid_case,
    find_violations,
    format_case,
)

CASES, INCOMPATIBLE = covering.load_array()


@pytest.mark.parametrize("case", CASES, ids=format_case)
def test_a_case_computes_the_step_of_one_process(case: Case) -> None:
    assert_case_matches_one_process(case)


def test_every_case_is_a_valid_run() -> None:
    assert all(case.keys() == FACTORS.keys() for case in CASES)
    assert not [(format_case(case), broken) for case in CASES if (broken := list(find_violations(case)))]


def test_every_compatible_pair_of_values_is_in_a_case() -> None:
    """The same holds for each triple of axes."""
    targets = list(covering.iter_targets())
    assert len(targets) > 1000
    missing = [target for target in targets if target not in INCOMPATIBLE and not covering.is_covered(target, CASES)]
    assert not missing, "pairs are missing; write the array again: python -m tests.laws.covering"


@pytest.mark.parametrize("target", INCOMPATIBLE, ids=str)
def test_a_pair_listed_as_incompatible_has_no_run(target: Target) -> None:
    valid_case = draw_valid_case(random.Random(1), dict(target), max_draws=100)
    assert valid_case is None, (
        f"{format_case(valid_case or {})} is a valid run: write the array again: python -m tests.laws.covering"
    )
