"""Random runs: some minutes of them, and that a failure is found and made small."""

import random

import pytest

from tests.laws import random_runs
from tests.laws.space import describe, violations


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_random_runs_take_the_step_of_one_process() -> None:
    lines: list[str] = []
    failed = random_runs.search(random.randrange(10**6), 300, lines.append)
    assert not failed, "\n".join(lines)


def test_a_failure_is_made_as_small_as_it_can_be() -> None:
    """A fault of tensor ranks with muon, found in a case with much else."""

    def fails(case: dict[str, object]) -> bool:
        return case["tp"] == 2 and case["optimizer"] == "muon"

    rng = random.Random(0)
    case = next(each for _ in range(10_000) if fails(each := random_runs.draw(rng)) and not any(violations(each)))
    assert describe(random_runs.smallest(case, fails)) == "tp=2 optimizer=muon"


def test_a_case_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_runs, "failure", lambda case: "off by 1" if case["cp"] == 2 else None)
    lines: list[str] = []
    failed = random_runs.search(seed=1, seconds=2.0, report=lines.append)
    assert failed
    assert {describe(case) for case, _ in failed} == {"cp=2"}
    assert any(line.startswith("failed: ") for line in lines)
    assert " 0 failed" not in lines[-1]
