"""What the torch that is installed cannot do is skipped there, and says why. Signals are as in a terminal."""

import signal
from importlib.metadata import version

import pytest
from hypothesis import settings

from dist_llm.config.derive import SPLIT_BACKWARD, splits_backward

# Started in the background or by nohup, tests would hand on to the runs they start that these are ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Tests share their cores: how long an example takes says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    torch = version("torch")
    if not splits_backward(torch):
        for item in items:
            if any(schedule in item.name for schedule in SPLIT_BACKWARD):
                item.add_marker(pytest.mark.skip(reason=f"torch {torch} cannot split backward"))
