"""Fixtures of the law tests: stop the worlds at the end of the session, and restart them after some modules."""

from collections.abc import Iterator

import pytest

from tests.laws.worlds import restart_world, stop_all


@pytest.fixture(autouse=True, scope="session")
def _worlds() -> Iterator[None]:
    """Stop all worlds at the end of the session."""
    yield
    stop_all()


@pytest.fixture(scope="module")
def restart_worlds_afterwards() -> Iterator[None]:
    """Restart the worlds after the module.

    Third-party engines change the global state of a process. ZeRO 3 replaces F.linear, and the pipeline engine stores
    its topology.
    """
    yield
    for size in (1, 2, 3, 4):
        restart_world(size)
