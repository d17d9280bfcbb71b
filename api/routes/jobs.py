"""Jobs: `/v1/fine_tuning/jobs` in OpenAI's form, and the same as `/v1/jobs`."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api import views
from api.gate import cleaning
from api.gate.guard import Called, GuardedRoute, Served, needs
from api.gate.keys import READ, TRAIN, Caller
from api.gate.limits import limit_of, take_create
from api.gate.once import Once
from api.gate.paging import Paged
from api.gate.problems import Problem
from api.life import ledger, orders, steering
from api.life.orders import JobOrder
from api.services import Services
from api.store import jobs as store
from api.store.database import Writing, now
from api.store.tables import ENDED, JobRow, MetricRow
from jobs.addresses import S3Location
from jobs.layout import REPORT, place_of
from services.telemetry.tracing import carried, trace_id_of
from utils import logger
from utils.errors import ObjectNotFound

log = logger.get_logger(__name__)

MAX_POINTS = 2000
MAX_REPORT_BYTES = 16 * 1024**2
STATUSES = ("validating_files", "queued", "running", "pausing", "paused", *ENDED)


def create(
    services: Services,
    caller: Caller,
    order: JobOrder,
    request: Request,
    job_id: str = "",
    once: Once | None = None,
) -> dict[str, Any]:
    """Create a job: the row, its event and its message in one transaction.

    Args:
        job_id: The job's id; a random one by default.
        once: The marks of a repeated request; those of `request` by default.

    Returns:
        The job as the client sees it; the same for each repetition of the request.

    Raises:
        Problem: The order is wrong.
    """
    once = once or Once.of(request, caller, request.state.raw_body)
    with services.database.reading() as session:
        if known := once.answer(session):
            return known
    if order.validate_only:
        return _validated(services, caller, order)
    job_id = job_id or orders.new_job_id()
    carrier = carried(request.headers)
    with (
        logger.bound(task_id=job_id, trace_id=trace_id_of(carrier, job_id)),
        services.tracing.job(job_id, carrier=carrier, name="order", org_id=caller.org_id),
    ):
        trace = services.tracing.headers() or carrier
        return _created(services, caller, order, once, job_id, trace)


def _created(
    services: Services,
    caller: Caller,
    order: JobOrder,
    once: Once,
    job_id: str,
    trace: dict[str, str],
) -> dict[str, Any]:
    number = orders.number_for(services, orders.kind_for(services, order))
    with services.database.reading() as session:
        prepared = orders.prepare(session, services, caller, order, job_id, number)

    def insert(session: Writing) -> tuple[dict[str, Any], JobRow | None]:
        if known := once.answer(session):
            return known, None
        row = _row(services, caller, order, job_id, prepared)
        row.trace_headers = trace
        store.add(session, row)
        session.flush()
        answer = views.job(row, _turn(services, session, row), notice=services.settings.api_notice)
        once.keep(session, answer)
        # Last, because other orders of the organisation wait for this row until the commit.
        per_minute = services.settings.api_creates_per_minute
        take_create(
            session,
            caller.org_id,
            limit_of(session, caller.org_id, "creates_per_minute", per_minute),
        )
        return answer, row

    answer, row = services.database.write(insert)
    if row is not None:
        log.info("job_ordered", kind=row.kind, org_id=row.org_id)
        if ledger.keep_order(services, row):
            kept = update(JobRow).where(JobRow.id == row.id).values(order_kept_at=now())
            services.database.write(lambda session: session.execute(kept))
    services.wake.set()
    return answer


def _validated(services: Services, caller: Caller, order: JobOrder) -> dict[str, Any]:
    kind = orders.kind_for(services, order)
    is_counted = getattr(kind, "subject_is_number", False)
    first = services.settings.api_style_id_start if is_counted else None
    with services.database.reading() as session:
        prepared = orders.prepare(session, services, caller, order, orders.new_job_id(), first)
    return {
        "object": "fine_tuning.job.validation",
        "valid": True,
        "kind": prepared.kind,
        "model": order.model,
        "training_files": order.all_training_files(),
    }


def _row(
    services: Services, caller: Caller, order: JobOrder, job_id: str, prepared: orders.Prepared
) -> JobRow:
    return ledger.new_row(
        id=job_id,
        org_id=caller.org_id,
        kind=prepared.kind,
        subject=prepared.subject,
        subject_number=prepared.subject_number,
        name=order.name,
        tags=order.tags,
        job_metadata=order.metadata or {},
        base_model=order.model,
        training_files=order.all_training_files(),
        validation_files=order.all_validation_files(),
        parameters=order.parameters,
        hyperparameters=order.all_hyperparameters(),
        seed=order.seed,
        suffix=order.suffix,
        message=prepared.body,
        min_level=orders.level_needed(prepared, services),
        status="queued",
        priority=order.priority,
        created_at=now(),
    )


def _turn(services: Services, session: Session, row: JobRow) -> views.QueueTurn | None:
    """A waiting job's place in the queue."""
    if row.status != "queued":
        return None
    return services.line.turns(session, (row.id,)).get(row.id)


