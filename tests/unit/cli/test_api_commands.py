"""`main.py api`: help texts, and a machine without the API's packages."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

import main
from cli.program import EXIT_SETTINGS

COMMANDS = (
    *(["api"], ["api", "migrate"], ["api", "reconcile"], ["api", "keys", "list"]),
    *(["api", "keys", "create"], ["api", "keys", "revoke"]),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_explains_itself_and_all_its_options(command: list[str]) -> None:
    shown = CliRunner().invoke(main.app, [*command, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    options = [line for line in shown.output.splitlines() if "--" in line and "Usage" not in line]
    assert options
    assert all(len(line.strip("│ ").split("  ")[-1].strip()) > 5 for line in options)


@pytest.mark.parametrize("command", [["api", "migrate"], ["api", "reconcile"]])
def test_an_installation_without_the_api_says_what_to_install(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "api.app", None)
    monkeypatch.setitem(sys.modules, "api.store.database", None)
    ran = CliRunner().invoke(main.app, command)
    assert ran.exit_code == EXIT_SETTINGS
    assert "requirements-api.txt" in ran.output
