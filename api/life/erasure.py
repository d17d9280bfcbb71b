"""Deletes everything that an organisation owns, after its deletion was asked for.

Its keys stop at once and its open jobs are cancelled. Objects on S3 are deleted before the rows
that name them, so a deletion that was cut off continues. The audit log stays.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastapi import Request
from sqlalchemy import delete, select, update

from api.gate.keys import Caller
from api.life.steering import audit
from api.services import Services
from api.store import jobs as store
from api.store.database import Writing, now
from api.store.tables import (
    OPEN,
    AnswerRow,
    ApiKeyRow,
    DraftRow,
    EndpointRow,
    EventRow,
    FileRow,
    JobRow,
    MetricRow,
    ModelRow,
    OrganizationRow,
    OutboxRow,
    PageSessionRow,
    ReceiptRow,
    UploadPartRow,
    UploadRow,
    WebhookRow,
)
from jobs.layout import (
    STYLE,
    cancel_file_at,
    live_mark_at,
    order_at,
    pause_file_at,
    place_of,
    previews_of,
    record_at,
    settled_mark_at,
    staging_of,
)
from services.s3.s3_service import S3Service
from utils.logger import get_logger

log = get_logger(__name__)

QUIET_SECONDS = 60.0
"""A worker writes the last marks of a job shortly after its ending."""
_OF_JOBS = (EventRow, MetricRow, OutboxRow, ReceiptRow)
_OF_ORGANIZATIONS = (
    *(ModelRow, FileRow, UploadRow, AnswerRow, ApiKeyRow, WebhookRow, EndpointRow, JobRow),
    *(PageSessionRow, DraftRow),
)


def ask_for(services: Services, caller: Caller, request: Request) -> None:
    """Mark the caller's organisation as deleted, revoke its keys, and cancel its jobs.

    Raises:
        StorageError: A request to cancel cannot be written to S3; this can be repeated.
    """
    with services.database.reading() as session:
        open_jobs = list(
            session.scalars(
                select(JobRow.id).where(JobRow.org_id == caller.org_id, JobRow.status.in_(OPEN))
            )
        )
    for job_id in open_jobs:
        services.state_s3.write(cancel_file_at(services.buckets.state, job_id), b"")

    def act(session: Writing) -> None:
        for row in session.scalars(
            select(JobRow)
            .where(JobRow.org_id == caller.org_id, JobRow.status.in_(OPEN))
            .with_for_update()
        ):
            if store.cancel_waiting(session, row):
                continue
            row.cancel_requested_at = row.cancel_requested_at or now()
            if row.status == "paused":
                store.put_out_again(session, row)
        at = now()
        org_id = caller.org_id
        for change in (
            update(OrganizationRow).where(OrganizationRow.id == org_id).values(deleted_at=at),
            update(EndpointRow).where(EndpointRow.org_id == org_id).values(deleted_at=at),
            update(ApiKeyRow)
            .where(ApiKeyRow.org_id == org_id, ApiKeyRow.revoked_at.is_(None))
            .values(revoked_at=at),
        ):
            session.execute(change)
        audit(session, caller, "organization.delete", caller.org_id, request)

    services.database.write(act)
    services.keys.forget()
    services.wake.set()


def erase(services: Services) -> int:
    """Delete what deleted organisations own, once. Returns the number of those that are done.

    An organisation whose jobs have not all ended waits for them.

    Raises:
        StorageError: S3 cannot be used; the next turn continues.
    """
    with services.database.reading() as session:
        # A key is the last thing that goes.
        ids = list(
            session.scalars(
                select(OrganizationRow.id).where(
                    OrganizationRow.deleted_at.is_not(None),
                    OrganizationRow.id.in_(select(ApiKeyRow.org_id)),
                )
            )
        )
    return sum(_erase(services, org_id) for org_id in ids)


def _erase(services: Services, org_id: str) -> bool:
    with services.database.reading() as session:
        jobs = list(session.scalars(select(JobRow).where(JobRow.org_id == org_id)))
    if any(row.status in OPEN or (row.finished_at or 0) > now() - QUIET_SECONDS for row in jobs):
        return False
    for row in jobs:
        _erase_objects(services, row)
    _delete_below(services.s3, services.buckets.files, (f"orgs/{org_id}/",))
    services.database.write(lambda session: _erase_rows(session, org_id))
    log.info("organization_erased", org_id=org_id, jobs=len(jobs))
    return True


def _erase_objects(services: Services, row: JobRow) -> None:
    state, place = services.buckets.state, place_of(row.kind, row.subject, row.id)
    prefixes = [place.checkpoints, staging_of(row.id), previews_of(row.id)]
    keys = [
        each(state, row.id).key
        for each in (cancel_file_at, pause_file_at, order_at, settled_mark_at, live_mark_at)
    ]
    # A style that another backend has numbered may have models of jobs that are not ours.
    if row.kind != STYLE or row.subject_number is not None:
        _delete_below(services.s3, services.buckets.models, (place.models,))
        prefixes.append(place.archive)
        keys.append(place.turn)
    _delete_below(services.state_s3, state, prefixes)
    services.state_s3.delete(state, [*keys, record_at(state, row.id).key])


def _delete_below(s3: S3Service, bucket: str, prefixes: Iterable[str]) -> None:
    for prefix in prefixes:
        s3.delete(bucket, [info.key for info in s3.list_objects(bucket, prefix)])


def _erase_rows(session: Writing, org_id: str) -> None:
    jobs = select(JobRow.id).where(JobRow.org_id == org_id)
    for table in _OF_JOBS:
        session.execute(delete(table).where(table.job_id.in_(jobs)))
    session.execute(delete(EventRow).where(EventRow.org_id == org_id))
    uploads = select(UploadRow.id).where(UploadRow.org_id == org_id)
    session.execute(delete(UploadPartRow).where(UploadPartRow.upload_id.in_(uploads)))
    for owned in _OF_ORGANIZATIONS:
        session.execute(delete(owned).where(owned.org_id == org_id))
    session.execute(
        update(OrganizationRow).where(OrganizationRow.id == org_id).values(name="", limits={})
    )
