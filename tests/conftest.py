"""Settings of all tests: signal handlers, hypothesis, and tests that are skipped with an older torch.

Fixtures are in the conftest.py of each folder. Helpers that several folders import:

    tests/e2e/commands.py   run `dist-llm` as processes, read the metrics and checkpoints of a run
    tests/e2e/faults.py     train with a fault in one step of one rank
    tests/laws/law.py       take training steps on any layout, compare them with those of one process
    tests/laws/worlds.py    call a function on all ranks of a gloo process group
    tests/laws/layouts.py   models, layouts and optimizers to test
    tests/cli_runner.py     run a subcommand in the process of the test
    tests/hf_folders.py     tokenizers in Hugging Face folders
"""

import signal
from importlib.metadata import version

import pytest
from hypothesis import settings

from dist_llm.config.derive import SPLIT_BACKWARD, can_split_backward

# In a background job of a shell, or under nohup, these signals are ignored, also in child processes.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Tests share their cores, so examples of hypothesis have no time limit.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """If torch cannot split the backward pass, skip the tests of schedules that do. Their ids name the schedule."""
    torch_version = version("torch")
    if not can_split_backward(torch_version):
        for item in items:
            if any(schedule in item.name for schedule in SPLIT_BACKWARD):
                item.add_marker(pytest.mark.skip(reason=f"torch {torch_version} cannot split backward"))
