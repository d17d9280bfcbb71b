"""Experiments: the jobs of training kinds with their measured numbers, to compare."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from api import views
from api.gate.guard import Called, GuardedRoute, Served, needs
from api.gate.keys import READ, TRAIN, Caller
from api.gate.problems import Problem
from api.life import ledger
from api.life.steering import audit
from api.routes.jobs import Filtered, found, metrics
from api.services import Services
from api.store import jobs as store
from api.store.database import Writing, now
from api.store.tables import ENDED, JobRow

router = APIRouter(prefix="/v1/experiments", tags=["experiments"], route_class=GuardedRoute)
Metric = Literal["loss", "best_validation_loss", "duration_seconds"]
METRICS: tuple[Metric, ...] = ("loss", "best_validation_loss", "duration_seconds")
LOWER_IS_BETTER = ("best_validation_loss", "loss")
_LAST = 1e300
"""A number for jobs without the value that a list is sorted by: they come last."""

_DURATION = JobRow.finished_at - JobRow.started_at
_SORTS: dict[str, Any] = {
    "created_at": -JobRow.created_at,
    "duration": func.coalesce(_DURATION, _LAST),
    "best_validation_loss": func.coalesce(JobRow.best_validation_loss, _LAST),
}


def order_by(sort: str) -> Any:
    """The value that a list is sorted by: `created_at`, `duration` or `best_validation_loss`."""
    return _SORTS[sort]


class Comparison(BaseModel):
    """Experiments to compare."""

    model_config = ConfigDict(extra="forbid")

    ids: Annotated[list[Annotated[str, Field(max_length=64)]], Field(min_length=2, max_length=10)]
    metrics: Annotated[
        list[Metric],
        Field(max_length=len(METRICS)),
    ] = Field(default_factory=lambda: list(METRICS))


def shown(services: Services, row: JobRow) -> dict[str, Any]:
    """An experiment as clients see it."""
    return views.job(row, notice=services.settings.api_notice) | {
        "object": "experiment",
        "metrics": numbers(row),
    }


def numbers(row: JobRow) -> dict[str, float | None]:
    """The numbers that experiments are compared by."""
    duration = None
    if row.started_at is not None and row.finished_at is not None:
        duration = row.finished_at - row.started_at
    return {
        "loss": row.loss,
        "best_validation_loss": row.best_validation_loss,
        "duration_seconds": duration,
    }


@router.get("", openapi_extra=needs(READ), operation_id="list_experiments")
def list_experiments(
    filters: Filtered,
    services: Served,
    caller: Called,
    sort: Literal["created_at", "duration", "best_validation_loss"] = "created_at",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(max_length=255)] = None,
) -> dict[str, Any]:
    """List experiments: the newest, the fastest or the best first."""
    value = _SORTS[sort]
    query = filters.applied(store.visible(caller.org_id), services.database.engine.dialect.name)
    with services.database.reading() as session:
        if after is not None:
            found(session, caller, after)
            last = session.scalar(select(value).where(JobRow.id == after))
            query = query.where(or_(value > last, and_(value == last, JobRow.id > after)))
        rows = list(session.scalars(query.order_by(value, JobRow.id).limit(limit + 1)))
    return views.page([shown(services, row) for row in rows[:limit]], has_more=len(rows) > limit)


@router.post("/compare", openapi_extra=needs(READ), operation_id="compare_experiments")
def compare(order: Comparison, services: Served, caller: Called) -> dict[str, Any]:
    """Compare the numbers of 2 to 10 experiments."""
    with services.database.reading() as session:
        rows = [found(session, caller, each) for each in dict.fromkeys(order.ids)]
    return comparison(services, rows, order.metrics)


def comparison(services: Services, rows: list[JobRow], wanted: list[Any]) -> dict[str, Any]:
    """A table of numbers, and the best experiment by its validation loss, else by its loss."""
    table = {name: {row.id: numbers(row).get(name) for row in rows} for name in wanted}
    return {
        "object": "experiment.comparison",
        "experiments": [shown(services, row) for row in rows],
        "comparison_table": table,
        "best_experiment_id": best_of(rows),
    }


def best_of(rows: list[JobRow]) -> str | None:
    """The id of the best experiment; None if none has a number."""
    for name in LOWER_IS_BETTER:
        measured = [(numbers(row)[name], row.id) for row in rows]
        known = [(value, id_) for value, id_ in measured if value is not None]
        if known:
            return min(known, key=lambda pair: (pair[0], pair[1]))[1]
    return None


@router.get("/{experiment_id}", openapi_extra=needs(READ), operation_id="get_experiment")
def get_experiment(experiment_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """Show an experiment."""
    with services.database.reading() as session:
        return shown(services, found(session, caller, experiment_id))


@router.get(
    "/{experiment_id}/metrics", openapi_extra=needs(READ), operation_id="get_experiment_metrics"
)
def get_metrics(
    experiment_id: str,
    services: Served,
    caller: Called,
    max_points: Annotated[int, Query(ge=1, le=2000)] = 500,
) -> dict[str, Any]:
    """The numbers of an experiment, by step."""
    return metrics(services, caller, experiment_id, max_points)


@router.delete("/{experiment_id}", openapi_extra=needs(TRAIN), operation_id="delete_experiment")
def delete_experiment(
    experiment_id: str, request: Request, services: Served, caller: Called
) -> dict[str, Any]:
    """Delete an experiment that has ended. Its model stays."""
    remove(services, caller, experiment_id, request)
    return {"id": experiment_id, "object": "experiment", "deleted": True}


def remove(services: Services, caller: Caller, job_id: str, request: Request) -> None:
    """Hide a job that has ended, also from a later restoration.

    Raises:
        Problem: There is no such job, or it has not ended.
    """

    def act(session: Writing) -> JobRow:
        row = _ended(session, caller, job_id)
        row.deleted_at = now()
        audit(session, caller, "experiment.delete", job_id, request)
        return row

    row = services.database.write(act)
    ledger.keep_order(services, row)


def _ended(session: Session, caller: Caller, job_id: str) -> JobRow:
    row = found(session, caller, job_id)
    if row.status not in ENDED:
        raise Problem(
            "job_is_running", f"The job {job_id} is {row.status}. Cancel it before you delete it."
        )
    return row
