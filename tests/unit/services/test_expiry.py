"""The expiry of a lease: by S3's dates or by the reader's own monotonic clock."""

from __future__ import annotations

import dataclasses

import pytest

from jobs.hold import HeldRecord, Hold
from services.records.record_object import DATE_SLACK_SECONDS, Expiry, Version

HELD = HeldRecord(hold=Hold(owner="one", claim=1, lease_seconds=10.0))


def seen(etag: str, *, age: float, at: float, record: HeldRecord = HELD) -> Version[HeldRecord]:
    """A read that took a second of this process's clock."""
    return Version(record=record, etag=etag, age_seconds=age, asked_at=at - 1.0, seen_at=at)


def test_a_record_seen_for_the_first_time_is_judged_by_s3s_dates() -> None:
    assert Expiry().wait_seconds("k", seen("a", age=10.0, at=0.0)) == DATE_SLACK_SECONDS
    assert Expiry().wait_seconds("k", seen("a", age=10.0 + DATE_SLACK_SECONDS, at=0.0)) == 0.0


def test_the_wait_is_no_longer_than_a_lease_whichever_dates_s3_reports() -> None:
    assert Expiry().wait_seconds("k", seen("a", age=-5000.0, at=0.0)) == 10.0


def test_an_etag_unchanged_for_a_lease_is_enough_against_the_dates() -> None:
    expiry = Expiry()
    assert expiry.wait_seconds("k", seen("a", age=-5000.0, at=100.0)) == 10.0
    assert expiry.wait_seconds("k", seen("a", age=-5000.0, at=110.5)) == pytest.approx(0.5)
    assert expiry.wait_seconds("k", seen("a", age=-5000.0, at=111.0)) == 0.0


def test_a_renewal_restarts_the_lease() -> None:
    expiry = Expiry()
    expiry.wait_seconds("k", seen("a", age=0.0, at=100.0))
    assert expiry.wait_seconds("k", seen("b", age=0.0, at=120.0)) == 10.0
    assert expiry.wait_seconds("k", seen("b", age=0.0, at=126.0)) == pytest.approx(5.0)


def test_each_record_has_its_own_clock() -> None:
    expiry = Expiry()
    expiry.wait_seconds("k", seen("a", age=0.0, at=100.0))
    assert expiry.wait_seconds("other", seen("a", age=0.0, at=120.0)) == 10.0


def test_a_released_record_may_be_taken_at_once() -> None:
    free = dataclasses.replace(HELD, hold=HELD.hold.dropped(quiet_seconds=600.0))
    assert Expiry().wait_seconds("k", seen("a", age=0.0, at=0.0, record=free)) == 0.0
