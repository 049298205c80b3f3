"""The laws run in worlds that are shared by the whole session and stopped at its end."""

from collections.abc import Iterator

import pytest

from tests.laws.worlds import stop_all


@pytest.fixture(autouse=True, scope="session")
def _worlds() -> Iterator[None]:
    yield
    stop_all()
