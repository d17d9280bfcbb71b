"""Files: images and data sets that jobs are ordered with."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from api import views
from api.gate.guard import Called, GuardedRoute, Served, needs
from api.gate.intake import Form, Received, ToS3, too_large
from api.gate.keys import READ, TRAIN, Caller, new_id
from api.gate.limits import limit_of, require_room, take_create
from api.gate.once import Once
from api.gate.paging import Paged
from api.gate.problems import Problem
from api.life.steering import audit
from api.services import Services
from api.store.database import Writing, now
from api.store.tables import FileRow
from jobs.addresses import S3Location

router = APIRouter(prefix="/v1/files", tags=["files"], route_class=GuardedRoute)
PURPOSES = ("fine-tune", "vision", "user_data", "evals", "assistants", "batch")
LINK_SECONDS = 600
FORM_BYTES = 64 * 1024
"""Bytes of a form that are not its files'."""
_FORM = {
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file"],
                "properties": {
                    "file": {
                        "type": "string",
                        "format": "binary",
                        "description": "May be repeated: then the answer is a list.",
                    },
                    "purpose": {"type": "string", "enum": list(PURPOSES)},
                },
            }
        }
    },
    "required": True,
}


@router.post("", openapi_extra=needs(TRAIN) | {"requestBody": _FORM}, operation_id="create_file")
async def create_file(request: Request, services: Served, caller: Called) -> dict[str, Any]:
    """Upload a file, or many in one form."""
    form = await receive_form(request, services, caller)
    try:
        purpose = form.fields.get("purpose", "fine-tune")
        if purpose not in PURPOSES:
            raise Problem(
                "invalid_parameter",
                f"purpose: must be one of {', '.join(PURPOSES)}.",
                param="purpose",
            )
        if not form.files:
            raise Problem("invalid_parameter", "file: the form has no file.", param="file")
        return await run_in_threadpool(_keep, request, services, caller, form.files, purpose)
    except BaseException:
        await form.drop()
        raise


async def receive_form(request: Request, services: Services, caller: Caller) -> Form:
    """Read the files of a form into S3, under the limits of the organisation.

    The caller keeps the files in the database, or drops the form.

    Raises:
        Problem: It is not a form, a file is too large, or the organisation has no room.
    """
    declared = request.headers.get("content-length", "")
    most = services.settings.api_max_file_bytes
    size = int(declared) if declared.isdigit() else 0
    if size > most + FORM_BYTES:
        raise too_large(most)
    await run_in_threadpool(_admit, services, caller, max(0, size - FORM_BYTES))

    def open_file(_: str, content_type: str) -> tuple[str, ToS3]:
        file_id = new_id("file-")
        place = services.file_at(caller.org_id, file_id)
        return file_id, ToS3(services.s3, services.uploads, place, content_type, most)

    form = Form(request.headers.get("content-type", ""), open_file, most + FORM_BYTES)
    await form.read(request.stream())
    return form


def _admit(services: Services, caller: Caller, declared: int) -> None:
    """Check limits before the body is read."""
    quota = services.settings.api_max_storage_bytes

    def act(session: Writing) -> None:
        per_minute = services.settings.api_creates_per_minute
        most = limit_of(session, caller.org_id, "creates_per_minute", per_minute)
        take_create(session, caller.org_id, most)
        room = limit_of(session, caller.org_id, "storage_bytes", quota)
        require_room(session, caller.org_id, declared, room)

    services.database.write(act)


def _keep(
    request: Request, services: Services, caller: Caller, files: list[Received], purpose: str
) -> dict[str, Any]:
    content = "\n".join(f"{each.filename} {each.sha256}" for each in files)
    once = Once.of(request, caller, f"{purpose}\n{content}".encode())

    def insert(session: Writing) -> tuple[dict[str, Any], bool]:
        if known := once.answer(session):
            return known, False
        quota = limit_of(
            session, caller.org_id, "storage_bytes", services.settings.api_max_storage_bytes
        )
        require_room(session, caller.org_id, sum(each.size for each in files), quota)
        rows = [row_of(services, caller, each, purpose) for each in files]
        session.add_all(rows)
        shown = [views.file(row) for row in rows]
        answer = shown[0] if len(shown) == 1 else views.page(shown, has_more=False)
        once.keep(session, answer)
        return answer, True

    answer, is_new = services.database.write(insert)
    if not is_new:
        for each in files:
            place = services.file_at(caller.org_id, each.file_id)
            services.s3.delete(place.bucket, [place.key])
    return answer


def row_of(services: Services, caller: Caller, received: Received, purpose: str) -> FileRow:
    """The row of a file that has arrived."""
    place = services.file_at(caller.org_id, received.file_id)
    return FileRow(
        id=received.file_id,
        org_id=caller.org_id,
        filename=received.filename,
        bytes=received.size,
        sha256=received.sha256,
        content_type=received.content_type,
        purpose=purpose,
        bucket=place.bucket,
        key=place.key,
        status="processed",
        created_at=now(),
    )


def found_file(services: Services, caller: Caller, file_id: str) -> FileRow:
    """A file of the caller's organisation.

    Raises:
        Problem: There is none, or it was deleted.
    """
    with services.database.reading() as session:
        row = session.scalar(
            select(FileRow).where(FileRow.id == file_id, FileRow.org_id == caller.org_id)
        )
    if row is None:
        raise Problem("file_not_found", f"There is no file {file_id}.", param="file_id")
    if row.deleted_at is not None:
        raise Problem("file_deleted", f"The file {file_id} was deleted.", param="file_id")
    return row


@router.get("", openapi_extra=needs(READ), operation_id="list_files")
def list_files(
    page: Paged,
    services: Served,
    caller: Called,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """List files, newest first."""
    query = select(FileRow).where(FileRow.org_id == caller.org_id, FileRow.deleted_at.is_(None))
    if purpose is not None:
        query = query.where(FileRow.purpose == purpose)
    with services.database.reading() as session:
        rows, has_more = page.rows(session, query, FileRow)
    return views.page([views.file(row) for row in rows], has_more=has_more)


@router.get("/{file_id}", openapi_extra=needs(READ), operation_id="get_file")
def get_file(file_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """Show a file."""
    return views.file(found_file(services, caller, file_id))


@router.get(
    "/{file_id}/content",
    openapi_extra=needs(READ),
    operation_id="get_file_content",
    status_code=307,
    response_class=RedirectResponse,
)
def get_content(
    file_id: str, request: Request, services: Served, caller: Called
) -> RedirectResponse:
    """Download a file: the answer leads to an address on S3 that is valid for ten minutes."""
    row = found_file(services, caller, file_id)
    services.database.write(
        lambda session: audit(session, caller, "file.download", row.id, request)
    )
    address = services.uploads.download_address(
        S3Location(row.bucket, row.key), row.filename, seconds=LINK_SECONDS
    )
    return RedirectResponse(address, 307)


@router.delete("/{file_id}", openapi_extra=needs(TRAIN), operation_id="delete_file")
def delete_file(file_id: str, request: Request, services: Served, caller: Called) -> dict[str, Any]:
    """Delete a file."""
    row = found_file(services, caller, file_id)
    services.s3.delete(row.bucket, [row.key])

    def act(session: Writing) -> None:
        deleted = session.get(FileRow, row.id)
        if deleted is not None and deleted.deleted_at is None:
            deleted.deleted_at = now()
            audit(session, caller, "file.delete", row.id, request)

    services.database.write(act)
    return {"id": row.id, "object": "file", "deleted": True}
