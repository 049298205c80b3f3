"""Random runs compute the steps of one process, and a failing run is reported and reduced to its smallest case."""

import random

import pytest

from tests.laws import random_runs
from tests.laws.run_space import find_violations, format_case


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_random_runs_compute_the_step_of_one_process() -> None:
    lines: list[str] = []
    failed = random_runs.search_failures(random.randrange(10**6), seconds=300, report=lines.append)
    assert not failed, "\n".join(lines)


def test_a_failing_case_is_reduced_to_its_cause() -> None:
    """The planted failure needs tensor parallelism and Muon; the drawn case has many other options."""

    def fails(case: dict[str, object]) -> bool:
        return case["tp"] == 2 and case["optimizer"] == "muon"

    rng = random.Random(0)
    draws = (random_runs.draw_case(rng) for _ in range(10_000))
    case = next(draw for draw in draws if fails(draw) and not any(find_violations(draw)))
    assert format_case(random_runs.shrink_case(case, fails)) == "tp=2 optimizer=muon"


def test_a_failing_case_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_runs, "find_failure", lambda case: "off by 1" if case["cp"] == 2 else None)
    lines: list[str] = []
    failed = random_runs.search_failures(seed=1, seconds=2.0, report=lines.append)
    assert failed
    assert {format_case(case) for case, _ in failed} == {"cp=2"}
    assert any(line.startswith("failed: ") for line in lines)
    assert " 0 failed" not in lines[-1]
