"""Cancel, pause and resume jobs.

A worker learns of a request from a file next to the job's record on S3, and from the answer to its
next progress report. A job that no worker has seen changes at once.
"""

from __future__ import annotations

from fastapi import Request

from api.gate.keys import Caller
from api.gate.problems import Problem, request_id_of
from api.services import Services
from api.store import jobs as store
from api.store.database import Writing, now
from api.store.tables import ENDED, AuditRow, JobRow
from jobs.layout import cancel_file_at, pause_file_at


def cancel(services: Services, caller: Caller, job_id: str, request: Request) -> None:
    """Cancel a job.

    Raises:
        Problem: There is no such job, or it has ended.
        StorageError: The request cannot be written to S3; it can be repeated.
    """
    _require_open(services, caller, job_id)
    # First the file: a database that is restored from a backup finds the wish there.
    place = cancel_file_at(services.buckets.state, job_id)
    services.state_s3.write(place, b"")

    def act(session: Writing) -> None:
        row = _open_job(session, caller, job_id)
        audit(session, caller, "job.cancel", job_id, request)
        if store.cancel_waiting(session, row):
            return
        if row.cancel_requested_at is None:
            row.cancel_requested_at = now()
            session.note(store.event(row.id, row.org_id, "Cancellation requested"))
        if row.status == "paused":
            # No message points to a paused job. Its worker ends it when it gets one.
            store.put_out_again(session, row)
            store.note_state(session, row.id, row.org_id, "queued", "Job resumed to be cancelled")

    services.database.write(act)
    services.wake.set()


def pause(services: Services, caller: Caller, job_id: str, request: Request) -> None:
    """Pause a job.

    Raises:
        Problem: There is no such job, or it has ended.
        StorageError: The request cannot be written to S3; it can be repeated.
    """
    if _require_open(services, caller, job_id).status in ("paused", "pausing"):
        return
    services.state_s3.write(pause_file_at(services.buckets.state, job_id), b"")

    def act(session: Writing) -> None:
        row = _open_job(session, caller, job_id)
        audit(session, caller, "job.pause", job_id, request)
        row.pause_requested_at = now()
        if row.admitted_at is None and row.status == "queued":
            row.status = "paused"
            store.drop_waiting(session, job_id)
            store.note_state(session, row.id, row.org_id, "paused", "Job paused")
        elif row.status in ("queued", "running"):
            row.status = "pausing"
            store.note_state(session, row.id, row.org_id, "pausing", "Job is pausing")

    services.database.write(act)
    services.wake.set()


def resume(services: Services, caller: Caller, job_id: str, request: Request) -> None:
    """Resume a paused job.

    Raises:
        Problem: There is no such job, or it is not paused.
        StorageError: The request to pause cannot be taken back; this can be repeated.
    """
    row = _require_open(services, caller, job_id)
    if row.status not in ("paused", "pausing"):
        raise Problem("job_not_paused", f"The job {job_id} is {row.status}, not paused.")
    place = pause_file_at(services.buckets.state, job_id)
    services.state_s3.delete(place.bucket, [place.key])

    def act(session: Writing) -> None:
        row = _open_job(session, caller, job_id)
        if row.status not in ("paused", "pausing"):
            return
        audit(session, caller, "job.resume", job_id, request)
        row.status, row.stage, row.admitted_at = "queued", None, None
        row.pause_requested_at = None
        store.drop_waiting(session, job_id)
        store.put_out(session, row)
        store.note_state(session, row.id, row.org_id, "queued", "Job resumed")

    services.database.write(act)
    services.wake.set()


def audit(session: Writing, caller: Caller, act: str, subject: str, request: Request) -> None:
    """Add an act to the audit log."""
    session.add(
        AuditRow(
            org_id=caller.org_id,
            api_key_id=caller.key_id,
            at=now(),
            act=act,
            subject=subject,
            request_id=request_id_of(request),
        )
    )


def _require_open(services: Services, caller: Caller, job_id: str) -> JobRow:
    with services.database.reading() as session:
        return _judged(store.get(session, job_id, caller.org_id), job_id)


def _open_job(session: Writing, caller: Caller, job_id: str) -> JobRow:
    return _judged(store.get(session, job_id, caller.org_id, lock=True), job_id)


def _judged(row: JobRow | None, job_id: str) -> JobRow:
    if row is None:
        raise Problem("job_not_found", f"There is no job {job_id}.", param="job_id")
    if row.status in ENDED:
        raise Problem("job_has_ended", f"The job {job_id} has ended: it is {row.status}.")
    return row
