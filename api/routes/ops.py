"""Health, readiness, metrics, and the pages about problems. They need no key."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api.gate.guard import Served
from api.gate.problems import CODES, Problem
from api.services import Services
from api.store.database import DatabaseAway, now
from api.store.endpoints import waiting_count
from api.store.tables import OPEN, JobRow, OutboxRow
from utils.errors import StorageError
from utils.metrics import ApiMetrics

router = APIRouter(tags=["operations"])
Part = Literal["broker", "database", "storage"]
"""A part that the server needs."""


@router.head("/health", include_in_schema=False)
@router.get("/health", operation_id="health")
def health() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


@router.head("/ready", include_in_schema=False)
@router.get("/ready", operation_id="ready")
def ready(
    services: Served,
    check: Annotated[
        list[Part] | None, Query(description="Only these parts; all of them by default.")
    ] = None,
) -> JSONResponse:
    """Whether database, storage and broker can be used; 503 if one cannot.

    Without the broker jobs are still accepted, and wait in the database.
    """
    looks: dict[Part, Callable[[], str]] = {
        "broker": services.broker_state,
        "database": lambda: _database_problem(services),
        "storage": lambda: _storage_problem(services),
    }
    wanted = frozenset(check or get_args(Part))
    problems = {part: look() for part, look in looks.items() if part in wanted}
    checks = {part: problem or "ok" for part, problem in problems.items()}
    is_ready = not any(problems.values())
    body = {"status": "ready" if is_ready else "not ready", "checks": checks}
    return JSONResponse(body, 200 if is_ready else 503)


def _database_problem(services: Services) -> str:
    try:
        with services.database.reading() as session:
            session.execute(select(1))
    except DatabaseAway as error:
        return str(error)
    return ""


def _storage_problem(services: Services) -> str:
    try:
        services.state_s3.reach(services.buckets.state)
    except StorageError as error:
        return str(error)
    return ""


@router.get("/metrics", operation_id="metrics", response_class=Response)
def metrics(request: Request, services: Served) -> Response:
    """The metrics of this process, for Prometheus."""
    measured = services.metrics
    try:
        with services.database.reading() as session:
            _measure(session, measured)
        measured.database_up.set(1)
    except DatabaseAway:
        measured.database_up.set(0)
    measured.broker_connected.set(0 if services.broker_state() else 1)
    measured.streams.set(services.hub.streams)
    measured.relay_age.set(request.app.state.relay.age_seconds())
    text, kind = measured.render(request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": kind})


def _measure(session: Session, measured: ApiMetrics) -> None:
    """Set the metrics that the database has."""
    rows = session.execute(
        select(JobRow.status, func.count()).where(JobRow.status.in_(OPEN)).group_by(JobRow.status)
    )
    counts = {row[0]: row[1] for row in rows}
    for status in OPEN:
        measured.jobs.labels(status).set(counts.get(status, 0))
    due, oldest = session.execute(
        select(func.count(), func.min(OutboxRow.due_at)).where(
            OutboxRow.published_at.is_(None), OutboxRow.due_at.is_not(None)
        )
    ).one()
    measured.outbox.set(due)
    measured.outbox_oldest_seconds.set(max(0.0, now() - oldest) if oldest else 0)
    first = session.scalar(
        select(func.min(JobRow.created_at)).where(
            JobRow.status == "queued", JobRow.admitted_at.is_(None), JobRow.deleted_at.is_(None)
        )
    )
    waiting, age = waiting_count(session)
    measured.webhooks_waiting.set(waiting)
    measured.webhooks_oldest_seconds.set(age)
    measured.waiting_oldest_seconds.set(max(0.0, now() - first) if first else 0)


@router.get("/problems/{code}", response_class=HTMLResponse, operation_id="problem_page")
def problem_page(code: str) -> Response:
    """The page about a code of an error."""
    if code not in CODES:
        raise Problem("not_found", "There is no error with this code.")
    status, title = CODES[code]
    text = f"<p>HTTP status {status}. The answer's <code>detail</code> has the remedy.</p>"
    return HTMLResponse(
        f"<!doctype html><html lang=en><title>{html.escape(code)}</title>"
        f"<h1>{html.escape(title)}</h1><p><code>{html.escape(code)}</code></p>{text}</html>"
    )