def found(session: Session, caller: Caller, job_id: str) -> JobRow:
    """A job of the caller's organisation.

    Raises:
        Problem: There is none.
    """
    row = store.get(session, job_id, caller.org_id)
    if row is None:
        raise no_such_job(job_id)
    return row


def no_such_job(job_id: str) -> Problem:
    """The problem of an id that is not a job of the caller's organisation."""
    return Problem("job_not_found", f"There is no job {job_id}.", param="job_id")


def show(services: Services, caller: Caller, job_id: str) -> dict[str, Any]:
    """A job as the client sees it."""
    with services.database.reading() as session:
        row = found(session, caller, job_id)
        return views.job(row, _turn(services, session, row), notice=services.settings.api_notice)


def _filters(
    request: Request,
    kind: Annotated[str | None, Query(max_length=64)] = None,
    status: Annotated[
        str | None, Query(max_length=200, description="One, or several with commas.")
    ] = None,
    tag: Annotated[str | None, Query(max_length=64)] = None,
) -> store.Filters:
    wanted = tuple(status.split(",")) if status else ()
    if unknown := [each for each in wanted if each not in STATUSES]:
        raise Problem(
            "invalid_parameter",
            f"status: {unknown[0]} is none of {', '.join(STATUSES)}.",
            param="status",
        )
    metadata = tuple(
        (name[len("metadata[") : -1], value)
        for name, value in request.query_params.multi_items()
        if name.startswith("metadata[") and name.endswith("]")
    )
    return store.Filters(kind=kind, statuses=wanted, tag=tag, metadata=metadata)


Filtered = Annotated[store.Filters, Depends(_filters)]


def list_jobs(
    services: Services, caller: Caller, page: Paged, filters: store.Filters
) -> dict[str, Any]:
    """A page of jobs."""
    with services.database.reading() as session:
        query = filters.applied(store.visible(caller.org_id), services.database.engine.dialect.name)
        rows, has_more = page.rows(session, query, JobRow)
        queued = [row.id for row in rows if row.status == "queued"]
        turns = services.line.turns(session, queued) if queued else {}
    notice = services.settings.api_notice
    shown = [views.job(row, turns.get(row.id), notice=notice) for row in rows]
    return views.page(shown, has_more=has_more)


