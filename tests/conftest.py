"""How the tests are dealt out where pytest-xdist runs several at once, as `make test` does."""

import pytest

# These have the machine's network to themselves, or its only Slurm, and wait most of the time: they begin first.
WAITING = ("chaos", "netns", "slurm")
NETWORK = ("chaos", "netns")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.parent.name
        group = "network" if folder in NETWORK else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.path.parent.name not in WAITING)
