"""Fixtures of all chaos tests."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    """Collect garbage after each test: an open socket fails the test that left it, no later one."""
    yield
    gc.collect()
