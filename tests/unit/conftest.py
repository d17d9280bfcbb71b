"""Fixtures of the tests of settings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.environment import NAMES
from utils.settings.names import OLD_NAMES


@pytest.fixture(name="own_settings")
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the environment and the `.env` of the user who runs the tests."""
    monkeypatch.chdir(tmp_path)
    for name in tuple(os.environ):
        if name.upper() in NAMES | OLD_NAMES.keys():
            monkeypatch.delenv(name)
