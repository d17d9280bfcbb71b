"""A lease, fast: on a record in memory, with a clock that the test moves."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from jobs.addresses import S3Location
from jobs.hold import HeldRecord, Hold
from services.records import lease as lease_module
from services.records.lease import RENEWALS_PER_LEASE, SAFE_PART, Lease
from utils.errors import LeaseLost, MachineError, PreconditionFailed, StorageError

LEASE = 100.0


class Clock:
    """Stands in for `time` in the lease's module."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Target:
    """Stands in for `RecordObject`: accepts writes, after an act of the test."""

    location = S3Location("state", "jobs/task-1.json")

    def __init__(self) -> None:
        self.written: list[HeldRecord] = []
        self.before: Callable[[], None] = lambda: None

    def write(self, record: HeldRecord, etag: str | None) -> str:
        assert etag == str(len(self.written)), "each write is made over the version before it"
        self.before()
        self.written.append(record)
        return str(len(self.written))


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module, "time", clock)
    return clock


@pytest.fixture(name="target")
def _target() -> Target:
    return Target()


def make(target: Target, clock: Clock, lease_seconds: float = LEASE) -> Lease[HeldRecord]:
    """A lease that was claimed this moment."""
    hold = Hold(owner="one", claim=3, lease_seconds=lease_seconds)
    return Lease(cast(Any, target), HeldRecord(hold=hold), "0", clock.now)


def change(record: HeldRecord) -> HeldRecord:
    """A recognisable change of the record."""
    return dataclasses.replace(record, unknown={"changes": len(record.unknown) + 1})


def failing(times: int, error: Exception, passes: Callable[[], None]) -> Callable[[], None]:
    """Writes that fail this often, each after some time."""
    left = [times]

    def fail() -> None:
        passes()
        if left[0] > 0:
            left[0] -= 1
            raise error

    return fail


def test_a_change_is_written_with_a_new_stamp_and_restarts_the_lease(
    target: Target, clock: Clock
) -> None:
    lease = make(target, clock)
    assert lease.claim_number == 3
    clock.now += 50
    assert lease.remaining == pytest.approx(LEASE * SAFE_PART - 50)
    assert lease.update(change) is lease.record
    assert lease.record.unknown == {"changes": 1}
    assert lease.record.hold.revision == 1 and lease.record.hold.nonce
    assert lease.remaining == pytest.approx(LEASE * SAFE_PART)
    lease.renew()
    assert [record.hold.revision for record in target.written] == [1, 2]
    assert target.written[0].hold.nonce != target.written[1].hold.nonce


def test_a_change_that_changes_nothing_writes_nothing(target: Target, clock: Clock) -> None:
    assert make(target, clock).update(lambda record: record).hold.revision == 0
    assert not target.written


@pytest.mark.parametrize("error", [StorageError("S3 is away"), MachineError("no sockets")])
def test_a_write_is_tried_until_s3_takes_it(target: Target, clock: Clock, error: Exception) -> None:
    lease = make(target, clock, lease_seconds=0.4)
    target.before = failing(3, error, lambda: None)
    lease.update(change)
    assert len(target.written) == 1
    assert not lease.lost.is_set()


def test_the_lease_began_with_the_first_try_whose_answer_may_have_been_lost(
    target: Target, clock: Clock
) -> None:
    lease = make(target, clock)

    def passes() -> None:
        clock.now += 30

    lease.lost.wait = lambda seconds: False  # type: ignore[assignment,method-assign,misc]
    target.before = failing(2, StorageError("no answer"), passes)
    lease.update(change)
    assert lease.remaining == pytest.approx(LEASE * SAFE_PART - 90)


def test_a_conflict_with_another_workers_write_loses_the_lease_at_once(
    target: Target, clock: Clock
) -> None:
    lease = make(target, clock)
    target.before = failing(1, PreconditionFailed("changed by another process"), lambda: None)
    with pytest.raises(LeaseLost, match="changed by another process"):
        lease.update(change)
    assert lease.lost.is_set()
    with pytest.raises(LeaseLost, match="Another worker has changed"):
        lease.update(change)
    assert not target.written


def test_a_lease_that_was_not_renewed_in_time_writes_nothing_more(
    target: Target, clock: Clock
) -> None:
    lease = make(target, clock)
    clock.now += LEASE * SAFE_PART - 1
    lease.check()
    clock.now += 1
    with pytest.raises(LeaseLost, match="could not be renewed in time"):
        lease.update(change)
    assert lease.lost.is_set()
    assert not target.written


def test_retries_end_with_the_lease(target: Target, clock: Clock) -> None:
    lease = make(target, clock)

    def passes() -> None:
        clock.now += 40

    lease.lost.wait = lambda seconds: False  # type: ignore[assignment,method-assign,misc]
    target.before = failing(99, StorageError("S3 is away"), passes)
    with pytest.raises(LeaseLost, match="could not be renewed in time"):
        lease.update(change)
    assert clock.now == 1000 + 3 * 40
    assert lease.lost.is_set()


