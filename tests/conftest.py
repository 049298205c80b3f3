"""Skip tests that the installed torch cannot run, and restore the default signal handlers."""

import signal
from importlib.metadata import version

import pytest
from hypothesis import settings

from dist_llm.config.derive import SPLIT_BACKWARD, splits_backward

# In a background job of a shell, or under nohup, these signals are ignored, also in child processes.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Tests share their cores, so examples of hypothesis have no time limit.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    torch = version("torch")
    if not splits_backward(torch):
        for item in items:
            if any(schedule in item.name for schedule in SPLIT_BACKWARD):
                item.add_marker(pytest.mark.skip(reason=f"torch {torch} cannot split backward"))
