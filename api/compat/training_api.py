"""The dialect of a training API: `/api/data`, `/api/train`, `/api/experiments`, `/api/export`.

Thin translations of the API's own routes; docs/api.md has the table.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from api.compat import kinds
from api.gate.guard import Called, GuardedRoute, Served, needs
from api.gate.keys import READ, TRAIN, Caller
from api.gate.problems import Problem
from api.life import steering
from api.life.orders import JobOrder, not_a_file
from api.routes import experiments
from api.routes.jobs import create, found, metrics
from api.services import Services
from api.store import jobs as store
from api.store.tables import JobRow

router = APIRouter(prefix="/api", tags=["training API"], route_class=GuardedRoute)
_STATUS = {
    "validating_files": "pending",
    "queued": "queued",
    "running": "running",
    "pausing": "running",
    "paused": "queued",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}
_OF_THEIRS = {
    theirs: [ours for ours, name in _STATUS.items() if name == theirs]
    for theirs in _STATUS.values()
}
_NAMES = {
    "num_epochs": "epochs",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "save_steps": "checkpoint_steps",
}
"""Their parameters under our names, where the two differ."""


class Config(BaseModel):
    """The configuration of a training, with the names of the dialect."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_name: Annotated[str, Field(max_length=200)]
    train_data_path: Annotated[str, Field(max_length=1024)]
    val_data_path: Annotated[str | None, Field(max_length=1024)] = None


class TrainingOrder(BaseModel):
    """An order."""

    config: Config
    experiment_name: Annotated[str | None, Field(max_length=200)] = None
    tags: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=20)] = Field(
        default_factory=list
    )


class ModelsToCompare(BaseModel):
    """Experiments to compare."""

    experiment_ids: Annotated[
        list[Annotated[str, Field(max_length=64)]], Field(min_length=2, max_length=10)
    ]
    metrics: list[str] | None = None


class Anything(BaseModel):
    """A body that is not read before the kind of job exists."""

    model_config = ConfigDict(extra="allow")


# ---- training ------------------------------------------------------------------------------------


def _kind_of(model_name: str) -> str:
    return kinds.VISION if "llava" in model_name.lower() else kinds.CHAT


@router.post("/train/start", openapi_extra=needs(TRAIN), operation_id="train_start")
def start(
    order: TrainingOrder, request: Request, services: Served, caller: Called
) -> dict[str, Any]:
    """Start a training. Paths are the ids of uploaded files."""
    kind = _kind_of(order.config.model_name)
    kinds.require(services, kind, f"Training {order.config.model_name}")
    for name in ("train_data_path", "val_data_path"):
        value = getattr(order.config, name)
        if value is not None and not value.startswith("file-"):
            raise not_a_file(value, f"config.{name}")
    given = {
        _NAMES.get(name, name): value for name, value in (order.config.model_extra or {}).items()
    }
    job_order = JobOrder(
        kind=kind,
        model=order.config.model_name,
        training_file=order.config.train_data_path,
        validation_file=order.config.val_data_path,
        parameters=kinds.parameters_of(services, kind, given),
        name=order.experiment_name,
        tags=order.tags,
    )
    job = create(services, caller, job_order, request)
    with services.database.reading() as session:
        seconds = store.mean_seconds(session, kind)
    used = set(job_order.parameters)
    return {
        "success": True,
        "job_id": job["id"],
        "message": "The job was accepted and waits for its turn.",
        "estimated_duration_minutes": None if seconds is None else round(seconds / 60, 1),
        "ignored": sorted(
            name for name in (order.config.model_extra or {}) if _NAMES.get(name, name) not in used
        ),
    }


def _progress(row: JobRow) -> dict[str, Any]:
    progress = row.progress

    def number(*names: str) -> Any:
        found_ = (progress[name] for name in names if isinstance(progress.get(name), (int, float)))
        return next(found_, None)

    percent = 100.0 if row.status == "succeeded" else float(number("progress_percent") or 0.0)
    return {
        "job_id": row.id,
        "status": _STATUS[row.status],
        "current_epoch": number("current_epoch", "epoch") or 0,
        "total_epochs": number("total_epochs") or 0,
        "current_step": number("step") or 0,
        "total_steps": number("total_steps") or 0,
        "progress_percentage": percent,
        "eta_seconds": number("estimated_seconds") if row.status == "running" else None,
        "train_loss": row.loss,
        "eval_loss": number("validation_loss"),
        "learning_rate": number("learning_rate"),
        "created_at": _time(row.created_at),
        "started_at": _time(row.started_at),
        "completed_at": _time(row.finished_at),
        "error_message": row.error_message,
    }


