"""Compare 2 to 10 experiments: parameters that differ, numbers, curves, and samples by prompt."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from sqlalchemy import select

from api.gate.keys import READ
from api.gate.problems import Problem
from api.page import pictures, rendering
from api.page.curves import overlaid_chart
from api.page.gate import PageRoute, page_scope
from api.page.visit import Visit, Visited
from api.routes import experiments, jobs
from api.store.jobs import visible
from api.store.tables import JobRow

router = APIRouter(route_class=PageRoute, include_in_schema=False)
LEAST, MOST = 2, 10
OFFERED = 100
MAX_POINTS = 500


@router.get("/compare", openapi_extra=page_scope(READ))
def compare(
    visit: Visited,
    ids: Annotated[list[Annotated[str, Query(max_length=64)]] | None, Query(alias="id")] = None,
) -> Response:
    """Choose experiments, and compare the chosen ones."""
    chosen = list(dict.fromkeys(ids or []))
    query = visible(visit.known.org_id).order_by(JobRow.created_at.desc()).limit(OFFERED)
    with visit.services.database.reading() as session:
        offered = list(session.scalars(query))
    found = _comparison(visit, chosen) if LEAST <= len(chosen) <= MOST else None
    return rendering.page(
        visit,
        "compare.html.j2",
        offered=[(row.id, title_of(row), row.status) for row in offered],
        chosen=chosen,
        is_wrong_number=bool(chosen) and found is None,
        found=found,
    )


def title_of(row: JobRow) -> str:
    """The name of a job for people."""
    return row.name or f"{row.kind} {row.subject}"


def _comparison(visit: Visit, ids: list[str]) -> dict[str, Any]:
    with visit.services.database.reading() as session:
        query = select(JobRow).where(
            JobRow.id.in_(ids),
            JobRow.org_id == visit.known.org_id,
            JobRow.deleted_at.is_(None),
        )
        by_id = {row.id: row for row in session.scalars(query)}
    if missing := [each for each in ids if each not in by_id]:
        raise Problem("job_not_found", f"There is no job {missing[0]}.", param="id")
    rows = [by_id[each] for each in ids]
    compared = experiments.comparison(visit.services, rows, list(experiments.METRICS))
    curves = [
        (title_of(row), jobs.metrics(visit.services, visit.known, row.id, MAX_POINTS)["data"])
        for row in rows
    ]
    return {
        "jobs": [(row.id, title_of(row)) for row in rows],
        "numbers": compared["comparison_table"],
        "best": compared["best_experiment_id"],
        "parameters": _parameters(rows),
        "chart": overlaid_chart(curves, visit.texts),
        "samples": _samples(visit, compared["experiments"]),
    }


def _parameters(rows: list[JobRow]) -> list[dict[str, Any]]:
    """Every parameter that one of the jobs sets; those that differ come first."""
    given = [_asked_of(row) for row in rows]
    names = sorted({name for each in given for name in each})
    table: list[dict[str, Any]] = [
        {"name": name, "values": [each.get(name) for each in given]} for name in names
    ]
    for each in table:
        each["differs"] = any(value != each["values"][0] for value in each["values"])
    return sorted(table, key=lambda each: not each["differs"])


def _asked_of(row: JobRow) -> dict[str, Any]:
    return {
        "model": row.base_model or None,
        "inputs": len(row.training_files),
        "seed": row.seed,
        **row.hyperparameters,
        **row.parameters,
    }


def _samples(visit: Visit, compared: list[dict[str, Any]]) -> list[tuple[int, list[str | None]]]:
    """For each prompt, the newest sample of each experiment."""
    newest = []
    for each in compared:
        steps = pictures.samples_of(visit.services, each).steps
        newest.append(steps[-1].images if steps else ())
    count = max((len(each) for each in newest), default=0)
    return [
        (number + 1, [each[number] if number < len(each) else None for each in newest])
        for number in range(count)
    ]
