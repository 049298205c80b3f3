"""Bugs to plant: each must make the law fail."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def planted(name: str) -> Iterator[None]:
    raise KeyError(name)
    yield
