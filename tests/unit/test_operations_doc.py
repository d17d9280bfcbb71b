"""docs/operations.md agrees with the source: log lines, exit codes, commands, rights."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

import config
import main
from cli.doctor.broker_limits import advice
from cli.doctor.storage_rights import Right, uses
from utils.errors import ErrorCode
from utils.settings.groups import BrokerSettings, JobLimits
from utils.settings.names import OLD_NAMES
from utils.settings.storage import StorageSettings

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
ROOMS = ("cli", "consumer", "images", "jobs", "reports", "services", "training", "utils")

QUIET = {"debug", "info"}
# `level(...)`: the level of the line depends on the event.
LOUD = {"warning", "error", "exception", "critical", "level"}


def _logged() -> dict[str, set[str]]:
    """Every event that the source logs, with the methods that log it."""
    found: dict[str, set[str]] = defaultdict(set)
    paths = [ROOT / "main.py", *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(attr=method) | ast.Name(id=method),
                    args=[ast.Constant(value=str() as event), *_],
                ) if (
                    method in QUIET | LOUD
                ):
                    found[event].add(method)
    return found


def _table_cells(heading: str, column: int = 0) -> list[str]:
    """The cells of a column in all tables whose first column has this heading."""
    cells = []
    inside = False
    for line in DOCUMENT.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        inside = line.startswith("|") and (inside or row[0] == heading)
        if inside and row[0] != heading and not row[0].startswith("---"):
            cells.append(row[column])
    return cells


def _documented() -> set[str]:
    return {event for cell in _table_cells("log line") for event in re.findall("`(.+?)`", cell)}


def test_every_log_line_in_the_tables_is_one_that_the_source_writes() -> None:
    assert len(_documented()) > 50
    assert _documented() <= set(_logged())


def test_every_warning_and_every_error_of_the_source_is_explained() -> None:
    loud = {event for event, methods in _logged().items() if methods & LOUD}
    assert len(loud) > 40
    assert loud <= _documented()


def test_no_log_line_is_explained_twice() -> None:
    explained = [
        event for cell in _table_cells("log line") for event in re.findall("`(.+?)`", cell)
    ]
    assert sorted(explained) == sorted(set(explained))


def test_the_exit_codes_are_the_programs() -> None:
    documented = {int(code) for cell in _table_cells("code") for code in cell.split(", ")}
    for code in (main.EXIT_FAILED, main.EXIT_SETTINGS, main.EXIT_BROKER, main.EXIT_MACHINE):
        assert code in documented


@pytest.mark.parametrize(
    ("version", "queue_type"), [("4.0.0", "quorum"), ("4.2.0", "quorum"), ("3.12.0", "classic")]
)
def test_the_policies_are_those_that_the_doctor_prints(version: str, queue_type: str) -> None:
    command = advice(
        BrokerSettings(), JobLimits().max_job_seconds, "RabbitMQ", version, queue_type
    ).command
    assert command in DOCUMENT


def test_the_rights_on_s3_are_those_that_the_doctor_tests() -> None:
    settings = StorageSettings(
        aws_storage_bucket_name="media", model_bucket_name="models", state_bucket_name="state"
    )
    rows = dict(zip(_table_cells("place"), _table_cells("place", 1), strict=True))
    names = {"models": "MODEL_BUCKET_NAME", "state": "STATE_BUCKET_NAME"}
    for use in uses(settings):
        if use.prefix:
            row = rows[f"`{use.prefix}` in `{names[use.bucket]}`"].partition(";")[0]
            assert set(re.findall("`(.+?)`", row)) == {right.value for right in use.rights}
    assert f"`{Right.READ}`" in rows["the buckets of `IMAGE_BUCKETS`"]


def test_the_settings_that_are_named_exist() -> None:
    named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)(?:=.*?)?`", DOCUMENT))
    assert named - set(ErrorCode) - OLD_NAMES.keys() <= config.setting_names()