def metrics(services: Services, caller: Caller, job_id: str, max_points: int) -> dict[str, Any]:
    """The measured numbers of a job, evenly thinned."""
    with services.database.reading() as session:
        found(session, caller, job_id)
        rows = list(
            session.scalars(
                select(MetricRow)
                .where(MetricRow.job_id == job_id)
                .order_by(MetricRow.claim, MetricRow.step)
            )
        )
    every = max(1, -(-len(rows) // max_points))
    kept = [row for index, row in enumerate(rows) if index % every == 0 or index == len(rows) - 1]
    return {
        "object": "list",
        "data": [
            {
                "object": "fine_tuning.job.metric",
                "step": row.step,
                "epoch": row.epoch,
                "claim": row.claim,
                "created_at": row.at,
                **row.numbers,
            }
            for row in kept
        ],
        "has_more": False,
        "total": len(rows),
    }


def checkpoints(services: Services, caller: Caller, job_id: str) -> dict[str, Any]:
    """The checkpoints that the job's record has."""
    with services.database.reading() as session:
        row = found(session, caller, job_id)
    record = ledger.record_of(services, row.id) if row.started_at else None
    newest_first = reversed(record.checkpoints) if record else ()
    data = [
        {
            "id": f"ftckpt-{row.id.rpartition('-')[2]}-{each.name}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int(row.started_at or row.created_at),
            "fine_tuned_model_checkpoint": f"{row.model_id or row.id}:ckpt-step-{each.step}",
            "fine_tuning_job_id": row.id,
            "step_number": each.step,
            "metrics": {"step": each.step},
            "name": each.name,
            "epoch": each.epoch,
            "claim": each.claim,
        }
        for each in newest_first
    ]
    return views.page(data, has_more=False)


def report(services: Services, caller: Caller, job_id: str) -> dict[str, Any]:
    """The report of a job that has succeeded.

    Raises:
        Problem: There is no report.
    """
    with services.database.reading() as session:
        row = found(session, caller, job_id)
    missing = Problem("report_not_found", f"The job {job_id} has no report: it is {row.status}.")
    if row.status != "succeeded":
        raise missing
    prefix = place_of(row.kind, row.subject, row.id).models
    place = S3Location(services.buckets.models, prefix + REPORT)
    try:
        stored = services.s3.read(place, max_bytes=MAX_REPORT_BYTES)
    except ObjectNotFound:
        raise missing from None
    try:
        return dict(cleaning.cleaned(json.loads(stored.body)))
    except (ValueError, TypeError):
        raise missing from None


def estimate(services: Services, caller: Caller, order: JobOrder) -> dict[str, Any]:
    """How long an order would wait and take, from measured rates."""
    kind = _validated(services, caller, order)["kind"]
    with services.database.reading() as session:
        line = store.waiting(session)
        seconds = store.mean_seconds(session, kind)
    return {
        "object": "fine_tuning.job.estimate",
        "kind": kind,
        "queue_position": len(line) + 1,
        "seconds": seconds,
        "cost": services.cost(seconds),
        "basis": "mean of the last finished jobs of this kind" if seconds is not None else None,
    }


def routes(prefix: str, label: str) -> APIRouter:
    """The routes of jobs under a prefix."""
    router = APIRouter(prefix=prefix, tags=[label], route_class=GuardedRoute)
    name = label.replace(" ", "_")

    @router.post("", openapi_extra=needs(TRAIN), operation_id=f"create_{name}")
    def create_job(
        order: JobOrder, request: Request, services: Served, caller: Called
    ) -> dict[str, Any]:
        """Create a job. It waits for its organisation's turn, and then goes to a worker."""
        return create(services, caller, order, request)

    @router.post("/estimate", openapi_extra=needs(READ), operation_id=f"estimate_{name}")
    def estimate_job(order: JobOrder, services: Served, caller: Called) -> dict[str, Any]:
        """Check an order and estimate its duration; nothing is created."""
        return estimate(services, caller, order)

    @router.get("", openapi_extra=needs(READ), operation_id=f"list_{name}")
    def list_all(
        page: Paged, filters: Filtered, services: Served, caller: Called
    ) -> dict[str, Any]:
        """List jobs, newest first."""
        return list_jobs(services, caller, page, filters)

    @router.get("/{job_id}", openapi_extra=needs(READ), operation_id=f"get_{name}")
    def get_job(job_id: str, services: Served, caller: Called) -> dict[str, Any]:
        """Show a job."""
        return show(services, caller, job_id)

    @router.post("/{job_id}/cancel", openapi_extra=needs(TRAIN), operation_id=f"cancel_{name}")
    def cancel_job(
        job_id: str, request: Request, services: Served, caller: Called
    ) -> dict[str, Any]:
        """Cancel a job: at once if no worker has it, else when its worker sees the request."""
        steering.cancel(services, caller, job_id, request)
        return show(services, caller, job_id)

    @router.post("/{job_id}/pause", openapi_extra=needs(TRAIN), operation_id=f"pause_{name}")
    def pause_job(
        job_id: str, request: Request, services: Served, caller: Called
    ) -> dict[str, Any]:
        """Pause a job. Its worker saves a checkpoint and takes other jobs."""
        steering.pause(services, caller, job_id, request)
        return show(services, caller, job_id)

    @router.post("/{job_id}/resume", openapi_extra=needs(TRAIN), operation_id=f"resume_{name}")
    def resume_job(
        job_id: str, request: Request, services: Served, caller: Called
    ) -> dict[str, Any]:
        """Resume a paused job from its last checkpoint. It waits for its turn again."""
        steering.resume(services, caller, job_id, request)
        return show(services, caller, job_id)

    @router.get(
        "/{job_id}/checkpoints", openapi_extra=needs(READ), operation_id=f"checkpoints_{name}"
    )
    def list_checkpoints(job_id: str, services: Served, caller: Called) -> dict[str, Any]:
        """List the checkpoints that the job can resume from, newest first."""
        return checkpoints(services, caller, job_id)

    @router.get("/{job_id}/report", openapi_extra=needs(READ), operation_id=f"report_{name}")
    def get_report(job_id: str, services: Served, caller: Called) -> dict[str, Any]:
        """Show the report of a job that has succeeded: images, losses, versions, warnings."""
        return report(services, caller, job_id)

    @router.get("/{job_id}/metrics", openapi_extra=needs(READ), operation_id=f"metrics_{name}")
    def list_metrics(
        job_id: str,
        services: Served,
        caller: Called,
        max_points: Annotated[int, Query(ge=1, le=MAX_POINTS)] = 500,
    ) -> dict[str, Any]:
        """The loss and the other numbers of a job, by step."""
        return metrics(services, caller, job_id, max_points)

    return router
