"""Compares the whole database with S3, after it was restored from a backup.

Nothing is cancelled: a job without a record has not been claimed, and waits again.
"""

from __future__ import annotations

import dataclasses

from sqlalchemy import func, select

from api.life import ledger, news
from api.services import Services
from api.store import jobs as store
from api.store.database import Writing, now
from api.store.tables import ENDED, OPEN, CounterRow, JobRow
from jobs.record import JobRecord
from services.records.listing import RecordListing
from utils.logger import get_logger

log = get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Reconciled:
    """The result.

    Attributes:
        restored: Jobs that the database did not know.
        changed: Jobs whose status was not that of their record.
        looked_at: Jobs and records in all.
    """

    restored: int
    changed: int
    looked_at: int


def reconcile(services: Services) -> Reconciled:
    """Give every job the state of its record, and restore jobs that the database lost.

    Raises:
        StorageError: S3 cannot be used. The command can be repeated.
    """
    records = set(RecordListing(services.state_s3, services.buckets.state).ids)
    records = {each for each in records if "/" not in each}
    on_s3 = records | set(ledger.kept_orders(services))
    with services.database.reading() as session:
        known = {row[0]: row[1] for row in session.execute(select(JobRow.id, JobRow.status))}
    restored = changed = 0
    for job_id in sorted(on_s3 - set(known)):
        if news.adopt(services, job_id):
            restored += 1
            _follow_wishes(services, job_id)
    for job_id, status in known.items():
        changed += _compare(services, job_id, status)
    _raise_counters(services)
    return Reconciled(restored, changed, len(on_s3 | set(known)))


def _compare(services: Services, job_id: str, status: str) -> bool:
    """Give a known job the state of its record. Returns whether it has changed."""
    record = ledger.record_of(services, job_id)
    if record is not None:
        if _is_behind(services, job_id, record, status):
            news.follow_record(services, job_id, record)
    elif status not in OPEN:
        return False
    else:
        _wait_again(services, job_id)
    if status in OPEN:
        _follow_wishes(services, job_id)
    with services.database.reading() as session:
        return session.scalar(select(JobRow.status).where(JobRow.id == job_id)) != status


def _is_behind(services: Services, job_id: str, record: JobRecord, status: str) -> bool:
    ending = ledger.ending_of(record)
    if ending is None:
        return status in OPEN
    sequence = ending[1].get("sequence")
    with services.database.reading() as session:
        known = session.scalar(select(JobRow.sequence).where(JobRow.id == job_id)) or 0
    return status in OPEN or (isinstance(sequence, int) and sequence > known)


def _wait_again(services: Services, job_id: str) -> None:
    """A job without a record was perhaps published before the backup, perhaps not: publish it.

    A second message is harmless, because the job's record decides.
    """

    def act(session: Writing) -> None:
        row = store.locked(session, job_id)
        if row is None or row.status not in ("queued", "running") or row.admitted_at is None:
            return
        row.status, row.admitted_at = "queued", None
        store.put_out(session, row)

    services.database.write(act)


def _follow_wishes(services: Services, job_id: str) -> None:
    """Requests to cancel, pause or resume that were made in the lost time."""
    cancelled = ledger.is_cancelled(services, job_id)
    paused = ledger.is_paused(services, job_id)
    record = ledger.record_of(services, job_id)
    rests = record is not None and record.is_paused

    def act(session: Writing) -> None:
        row = store.locked(session, job_id)
        if row is None or row.status in ENDED:
            return
        if cancelled:
            if rests or not store.cancel_waiting(session, row):
                row.cancel_requested_at = row.cancel_requested_at or now()
            if rests:
                store.put_out_again(session, row)
        elif paused:
            _pause(session, row, rests=rests)
        elif row.status in ("paused", "pausing"):
            _resume(session, row, rests=rests, claimed=record is not None)

    services.database.write(act)


def _pause(session: Writing, row: JobRow, *, rests: bool) -> None:
    row.pause_requested_at = row.pause_requested_at or now()
    if row.status == "paused":
        return
    if rests or (row.status == "queued" and row.admitted_at is None):
        row.status, row.admitted_at = "paused", None
        row.started_at = row.started_at or (now() if rests else None)
        store.drop_waiting(session, row.id)
        store.note_state(session, row.id, row.org_id, "paused", "Job paused")
    elif row.status == "running":
        row.status = "pausing"


def _resume(session: Writing, row: JobRow, *, rests: bool, claimed: bool) -> None:
    row.pause_requested_at, row.stage = None, None
    if claimed and not rests:
        row.status, row.admitted_at = "running", row.admitted_at or now()
    else:
        row.status, row.admitted_at = "queued", None
        store.drop_waiting(session, row.id)
        store.put_out(session, row)
    store.note_state(session, row.id, row.org_id, row.status, "Job resumed")


def _raise_counters(services: Services) -> None:
    """No number of a restored job is given out again."""

    def act(session: Writing) -> None:
        highest = session.execute(
            select(JobRow.kind, func.max(JobRow.subject_number))
            .where(JobRow.subject_number.is_not(None))
            .group_by(JobRow.kind)
        )
        for kind, number in highest.all():
            name = f"subject:{kind}"
            row = session.get(CounterRow, name)
            if row is None:
                session.add(CounterRow(name=name, value=number or 0))
            else:
                row.value = max(row.value, number or 0)

    services.database.write(act)
