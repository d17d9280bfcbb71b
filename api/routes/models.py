"""Models that jobs have made: list, show, download, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse
from sqlalchemy import select

from api import views
from api.gate.guard import Called, GuardedRoute, Served, needs
from api.gate.keys import READ, TRAIN, Caller
from api.gate.paging import Paged
from api.gate.problems import Problem
from api.life.steering import audit
from api.services import Services
from api.store.database import Writing, now
from api.store.tables import ModelRow
from jobs.addresses import S3Location

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=GuardedRoute)
LINK_SECONDS = 600


def found_model(services: Services, caller: Caller, model_id: str) -> ModelRow:
    """A model of the caller's organisation.

    Raises:
        Problem: There is none.
    """
    with services.database.reading() as session:
        row = session.scalar(
            select(ModelRow).where(
                ModelRow.id == model_id,
                ModelRow.org_id == caller.org_id,
                ModelRow.deleted_at.is_(None),
            )
        )
    if row is None:
        raise Problem("model_not_found", f"There is no model {model_id}.", param="model")
    return row


@router.get("", openapi_extra=needs(READ), operation_id="list_models")
def list_models(page: Paged, services: Served, caller: Called) -> dict[str, Any]:
    """List models, newest first."""
    query = select(ModelRow).where(ModelRow.org_id == caller.org_id, ModelRow.deleted_at.is_(None))
    with services.database.reading() as session:
        rows, has_more = page.rows(session, query, ModelRow)
    return views.page([views.model(row) for row in rows], has_more=has_more)


@router.get("/{model}", openapi_extra=needs(READ), operation_id="get_model")
def get_model(model: str, services: Served, caller: Called) -> dict[str, Any]:
    """Show a model and its files."""
    row = found_model(services, caller, model)
    files = [
        {"name": info.key.removeprefix(row.prefix), "bytes": info.size}
        for info in services.s3.list_objects(row.bucket, row.prefix)
    ]
    return views.model(row) | {"files": files, "main_file": row.main_file}


@router.get(
    "/{model}/content",
    openapi_extra=needs(READ),
    operation_id="get_model_content",
    status_code=307,
    response_class=RedirectResponse,
)
def get_content(
    model: str,
    request: Request,
    services: Served,
    caller: Called,
    file: Annotated[
        str | None,
        Query(max_length=255, description="A file of the model; by default the weights."),
    ] = None,
) -> RedirectResponse:
    """Download a file of a model: the answer leads to an address on S3."""
    row = found_model(services, caller, model)
    name = file or row.main_file
    names = {
        info.key.removeprefix(row.prefix)
        for info in services.s3.list_objects(row.bucket, row.prefix)
    }
    if name not in names:
        raise Problem("file_not_found", f"file: the model has no file {name}.", param="file")
    act = "model.download"
    services.database.write(lambda session: audit(session, caller, act, row.id, request))
    address = services.uploads.download_address(
        S3Location(row.bucket, row.prefix + name), name.rpartition("/")[2], seconds=LINK_SECONDS
    )
    return RedirectResponse(address, 307)


@router.delete("/{model}", openapi_extra=needs(TRAIN), operation_id="delete_model")
def delete_model(model: str, request: Request, services: Served, caller: Called) -> dict[str, Any]:
    """Delete a model and its files."""
    row = found_model(services, caller, model)
    keys = [info.key for info in services.s3.list_objects(row.bucket, row.prefix)]
    services.s3.delete(row.bucket, keys)

    def act(session: Writing) -> None:
        session.get_one(ModelRow, row.id).deleted_at = now()
        audit(session, caller, "model.delete", row.id, request)

    services.database.write(act)
    return {"id": row.id, "object": "model", "deleted": True}