def _time(value: float | None) -> str | None:
    if value is None:
        return None
    return datetime.datetime.fromtimestamp(value, datetime.UTC).isoformat()


@router.get("/train/jobs", openapi_extra=needs(READ), operation_id="train_jobs")
def jobs(
    services: Served,
    caller: Called,
    status: (
        Literal["pending", "queued", "running", "completed", "failed", "cancelled"] | None
    ) = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> dict[str, Any]:
    """List trainings, newest first."""
    query = store.visible(caller.org_id)
    if status is not None:
        query = query.where(JobRow.status.in_(_OF_THEIRS[status]))
    query = query.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)
    with services.database.reading() as session:
        shown = [_progress(row) for row in session.scalars(query)]
    return {"jobs": shown, "total": len(shown)}


@router.get("/train/{job_id}/status", openapi_extra=needs(READ), operation_id="train_status")
def job_status(job_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """Show the progress of a training."""
    with services.database.reading() as session:
        return _progress(found(session, caller, job_id))


@router.post("/train/{job_id}/cancel", openapi_extra=needs(TRAIN), operation_id="train_cancel")
def cancel(job_id: str, request: Request, services: Served, caller: Called) -> dict[str, Any]:
    """Cancel a training."""
    steering.cancel(services, caller, job_id, request)
    return {"success": True, "job_id": job_id, "message": "The job is cancelled, or will be."}


# ---- experiments ---------------------------------------------------------------------------------


def _experiment(row: JobRow) -> dict[str, Any]:
    return {
        "experiment_id": row.id,
        "name": row.name,
        "tags": row.tags,
        "model_name": row.base_model,
        "config": row.parameters,
        "metrics": experiments.numbers(row),
        **_progress(row),
    }


def _experiments(
    services: Served,
    caller: Called,
    status: (
        Literal["pending", "queued", "running", "completed", "failed", "cancelled"] | None
    ) = None,
    tag: Annotated[str | None, Query(max_length=64)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    sort_by: Literal["created_at", "duration", "best_val_loss"] = "created_at",
) -> dict[str, Any]:
    """List experiments."""
    statuses = tuple(_OF_THEIRS[status]) if status else ()
    filters = store.Filters(statuses=statuses, tag=tag)
    sort = "best_validation_loss" if sort_by == "best_val_loss" else sort_by
    query = filters.applied(store.visible(caller.org_id), services.database.engine.dialect.name)
    order = experiments.order_by(sort)
    with services.database.reading() as session:
        rows = session.scalars(query.order_by(order, JobRow.id).limit(limit))
        shown = [_experiment(row) for row in rows]
    return {"experiments": shown, "total": len(shown)}


router.get("/experiments", openapi_extra=needs(READ), operation_id="dialect_experiments")(
    _experiments
)
router.get(
    "/experiments/",
    openapi_extra=needs(READ),
    operation_id="dialect_experiments_slash",
    include_in_schema=False,
)(_experiments)


@router.post(
    "/experiments/compare", openapi_extra=needs(READ), operation_id="dialect_experiments_compare"
)
def compare(order: ModelsToCompare, services: Served, caller: Called) -> dict[str, Any]:
    """Compare 2 to 10 experiments."""
    with services.database.reading() as session:
        rows = [found(session, caller, each) for each in dict.fromkeys(order.experiment_ids)]
    names = order.metrics or list(experiments.METRICS)
    table = experiments.comparison(services, rows, names)
    return {
        "experiments": [_experiment(row) for row in rows],
        "comparison_table": table["comparison_table"],
        "best_experiment_id": table["best_experiment_id"],
    }


@router.get(
    "/experiments/{experiment_id}", openapi_extra=needs(READ), operation_id="dialect_experiment"
)
def get_experiment(experiment_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """Show an experiment."""
    with services.database.reading() as session:
        return _experiment(found(session, caller, experiment_id))


@router.get(
    "/experiments/{experiment_id}/metrics",
    openapi_extra=needs(READ),
    operation_id="dialect_experiment_metrics",
)
def get_metrics(experiment_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """The measured numbers of an experiment, by step."""
    points = metrics(services, caller, experiment_id, 2000)["data"]
    return {"experiment_id": experiment_id, "metrics": points}


@router.delete(
    "/experiments/{experiment_id}",
    openapi_extra=needs(TRAIN),
    operation_id="dialect_experiment_delete",
)
def delete_experiment(
    experiment_id: str, request: Request, services: Served, caller: Called
) -> dict[str, Any]:
    """Delete an experiment that has ended."""
    experiments.remove(services, caller, experiment_id, request)
    return {"success": True, "message": f"The experiment {experiment_id} was deleted."}


# ---- data and exports: refused with a sentence, until their kinds of job exist -------------------


@router.post("/data/upload", openapi_extra=needs(TRAIN), operation_id="data_upload")
def data_upload() -> dict[str, Any]:
    """Upload a data set. Not offered yet."""
    raise kinds.not_offered(kinds.DATA, "Preparing a data set")


@router.post("/data/convert", openapi_extra=needs(TRAIN), operation_id="data_convert")
def data_convert(body: Anything) -> dict[str, Any]:
    """Convert a data set. Not offered yet."""
    raise _refused(body)


@router.post("/data/validate", openapi_extra=needs(TRAIN), operation_id="data_validate")
def data_validate(body: Anything) -> dict[str, Any]:
    """Validate a data set. Not offered yet."""
    raise _refused(body)


@router.post("/data/split", openapi_extra=needs(TRAIN), operation_id="data_split")
def data_split(body: Anything) -> dict[str, Any]:
    """Split a data set. Not offered yet."""
    raise _refused(body)


def _refused(body: Anything) -> Problem:
    for name, value in (body.model_extra or {}).items():
        if name.endswith(("_path", "_dir")) and isinstance(value, str) and "/" in value:
            return not_a_file(value, name)
    return kinds.not_offered(kinds.DATA, "Preparing a data set")


@router.get("/export/list", openapi_extra=needs(READ), operation_id="export_list")
def export_list(caller: Called) -> dict[str, Any]:
    """List exports. There are none yet."""
    del caller
    return {"exports": [], "total": 0}


@router.get(
    "/export/download_file/{export_id}", openapi_extra=needs(READ), operation_id="export_file"
)
def export_file(export_id: str, caller: Called) -> dict[str, Any]:
    """Download an export. There are none yet."""
    del caller
    raise Problem("file_not_found", f"There is no export {export_id}.", param="export_id")


def _refused_export(services: Services, caller: Caller, job_id: str) -> Problem:
    with services.database.reading() as session:
        row = found(session, caller, job_id)
    model = ""
    if row.model_id:
        model = f" Download the model: GET /v1/models/{row.model_id}/content."
    return Problem(
        "kind_not_offered",
        f"Exports need jobs of the kind {kinds.EXPORT}, which this server does not do.{model}",
    )


@router.post("/export/{job_id}", openapi_extra=needs(TRAIN), operation_id="export_start")
def export_start(
    job_id: str, services: Served, caller: Called, body: Anything | None = None
) -> dict[str, Any]:
    """Export a model. Not offered yet."""
    del body
    raise _refused_export(services, caller, job_id)


@router.get("/export/{job_id}/download", openapi_extra=needs(READ), operation_id="export_download")
def export_download(job_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """Show an export. Not offered yet."""
    raise _refused_export(services, caller, job_id)


@router.delete("/export/{export_id}", openapi_extra=needs(TRAIN), operation_id="export_delete")
def export_delete(export_id: str, caller: Called) -> dict[str, Any]:
    """Delete an export. There are none yet."""
    del caller
    raise Problem("file_not_found", f"There is no export {export_id}.", param="export_id")
