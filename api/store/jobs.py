"""Queries about jobs: creating, finding, admitting, and the news that changes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from api.store.database import Writing, now
from api.store.endpoints import announce
from api.store.tables import (
    ENDED,
    OPEN,
    WITH_WORKERS,
    EventRow,
    JobRow,
    OrganizationRow,
    OutboxRow,
)

MEASURED = 50
"""Finished jobs of a kind that the rate is measured on."""


def event(
    job_id: str,
    org_id: str | None,
    message: str,
    *,
    type_: str = "message",
    level: str = "info",
    data: dict[str, Any] | None = None,
) -> EventRow:
    """An event of a job, which happened now."""
    return EventRow(
        job_id=job_id,
        org_id=org_id,
        at=now(),
        level=level,
        type=type_,
        message=message,
        data=data or {},
    )


def add(session: Writing, row: JobRow, *, waits: bool = True) -> None:
    """Add a job, its first event and, if it waits, its message for the broker."""
    session.add(row)
    session.note(event(row.id, row.org_id, "Job created", type_="state", data=_state(row.status)))
    if waits:
        put_out(session, row)


def put_out(session: Writing, row: JobRow, due_at: float | None = None) -> None:
    """Add a job's message to the outbox, where it waits for the job's admission, or is due."""
    session.add(
        OutboxRow(
            job_id=row.id,
            kind=row.kind,
            body=row.message,
            headers=({"x-min-level": row.min_level} if row.min_level else {}) | row.trace_headers,
            created_at=now(),
            due_at=due_at,
            attempts=0,
        )
    )


def put_out_again(session: Writing, row: JobRow) -> None:
    """Publish the message of a job that is to be cancelled and that no message points to.

    The job needs no admission. A request to pause it is over.
    """
    row.status, row.admitted_at, row.pause_requested_at = "queued", now(), None
    drop_waiting(session, row.id)
    put_out(session, row, due_at=now())


def drop_waiting(session: Writing, job_id: str) -> None:
    """Drop the messages of a job that the relay has not published."""
    session.execute(
        delete(OutboxRow).where(OutboxRow.job_id == job_id, OutboxRow.published_at.is_(None))
    )


def get(session: Session, job_id: str, org_id: str, *, lock: bool = False) -> JobRow | None:
    """A job of an organisation."""
    query = select(JobRow).where(
        JobRow.id == job_id, JobRow.org_id == org_id, JobRow.deleted_at.is_(None)
    )
    return session.scalar(query.with_for_update() if lock else query)


def locked(session: Writing, job_id: str) -> JobRow | None:
    """A job of any organisation, for news of it."""
    return session.scalar(select(JobRow).where(JobRow.id == job_id).with_for_update())


@dataclasses.dataclass(frozen=True, slots=True)
class Filters:
    """Filters of a list of jobs.

    Attributes:
        kind: Only this kind.
        statuses: Only these statuses.
        tag: Only jobs with this tag.
        metadata: Only jobs whose metadata has these values.
    """

    kind: str | None = None
    statuses: tuple[str, ...] = ()
    tag: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()

    def applied(self, query: Select[JobRow], dialect: str) -> Select[JobRow]:
        """The query with the filters."""
        if self.kind is not None:
            query = query.where(JobRow.kind == self.kind)
        if self.statuses:
            query = query.where(JobRow.status.in_(self.statuses))
        for name, value in self.metadata:
            query = query.where(JobRow.job_metadata[name].as_string() == value)
        if self.tag is not None:
            query = query.where(_has_tag(self.tag, dialect))
        return query


def _has_tag(tag: str, dialect: str) -> Any:
    if dialect == "postgresql":
        return JobRow.tags.op("@>")(func.jsonb_build_array(tag))
    each = func.json_each(JobRow.tags).table_valued("value")
    return select(1).select_from(each).where(each.c.value == tag).exists()


def visible(org_id: str) -> Select[JobRow]:
    """The jobs that an organisation sees."""
    return select(JobRow).where(JobRow.org_id == org_id, JobRow.deleted_at.is_(None))


# ---- the fair queue ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class WaitingJob:
    """A job on its way to a worker.

    Attributes:
        job_id, org_id, kind: The job.
        is_admitted: Its message is with the broker.
    """

    job_id: str
    org_id: str | None
    kind: str
    is_admitted: bool


def waiting(session: Session) -> list[WaitingJob]:
    """All jobs on their way to a worker, in the order of their turns.

    Admitted jobs come first. Then organisations take turns: the one whose last turn is the longest
    ago goes first, each with one job per round. Within an organisation the higher priority goes
    first, then the older order. So the order does not depend on when running jobs end.
    """
    # No join of waiting jobs with themselves: its cost grows with their square.
    turn = func.row_number().over(
        partition_by=(JobRow.org_id, JobRow.admitted_at.is_(None)),
        order_by=(JobRow.priority.desc(), JobRow.created_at, JobRow.id),
    )
    rows = session.execute(
        select(JobRow.id, JobRow.org_id, JobRow.kind, JobRow.admitted_at)
        .outerjoin(OrganizationRow, OrganizationRow.id == JobRow.org_id)
        .where(JobRow.status == "queued", JobRow.deleted_at.is_(None))
        .order_by(
            JobRow.admitted_at.is_(None),
            JobRow.admitted_at,
            turn,
            func.coalesce(OrganizationRow.last_turn_at, 0.0),
            JobRow.created_at,
            JobRow.id,
        )
    )
    return [WaitingJob(row[0], row[1], row[2], row[3] is not None) for row in rows]


def with_workers(session: Session) -> dict[str | None, int]:
    """The number of jobs that each organisation has with the workers."""
    rows = session.execute(
        select(JobRow.org_id, func.count())
        .where(JobRow.status.in_(WITH_WORKERS), JobRow.admitted_at.is_not(None))
        .group_by(JobRow.org_id)
    )
    return {row[0]: row[1] for row in rows}


def admit(session: Writing, job_ids: Sequence[str]) -> int:
    """Give the messages of waiting jobs to the relay. Returns the number of jobs."""
    at = now()
    admitted = session.execute(
        update(JobRow)
        .where(
            JobRow.id.in_(job_ids),
            JobRow.admitted_at.is_(None),
            JobRow.status == "queued",
        )
        .values(admitted_at=at, heard_at=at)
        .returning(JobRow.id, JobRow.org_id)
        .execution_options(synchronize_session=False)
    ).all()
    ids, organizations = [row[0] for row in admitted], {row[1] for row in admitted}
    session.execute(
        update(OrganizationRow)
        .where(OrganizationRow.id.in_(organizations))
        .values(last_turn_at=at)
        .execution_options(synchronize_session=False)
    )
    session.execute(
        update(OutboxRow)
        .where(
            OutboxRow.job_id.in_(ids),
            OutboxRow.due_at.is_(None),
            OutboxRow.published_at.is_(None),
        )
        .values(due_at=at)
    )
    return len(admitted)


def mean_seconds(session: Session, kind: str) -> float | None:
    """How long the newest finished jobs of a kind took, on average; None before there is one."""
    newest = (
        select((JobRow.finished_at - JobRow.started_at).label("seconds"))
        .where(
            JobRow.kind == kind,
            JobRow.status == "succeeded",
            JobRow.started_at.is_not(None),
            JobRow.finished_at.is_not(None),
        )
        .order_by(JobRow.heard_at.desc())  # the order of an index
        .limit(MEASURED)
        .subquery()
    )
    return session.scalar(select(func.avg(newest.c.seconds)))


# ---- changes -------------------------------------------------------------------------------------


def cancel_waiting(session: Writing, row: JobRow) -> bool:
    """Cancel a job whose message no worker has seen. Returns whether it was one."""
    cancelled = session.scalar(
        update(JobRow)
        .where(
            JobRow.id == row.id,
            or_(
                and_(JobRow.status == "queued", JobRow.admitted_at.is_(None)),
                and_(JobRow.status == "paused", JobRow.started_at.is_(None)),
            ),
        )
        .values(
            status="cancelled",
            finished_at=now(),
            error_code="CANCELLED",
            error_message="The job was cancelled before a worker took it.",
        )
        .returning(JobRow.id)
        .execution_options(synchronize_session=False)
    )
    if cancelled is None:
        return False
    drop_waiting(session, row.id)
    note_state(session, row.id, row.org_id, "cancelled", "Job cancelled")
    return True


def note_state(
    session: Writing,
    job_id: str,
    org_id: str | None,
    status: str,
    message: str,
    *,
    level: str = "info",
) -> None:
    """An event of a new status, and the organisation's webhooks about it."""
    announce(session, org_id, job_id, status)
    session.note(event(job_id, org_id, message, type_="state", level=level, data=_state(status)))


def _state(status: str) -> dict[str, Any]:
    return {"status": status, "ended": status in ENDED}


def silent(session: Session, before: float, limit: int) -> list[JobRow]:
    """Open jobs with the workers of which nothing was heard since `before`, the oldest first."""
    return list(
        session.scalars(
            select(JobRow)
            .where(
                JobRow.status.in_(OPEN),
                JobRow.admitted_at.is_not(None),
                JobRow.heard_at < before,
            )
            .order_by(JobRow.heard_at)
            .limit(limit)
        )
    )
