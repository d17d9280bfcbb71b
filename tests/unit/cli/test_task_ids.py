"""Ids as users type them: whole or abbreviated, and never another job's by accident."""

from __future__ import annotations

import sys
from typing import cast

import pytest
import typer

from cli.jobs.task_ids import confirm, is_clear, resolve
from jobs.layout import record_at
from services.s3.s3_service import S3Service
from tests.memory_s3 import MemoryS3
from utils.errors import ConfigurationError

BUCKET = "state"
UUID = "550e8400-e29b-41d4-a716-446655440000"
REFUSED = "invalid/" + "ab12" * 16


@pytest.fixture(name="s3")
def _s3() -> S3Service:
    memory = MemoryS3()
    for task_id in (UUID, "order-1", "order-10", REFUSED):
        memory.write(record_at(BUCKET, task_id), b"{}")
    return cast(S3Service, memory)


@pytest.mark.parametrize(
    ("given", "task_id"),
    [
        (UUID, UUID),
        (UUID[:8], UUID),
        (UUID[:4], UUID),
        ("order-1", "order-1"),  # although another id begins with it
        ("order-10", "order-10"),
        ("ab12ab12", REFUSED),
        ("invalid/ab12", REFUSED),
        ("dead-le", "dead-letter"),
        ("not-seen-yet", "not-seen-yet"),
        ("550", "550"),  # too short to mean another
    ],
)
def test_an_id_or_its_beginning_names_the_job(s3: S3Service, given: str, task_id: str) -> None:
    assert resolve(s3, BUCKET, given, others={"dead-letter"}) == task_id


def test_the_beginning_of_several_ids_is_refused_with_their_names(s3: S3Service) -> None:
    with pytest.raises(ConfigurationError, match="beginning of 2 ids.*order-1, order-10"):
        resolve(s3, BUCKET, "order")


@pytest.mark.parametrize("given", ["", "../x", "a b", "jobs/x", "x" * 129])
def test_text_that_cannot_be_an_id_is_refused(s3: S3Service, given: str) -> None:
    with pytest.raises(ConfigurationError, match="not a task id"):
        resolve(s3, BUCKET, given)


@pytest.mark.parametrize(
    ("given", "task_id", "clear"),
    [
        (UUID, UUID, True),
        (UUID[:8], UUID, True),
        ("ab12ab12", REFUSED, True),
        ("order-10", "order-10", True),
        ("order-1", "order-10", False),  # may be a job that no worker has seen yet
    ],
)
def test_an_unknown_text_may_be_the_full_id_of_another_job(
    given: str, task_id: str, clear: bool
) -> None:
    assert is_clear(given, task_id) is clear


def test_without_a_terminal_to_confirm_on_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    with pytest.raises(ConfigurationError, match="Cancel it.*--yes"):
        confirm("Cancel it?", yes=False)
    confirm("Cancel it?", yes=True)


@pytest.mark.parametrize("answer", [True, False])
def test_on_a_terminal_the_user_confirms(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(typer, "confirm", lambda question, err: answer)
    if answer:
        confirm("Cancel it?", yes=False)
    else:
        with pytest.raises(typer.Exit):
            confirm("Cancel it?", yes=False)
