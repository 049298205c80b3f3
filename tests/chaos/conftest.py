"""The corpus of the end-to-end tests."""

from tests.e2e.conftest import corpus

__all__ = ["corpus"]
