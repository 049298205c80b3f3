"""How the tests are dealt out where pytest-xdist runs several at once, as `make test` does."""

from pathlib import PurePath
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# These have the machine's network to themselves, or its only Slurm, and wait most of the time: they begin first.
WAITING = ("chaos", "netns", "slurm")
NETWORK = ("chaos", "netns")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in WAITING)


class ByFile(LoadScopeScheduling):
    """A file's tests run one after another in one process; those that make networks, too."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return "network" if PurePath(path).parent.name in NETWORK else path


@pytest.hookimpl(optionalhook=True)  # without xdist there is nothing to deal out
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)
