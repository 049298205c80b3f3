"""The laws run in worlds that are shared by the whole session and stopped at its end."""

from collections.abc import Iterator

import pytest

from tests.laws.worlds import restart_world, stop_all


@pytest.fixture(autouse=True, scope="session")
def _worlds() -> Iterator[None]:
    yield
    stop_all()


@pytest.fixture(scope="module")
def worlds_of_its_own() -> Iterator[None]:
    """For engines of others, which leave things in a process: ZeRO 3 its `linear`, a pipeline its idea of the ranks."""
    yield
    for size in (1, 2, 3, 4):
        restart_world(size)
