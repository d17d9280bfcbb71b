"""The trainer's environment and confinement: hidden secrets, and everything that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from utils.confined import Confinement
from utils.settings.surroundings import ROOT, confinement, trainer_environment

SECRET = "a-long-secret"


@pytest.fixture(autouse=True, name="home")
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def made(ours: Mapping[str, str], **how: Any) -> dict[str, str]:
    """The trainer's environment."""
    settings: dict[str, Any] = {
        "own": {"WORK_DIR"},
        "secrets": (SECRET, "guest"),
        "hf_token": None,
        "hf_home": None,
        "cuda_visible_devices": None,
        "threads": None,
    }
    return trainer_environment(ours, **(settings | how))


def confined(ours: Mapping[str, str], *files: Path, **how: Any) -> Confinement:
    """The trainer's confinement."""
    named: dict[str, Any] = {"own": {"BASE_MODEL_KEY"}, "writable": (), "caches": {}}
    return confinement(ours, files=files, **(named | how))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WORK_DIR", "/work"),
        ("MY_API_KEY", "x"),
        ("redis_auth", "x"),
        ("SOME_DSN", "x"),
        ("COPY", f"Bearer {SECRET}"),
        ("DATABASE_URL", "postgres://app:word@db:5432/app"),
    ],
)
def test_a_variable_that_may_hold_a_secret_stays_here(name: str, value: str) -> None:
    assert name not in made({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", "/usr/bin"),
        ("GREETING", "guest of the house"),
        ("HF_ENDPOINT", "https://mirror.example:8443"),
        ("HTTPS_PROXY", "http://user:word@proxy:3128"),
    ],
)
def test_a_variable_that_training_needs_is_passed_on(name: str, value: str) -> None:
    assert made({name: value})[name] == value


def test_the_number_of_threads_is_the_setting_s_or_that_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("utils.settings.surroundings.training_threads", lambda: 7)
    assert made({})["OMP_NUM_THREADS"] == "7"
    assert made({}, threads="2")["OMP_NUM_THREADS"] == "2"
    assert made({})["OMP_WAIT_POLICY"] == "PASSIVE"
    assert made({"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"


def test_files_with_keys_are_hidden_whether_they_exist_or_not(home: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("x")
    ours = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        "KUBECONFIG": "/etc/kube.yaml",
        "MONKEY_HOME": "/usr",  # a folder, independent of its name
        "BASE_MODEL_KEY": str(token.parent),
        "SOME_KEY": "relative/path",
    }
    hidden = confined(ours, Path("/app/.env")).hidden
    for path in ("/app/.env", str(token), "/etc/kube.yaml", f"{home}/.aws", "/run/secrets"):
        assert path in hidden
    assert "/usr" not in hidden and str(token.parent) not in hidden
    assert all(path.startswith("/") for path in hidden)


def test_code_and_home_are_read_only_and_the_places_to_work_in_are_made_and_writable(
    home: Path, tmp_path: Path
) -> None:
    work, cache = tmp_path / "work", tmp_path / "hub"
    made_of = confined({}, writable=(work,), caches={"HF_HOME": str(cache)})
    assert {str(ROOT), str(home)} <= set(made_of.read_only)
    for place in (work, cache, home / ".cache"):
        assert place.is_dir() and str(place) in made_of.writable


def test_a_home_folder_that_is_the_whole_disk_is_not_made_read_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/")
    assert "/" not in confined({}).read_only


@pytest.mark.parametrize(
    ("variables", "ports"),
    [
        ({}, {53, 443}),
        ({"HF_ENDPOINT": "http://mirror.example"}, {53, 80, 443}),
        ({"https_proxy": "http://proxy:3128", "ALL_PROXY": "proxy:1080"}, {53, 443, 1080, 3128}),
        ({"HF_ENDPOINT": "http://mirror:port"}, {53, 443}),
    ],
)
def test_only_the_hub_can_be_connected_to(variables: dict[str, str], ports: set[int]) -> None:
    assert set(confined({}, caches=variables).ports) == ports
