"""The list of jobs, one job, and the acts on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import func, select

from api.gate.keys import READ, TRAIN
from api.gate.paging import Page
from api.gate.problems import Problem
from api.life import steering
from api.page import pictures, rendering, words
from api.page.curves import loss_chart
from api.page.gate import PageRoute, local_path, page_scope
from api.page.visit import Visit, Visited
from api.routes import events, jobs, models
from api.store.jobs import Filters
from api.store.tables import ENDED, OPEN, EventRow
from reports import verdict

router = APIRouter(route_class=PageRoute, include_in_schema=False)
PER_PAGE = 25
EVENTS_SHOWN = 50
_SHOWN: dict[str, tuple[str, ...]] = {
    "all": (),
    "open": OPEN,
    "failed": ("failed",),
    "ended": ENDED,
}


@router.get("/")
def home() -> Response:
    """The list of jobs."""
    return RedirectResponse("/jobs", 303)


@router.get("/jobs", openapi_extra=page_scope(READ))
def list_jobs(
    visit: Visited,
    show: Literal["all", "open", "failed", "ended"] = "all",
    after: Annotated[str | None, Query(max_length=255)] = None,
) -> Response:
    """The jobs of the organisation, newest first."""
    cursor = newest_event(visit)
    found = jobs.list_jobs(
        visit.services, visit.known, Page(PER_PAGE, after, "desc"), Filters(statuses=_SHOWN[show])
    )
    return rendering.page(
        visit,
        "jobs.html.j2",
        jobs=[words.shown(each, visit.texts) for each in found["data"]],
        more=found["last_id"] if found["has_more"] else None,
        show=show,
        choices=tuple(_SHOWN),
        is_first=after is None,
        cursor=cursor,
    )


def newest_event(visit: Visit, job_id: str | None = None) -> int:
    """The id of the newest event. It is read first: later news comes through the stream."""
    query = select(func.max(EventRow.id)).where(EventRow.org_id == visit.known.org_id)
    if job_id is not None:
        query = query.where(EventRow.job_id == job_id)
    with visit.services.database.reading() as session:
        return session.scalar(query) or 0


@router.get("/live", openapi_extra=page_scope(READ))
async def follow_all(
    request: Request, visit: Visited, after: Annotated[str | None, Query(max_length=30)] = None
) -> Response:
    """The events of all jobs, as they happen."""
    return await events.stream(request, visit.services, visit.known, None, after)


@router.get("/jobs/{job_id}", openapi_extra=page_scope(READ))
def show_job(visit: Visited, job_id: str) -> Response:
    """One job."""
    services, caller = visit.services, visit.known
    cursor = newest_event(visit, job_id)
    job = jobs.show(services, caller, job_id)
    points = jobs.metrics(services, caller, job_id, jobs.MAX_POINTS)["data"]
    log = events.page(services, caller, job_id, EVENTS_SHOWN, None)
    samples = pictures.samples_of(services, job)
    report = _report(visit, job)
    return rendering.page(
        visit,
        "job.html.j2",
        job=words.shown(job, visit.texts),
        chart=loss_chart(points, visit.texts),
        points=len(points),
        log=log["data"],
        samples=samples,
        files=_files(visit, job),
        verdict=_verdict(job, report),
        delivered=_delivered_step(report),
        cursor=cursor,
    )


def _report(visit: Visit, job: dict[str, Any]) -> dict[str, Any]:
    """The report of a job; empty if there is none."""
    if job["status"] != "succeeded":
        return {}
    try:
        return jobs.report(visit.services, visit.known, job["id"])
    except Problem:
        return {}


def _verdict(job: dict[str, Any], report: dict[str, Any]) -> verdict.TrainingVerdict | None:
    """The verdict of a style's report; None for a report that has other members."""
    if job["kind"] != "style" or not report:
        return None
    try:
        return verdict.of_style(report, ())
    except (LookupError, TypeError, ValueError):
        return None


def _delivered_step(report: dict[str, Any]) -> int | None:
    """The step of the checkpoint that became the model."""
    for each in report.get("probes", ()):
        if each.get("epoch") == report.get("delivered_epoch"):
            return int(each["step"]) if isinstance(each.get("step"), int) else None
    return None


def _files(visit: Visit, job: dict[str, Any]) -> list[dict[str, Any]]:
    """The files of the job's model, each with its purpose."""
    if job["fine_tuned_model"] is None:
        return []
    try:
        model = models.get_model(job["fine_tuned_model"], visit.services, visit.known)
    except Problem:
        return []  # the model was deleted
    texts = visit.texts
    return [
        each
        | {
            "purpose": texts.known(f"file.{each['name']}", "file.other"),
            "is_main": each["name"] == model["main_file"],
        }
        for each in model["files"]
    ]


@router.get("/jobs/{job_id}/live", openapi_extra=page_scope(READ))
async def follow_job(
    request: Request,
    visit: Visited,
    job_id: str,
    after: Annotated[str | None, Query(max_length=30)] = None,
) -> Response:
    """The events of one job, as they happen."""
    return await events.stream(request, visit.services, visit.known, job_id, after)


@router.get("/jobs/{job_id}/files/{name}", openapi_extra=page_scope(READ))
def download(request: Request, visit: Visited, job_id: str, name: str) -> Response:
    """Download a file of the job's model."""
    job = jobs.show(visit.services, visit.known, job_id)
    model = job["fine_tuned_model"] or ""
    return models.get_content(model, request, visit.services, visit.known, name)


@router.get("/jobs/{job_id}/samples/{claim}/{step}/{number}", openapi_extra=page_scope(READ))
def sample(visit: Visited, job_id: str, claim: int, step: int, number: int) -> Response:
    """A small sample image of a checkpoint."""
    job = jobs.show(visit.services, visit.known, job_id)
    return pictures.sample_image(visit.services, job, claim, step, number)


@router.post("/jobs/{job_id}/{act}", openapi_extra=page_scope(TRAIN))
def steer(
    request: Request, visit: Visited, job_id: str, act: Literal["cancel", "pause", "resume"]
) -> Response:
    """Cancel, pause or resume a job."""
    do = {"cancel": steering.cancel, "pause": steering.pause, "resume": steering.resume}[act]
    do(visit.services, visit.known, job_id, request)
    return RedirectResponse(local_path(visit.fields.get("next")), 303)
