"""A test's environment, and the settings that are read from it."""

from __future__ import annotations

import pytest

from config import Settings, load, setting_names
from utils.errors import ConfigurationError

TOKEN = "a-token-that-is-long-enough-for-the-rule"
REQUIRED = {
    "AWS_STORAGE_BUCKET_NAME": "stylelicense-media",
    "BACKEND_API_URL": "https://api.stylelicense.com",
    "INTERNAL_API_TOKEN": TOKEN,
}
NAMES = setting_names()
DOCUMENTED = setting_names(every_spelling=False)


def settings(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Settings:
    """The worker's settings in an environment of the required ones and `environment`."""
    for name, value in (REQUIRED | environment).items():
        monkeypatch.setenv(name, value)
    loaded = load()
    assert isinstance(loaded, Settings)
    return loaded


def problems(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """The error message about `environment`."""
    with pytest.raises(ConfigurationError) as caught:
        settings(monkeypatch, **environment)
    return str(caught.value)
