"""The law on a covering array: each compatible pair of values occurs in at least one of these cases."""

import random

import pytest

from tests.laws import covering
from tests.laws.covering import Target
from tests.laws.space import FACTORS, Case, assert_case_matches_one_process, describe, draw_valid_case, find_violations

CASES, INCOMPATIBLE = covering.load_array()


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_a_case_computes_the_step_of_one_process(case: Case) -> None:
    assert_case_matches_one_process(case)


def test_every_case_is_a_run() -> None:
    assert all(case.keys() == FACTORS.keys() for case in CASES)
    assert not [(describe(case), broken) for case in CASES if (broken := list(find_violations(case)))]


def test_every_compatible_pair_of_values_is_in_a_case() -> None:
    """Each triple of axes is in a case, too."""
    targets = list(covering.iter_targets())
    assert len(targets) > 1000
    missing = [target for target in targets if target not in INCOMPATIBLE and not covering.is_covered(target, CASES)]
    assert not missing, "write the array again: python -m tests.laws.covering"


@pytest.mark.parametrize("target", INCOMPATIBLE, ids=str)
def test_a_pair_listed_as_incompatible_has_no_run(target: Target) -> None:
    valid_case = draw_valid_case(random.Random(1), dict(target), tries=100)
    assert valid_case is None, (
        f"{describe(valid_case or {})} is a run: write the array again: python -m tests.laws.covering"
    )
