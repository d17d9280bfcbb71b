"""The doctor's conclusions: clocks, and the end of checks that hang or break."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

import pytest

import config
from cli.doctor.command import examine, is_healthy
from cli.doctor.findings import Finding, Verdict, clock, ok
from config import Settings
from utils.errors import StorageError

NOON = datetime(2026, 1, 20, 12, tzinfo=UTC)

SETTINGS = config.load(
    _env_file=None,
    backend_api_url="https://backend.example",
    internal_api_token="t" * 32,
    aws_storage_bucket_name="media",
)


def _seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


@pytest.mark.parametrize(
    ("theirs", "verdict", "says"),
    [
        (NOON, Verdict.OK, "within 1 s"),
        # A `Date` has whole seconds, and the answer took two: no certain difference.
        (NOON - _seconds(1), Verdict.OK, "within 1 s"),
        (NOON + _seconds(2), Verdict.OK, "within 1 s"),
        (NOON - _seconds(32), Verdict.WARN, "31 s ahead of"),
        (NOON + _seconds(40), Verdict.WARN, "38 s behind"),
        (NOON - _seconds(302), Verdict.FAIL, "301 s ahead of"),
        (NOON + _seconds(400), Verdict.FAIL, "398 s behind"),
    ],
)
def test_a_clock_is_judged_by_the_difference_that_is_certain(
    theirs: datetime, verdict: Verdict, says: str
) -> None:
    found = clock("S3", theirs, asked=NOON, answered=NOON + _seconds(2))
    assert found.verdict is verdict
    assert says in found.detail
    assert ("NTP" in found.remedy) is (verdict is not Verdict.OK)


def test_a_check_that_hangs_or_breaks_hides_none_of_the_others() -> None:
    never = threading.Event()

    def hangs(_: Settings) -> list[Finding]:
        never.wait(30)
        return []

    def breaks(_: Settings) -> list[Finding]:
        raise ZeroDivisionError("oh")

    def refuses(_: Settings) -> list[Finding]:
        raise StorageError("S3 is gone")

    def is_well(_: Settings) -> list[Finding]:
        return [ok("four", "well")]

    findings = examine(
        SETTINGS,
        (("one", hangs, 0.2), ("two", breaks, 5), ("three", refuses, 5), ("four", is_well, 5)),
    )
    never.set()
    found = {each.check: each for each in findings}
    assert list(found) == ["settings", "one", "two", "three", "four"]
    assert "did not end" in found["one"].detail
    assert "ZeroDivisionError" in found["two"].detail
    assert found["three"].detail == "S3 is gone"
    assert found["four"].verdict is Verdict.OK
    assert not is_healthy(findings)


def test_hanging_checks_are_waited_for_at_the_same_time() -> None:
    never = threading.Event()

    def hangs(_: Settings) -> list[Finding]:
        never.wait(30)
        return []

    began = datetime.now(UTC)
    examine(SETTINGS, tuple((str(number), hangs, 0.4) for number in range(5)))
    never.set()
    assert (datetime.now(UTC) - began).total_seconds() < 1.5
