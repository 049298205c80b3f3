"""The law's worlds are shared by the session and stopped at its end."""

from collections.abc import Iterator

import pytest

from tests.laws.worlds import restart_world, stop_all


@pytest.fixture(autouse=True, scope="session")
def _worlds() -> Iterator[None]:
    yield
    stop_all()


@pytest.fixture(scope="module")
def restart_worlds_afterwards() -> Iterator[None]:
    """Restart the worlds after the module.

    Third-party engines change global state of a process: ZeRO 3 replaces `linear`, the pipeline engine stores its own
    topology.
    """
    yield
    for size in (1, 2, 3, 4):
        restart_world(size)
