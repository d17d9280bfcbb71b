"""What every test of this folder has."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    """Let a test fail for what it leaves open, not a later test that happens to collect it."""
    yield
    gc.collect()
