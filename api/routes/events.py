"""Events of jobs: a page of JSON, or server-sent events with replay.

A stream holds no connection of the database and no thread while it waits. It first subscribes to
the hub and then reads the past, so it misses nothing, and it leaves out what it has sent already.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Select, select
from starlette.concurrency import run_in_threadpool

from api import views
from api.gate.guard import Called, GuardedRoute, Served, needs
from api.gate.keys import READ, Caller
from api.gate.problems import Problem
from api.routes.jobs import found
from api.services import Services
from api.store.database import DatabaseAway
from api.store.tables import ENDED, EventRow, JobRow

KEEP_ALIVE_SECONDS = 15.0
REPLAY_BATCH = 500
STREAMS_PER_PROCESS = 500
_CURSOR = re.compile(r"\d{1,18}")
_STREAM = "text/event-stream"
_HEADERS = {"Cache-Control": "no-cache, no-store", "X-Accel-Buffering": "no"}
_DOCUMENTED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "A page of events, or a stream of them if `Accept: text/event-stream`.",
        "content": {_STREAM: {"schema": {"type": "string"}}},
    }
}


def cursor_of(value: str | None, name: str) -> int:
    """The id of an event; 0 for none.

    Raises:
        Problem: It is not the id of an event.
    """
    if value is None or value == "":
        return 0
    if not _CURSOR.fullmatch(value):
        raise Problem("invalid_parameter", f"{name}: must be the id of an event.", param=name)
    return int(value)


def page(
    services: Services, caller: Caller, job_id: str, limit: int, after: str | None
) -> dict[str, Any]:
    """A page of a job's events, newest first; `after` is the last id of the page before."""
    last = cursor_of(after, "after")
    with services.database.reading() as session:
        found(session, caller, job_id)
        query = select(EventRow).where(EventRow.job_id == job_id)
        if last:
            query = query.where(EventRow.id < last)
        rows = list(session.scalars(query.order_by(EventRow.id.desc()).limit(limit + 1)))
    return views.page([views.event(row) for row in rows[:limit]], has_more=len(rows) > limit)


async def stream(
    request: Request,
    services: Services,
    caller: Caller,
    job_id: str | None,
    after: str | None = None,
) -> Response:
    """A stream of the events of a job, or of all jobs of the caller's organisation.

    Args:
        after: The last event that the client knows, if the header `Last-Event-ID` names none.
    """
    cursor = cursor_of(request.headers.get("last-event-id") or after, "last-event-id")
    if services.hub.streams >= STREAMS_PER_PROCESS:
        raise Problem(
            "rate_limited",
            f"This server has {STREAMS_PER_PROCESS} open streams. Try again later.",
            headers={"Retry-After": "10"},
        )
    if job_id is not None:
        await run_in_threadpool(_require_job, services, caller, job_id)
    events = _events(services, caller.org_id, job_id, cursor)
    return StreamingResponse(events, media_type=_STREAM, headers=_HEADERS)


def _require_job(services: Services, caller: Caller, job_id: str) -> None:
    with services.database.reading() as session:
        found(session, caller, job_id)


async def _events(
    services: Services, org_id: str, job_id: str | None, cursor: int
) -> AsyncIterator[bytes]:
    def wants(row: EventRow) -> bool:
        return row.org_id == org_id and job_id in (None, row.job_id)

    yield b"retry: 2000\n\n"
    with services.hub.subscribed(wants) as subscriber:
        # Before the past is read: a later ending comes through the hub.
        over = await run_in_threadpool(_has_ended, services, job_id)
        while True:
            rows = await run_in_threadpool(_past, services, org_id, job_id, cursor)
            for row in rows:
                cursor = row.id
                yield views.event_stream(row)
            if len(rows) < REPLAY_BATCH:
                break
        while not over:
            try:
                new = await subscriber.next(KEEP_ALIVE_SECONDS)
            except EOFError:
                return  # without `end`: the client comes back with its cursor
            if new is None:
                yield b": keep-alive\n\n"
                over = await run_in_threadpool(_has_ended, services, job_id)
                continue
            if new.id <= cursor:
                continue
            cursor = new.id
            yield views.event_stream(new)
            over = job_id is not None and bool(new.type == "state" and new.data.get("ended"))
    yield b"event: end\ndata: {}\n\n"


def _past(services: Services, org_id: str, job_id: str | None, cursor: int) -> list[EventRow]:
    query: Select[EventRow] = select(EventRow).where(
        EventRow.org_id == org_id, EventRow.id > cursor
    )
    if job_id is not None:
        query = query.where(EventRow.job_id == job_id)
    elif cursor == 0:
        return []  # a stream over all jobs begins now, unless the client names its last event
    with services.database.reading() as session:
        return list(session.scalars(query.order_by(EventRow.id).limit(REPLAY_BATCH)))


def _has_ended(services: Services, job_id: str | None) -> bool:
    if job_id is None:
        return False
    try:
        with services.database.reading() as session:
            status = session.scalar(select(JobRow.status).where(JobRow.id == job_id))
    except DatabaseAway:
        return False
    return status in ENDED or status is None


def routes(prefix: str, label: str) -> APIRouter:
    """The routes of events under the prefix of jobs."""
    router = APIRouter(prefix=prefix, tags=[label], route_class=GuardedRoute)
    name = label.replace(" ", "_")

    @router.get(
        "/{job_id}/events",
        openapi_extra=needs(READ),
        operation_id=f"events_{name}",
        responses=_DOCUMENTED,
        response_model=None,
    )
    async def list_events(
        job_id: str,
        request: Request,
        services: Served,
        caller: Called,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=30)] = None,
    ) -> Response | dict[str, Any]:
        """List the events of a job, newest first, or follow them as server-sent events.

        A stream begins with the first event, or after the one that the header `Last-Event-ID`
        names. It ends with `event: end` after the job's last state.
        """
        if _STREAM in request.headers.get("accept", ""):
            return await stream(request, services, caller, job_id)
        return await run_in_threadpool(page, services, caller, job_id, limit, after)

    return router


everything = APIRouter(prefix="/v1/events", tags=["events"], route_class=GuardedRoute)


@everything.get(
    "",
    openapi_extra=needs(READ),
    operation_id="events",
    responses=_DOCUMENTED,
    response_class=StreamingResponse,
)
async def all_events(request: Request, services: Served, caller: Called) -> Response:
    """Follow the events of all jobs of the organisation as server-sent events."""
    return await stream(request, services, caller, None)
