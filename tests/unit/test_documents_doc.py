"""docs/documents.md lists the lines of the original documents, and its claims hold."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

import config
import main
from utils.settings.names import OLD_NAMES

ROOT = Path(__file__).parents[2]
STATES = {"done", "partly", "decided", "later"}


class Row(NamedTuple):
    """One line of a document, with its state here."""

    title: str
    line: str
    state: str
    here: str


def _rows() -> list[Row]:
    page = (ROOT / "docs" / "documents.md").read_text(encoding="utf-8")
    rows = []
    for section in page.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        for line in re.findall(r"^\|(.*)\|$", body, flags=re.M)[2:]:
            quoted, state, here = (cell.strip() for cell in re.split(r"(?<!\\)\|", line))
            rows.append(Row(title, quoted.replace("`", ""), state, here))
    return rows


def _required() -> list[tuple[str, str]]:
    title, found = "", []
    for line in (ROOT / "tests" / "unit" / "documents.txt").read_text("utf-8").splitlines():
        if heading := re.fullmatch(r"\[(.+)\]", line):
            title = heading[1]
        elif line and not line.startswith("# "):
            found.append((title, line))
    return found


ROWS = _rows()
NAMED = [(row, name) for row in ROWS for name in re.findall("`([^`]+)`", row.here)]
COMMANDS = sorted({name for _, name in NAMED if name.startswith("main.py ")})
SETTINGS = sorted({name for _, name in NAMED if re.fullmatch("[A-Z][A-Z0-9_]+[A-Z0-9]", name)})
FILES = sorted(
    {
        name.split()[0]
        for _, name in NAMED
        if re.match(r"[a-z.]+/|.*\.(?:py|txt|toml|ini|md)$", name)
    }
)


@pytest.mark.parametrize(("title", "line"), _required())
def test_a_line_of_a_document_is_listed(title: str, line: str) -> None:
    assert any(row.title == title and line in row.line for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.line[:40])
def test_a_row_has_a_state_and_its_evidence(row: Row) -> None:
    assert row.state in STATES
    if row.state == "done":
        assert "`" in row.here, "a done line names a command, a setting or a file"
    if row.state == "decided":
        assert "](decisions.md#" in row.here, "a decided line links its decision"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_named_runs(command: str) -> None:
    ran = CliRunner().invoke(main.app, [command.split()[1], "--help"])
    assert ran.exit_code == 0, ran.output


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_is_named_exists(name: str) -> None:
    assert name in config.setting_names() or name in {"LICENSE"}


@pytest.mark.parametrize("path", FILES)
def test_a_file_that_is_named_exists(path: str) -> None:
    assert (ROOT / path.split()[0]).exists()


@pytest.mark.parametrize("name", ["build", "run", "health-check"])
def test_a_script_that_is_named_prints_its_help(name: str) -> None:
    command = [str(ROOT / "scripts" / name), "--help"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and f"scripts/{name}" in ran.stdout


@pytest.mark.parametrize("name", ["DEFAULT_BASE_MODEL"])
def test_an_older_name_points_to_its_successor(name: str) -> None:
    (row,) = [row for row in ROWS if row.line == name]
    assert all(f"`{successor}`" in row.here for successor in OLD_NAMES[name].now)