def test_retries_end_with_the_callers_time(target: Target, clock: Clock) -> None:
    lease = make(target, clock)

    def passes() -> None:
        clock.now += 2

    waits: list[float] = []
    lease.lost.wait = waits.append  # type: ignore[assignment,method-assign]
    target.before = failing(99, StorageError("S3 is away"), passes)
    with pytest.raises(LeaseLost, match="in the time that was left|is lost"):
        lease.update(change, within=5.0)
    assert clock.now == 1000 + 3 * 2
    assert waits == [2.0, 1.0, 0.0]
    assert lease.lost.is_set(), "whether the write took place is unknown"


def test_an_earlier_write_is_waited_for_no_longer_than_the_callers_time(
    target: Target, clock: Clock
) -> None:
    lease = make(target, clock)
    hanging, go = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        assert go.wait(10)

    target.before = hang
    first = threading.Thread(target=lambda: lease.update(change))
    first.start()
    assert hanging.wait(10)
    clock.now += 1
    try:
        with pytest.raises(LeaseLost):
            lease.update(change, within=0.0)
        assert lease.lost.is_set()
    finally:
        go.set()
        first.join()


def test_a_lease_that_has_run_out_waits_for_no_earlier_write(target: Target, clock: Clock) -> None:
    lease = make(target, clock)
    clock.now += LEASE
    began = time.monotonic()
    with lease._writing, pytest.raises(LeaseLost):  # pylint: disable=protected-access
        lease.update(change)
    assert time.monotonic() - began < 0.9


def test_a_closed_lease_has_no_write_under_way_any_more() -> None:
    target, begun = Target(), threading.Event()

    def slow() -> None:
        begun.set()
        time.sleep(0.3)

    target.before = slow
    hold = Hold(owner="one", claim=1, lease_seconds=2.0)
    with Lease(cast(Any, target), HeldRecord(hold=hold), "0", time.monotonic()):
        assert begun.wait(10)
    assert len(target.written) == 1


def test_the_clock_of_a_lease_goes_on_after_a_renewal() -> None:
    """The time at which it would have run out passes, and it is renewed: it is watched on."""
    target, go = Target(), threading.Event()

    def hang() -> None:
        if len(target.written) > RENEWALS_PER_LEASE + 1:
            go.wait(10)

    target.before = hang
    hold = Hold(owner="one", claim=1, lease_seconds=0.4)
    try:
        with Lease(cast(Any, target), HeldRecord(hold=hold), "0", time.monotonic()) as lease:
            assert lease.lost.wait(10)
            assert len(target.written) > RENEWALS_PER_LEASE + 1
    finally:
        go.set()


def test_a_record_that_was_given_back_is_not_written_again(target: Target, clock: Clock) -> None:
    lease = make(target, clock)
    lease.update(lambda record: dataclasses.replace(record, hold=record.hold.dropped()))
    with pytest.raises(LeaseLost, match="given back"):
        lease.update(change)
    assert not lease.lost.is_set(), "nobody took it"
    assert len(target.written) == 1


def test_a_write_that_fails_while_the_lease_is_closed_is_not_tried_again(
    target: Target, clock: Clock
) -> None:
    lease = make(target, clock)
    lease.close()
    target.before = failing(1, StorageError("S3 is away"), lambda: None)
    with pytest.raises(LeaseLost, match="closed before S3"):
        lease.update(change)


def test_inside_its_block_a_lease_is_renewed_several_times_per_lease() -> None:
    target, clock = Target(), time
    hold = Hold(owner="one", claim=1, lease_seconds=0.4)
    renewed = threading.Semaphore(0)

    class Told(Lease[HeldRecord]):
        """Notes each renewal."""

        def after_renewal(self) -> None:
            renewed.release()

    began = clock.monotonic()
    with Told(cast(Any, target), HeldRecord(hold=hold), "0", began) as lease:
        for _ in range(6):
            assert renewed.acquire(timeout=10)  # pylint: disable=consider-using-with
        assert clock.monotonic() - began >= 5 * 0.4 / RENEWALS_PER_LEASE
        lease.check()
    count = len(target.written)
    assert count >= 6
    assert not renewed.acquire(timeout=0.3)  # pylint: disable=consider-using-with
    assert len(target.written) == count


def test_a_renewal_that_hangs_is_noticed_by_the_clock() -> None:
    target, go = Target(), threading.Event()
    target.before = lambda: cast(None, go.wait(10))
    hold = Hold(owner="one", claim=1, lease_seconds=0.3)
    began = time.monotonic()
    try:
        with Lease(cast(Any, target), HeldRecord(hold=hold), "0", began) as lease:
            assert lease.lost.wait(5)
            assert time.monotonic() - began >= 0.3 * SAFE_PART
    finally:
        go.set()


def test_a_renewal_that_finds_another_holder_loses_the_lease() -> None:
    target = Target()
    target.before = failing(1, PreconditionFailed("changed"), lambda: None)
    hold = Hold(owner="one", claim=1, lease_seconds=1.0)
    began = time.monotonic()
    with Lease(cast(Any, target), HeldRecord(hold=hold), "0", began) as lease:
        assert lease.lost.wait(0.6)
