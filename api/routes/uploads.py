"""Uploads in parts: through the API, or straight to S3 with the addresses of the answer."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select, update
from starlette.concurrency import run_in_threadpool

from api import views
from api.gate.guard import Called, GuardedRoute, Served, needs
from api.gate.intake import Form, ToS3, plain_name
from api.gate.keys import TRAIN, Caller, new_id
from api.gate.limits import limit_of, require_room, take_create
from api.gate.once import Once
from api.gate.problems import Problem
from api.routes.files import PURPOSES
from api.services import Services
from api.store.database import Writing, now
from api.store.tables import FileRow, UploadPartRow, UploadRow
from jobs.addresses import S3Location

router = APIRouter(prefix="/v1/uploads", tags=["uploads"], route_class=GuardedRoute)
MAX_BYTES = 64 * 1024**3
MAX_PARTS = 1000
PART_BYTES = 64 * 1024**2
MAX_PART_BYTES = 64 * 1024**2
EXPIRES_SECONDS = 3600 * 24
_FORM = {
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["data"],
                "properties": {"data": {"type": "string", "format": "binary"}},
            }
        }
    },
    "required": True,
}


class UploadOrder(BaseModel):
    """A file that will come in parts."""

    model_config = ConfigDict(extra="forbid")

    filename: Annotated[str, Field(min_length=1, max_length=255)]
    bytes: Annotated[int, Field(ge=1, le=MAX_BYTES)]
    mime_type: Annotated[str, Field(max_length=255)] = "application/octet-stream"
    purpose: str = "fine-tune"
    expires_after: dict[str, Any] | None = None


class UploadEnd(BaseModel):
    """The parts of an upload, in their order."""

    model_config = ConfigDict(extra="forbid")

    part_ids: Annotated[
        list[Annotated[str, Field(max_length=64)]] | None,
        Field(
            max_length=MAX_PARTS,
            description="Parts that came through the API. Leave it out, or send an empty list, if "
            "all parts went straight to S3.",
        ),
    ] = None
    md5: Annotated[str | None, Field(max_length=64)] = None


def _shown(
    services: Services, row: UploadRow, file: FileRow | None = None, *, with_parts: bool = False
) -> dict[str, Any]:
    place = S3Location(row.bucket, row.key)
    shown: dict[str, Any] = {
        "id": row.id,
        "object": "upload",
        "bytes": row.bytes,
        "created_at": int(row.created_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": row.status,
        "expires_at": int(row.expires_at),
        "file": views.file(file) if file else None,
        "part_bytes": row.part_bytes,
    }
    if with_parts:
        count = -(-row.bytes // row.part_bytes)
        shown["parts"] = [
            {
                "number": number,
                "method": "PUT",
                "url": services.uploads.part_address(
                    place, row.s3_upload_id, number, seconds=EXPIRES_SECONDS
                ),
            }
            for number in range(1, count + 1)
        ]
    return shown


@router.post("", openapi_extra=needs(TRAIN), operation_id="create_upload")
def create_upload(
    order: UploadOrder, request: Request, services: Served, caller: Called
) -> dict[str, Any]:
    """Begin an upload. `parts` of the answer has an address on S3 for each part of `part_bytes`."""
    if order.purpose not in PURPOSES:
        raise Problem(
            "invalid_parameter",
            f"purpose: must be one of {', '.join(PURPOSES)}.",
            param="purpose",
        )
    once = Once.of(request, caller, request.state.raw_body)
    with services.database.reading() as session:
        if known := once.answer(session):
            return known
    quota = services.settings.api_max_storage_bytes
    per_minute = services.settings.api_creates_per_minute

    def admit(session: Writing) -> None:
        org = caller.org_id
        take_create(session, org, limit_of(session, org, "creates_per_minute", per_minute))
        require_room(session, org, order.bytes, limit_of(session, org, "storage_bytes", quota))

    services.database.write(admit)
    file_id = new_id("file-")
    place = services.file_at(caller.org_id, file_id)
    row = UploadRow(
        id=new_id("upload_"),
        org_id=caller.org_id,
        file_id=file_id,
        filename=plain_name(order.filename),
        bytes=order.bytes,
        purpose=order.purpose,
        content_type=order.mime_type,
        bucket=place.bucket,
        key=place.key,
        s3_upload_id=services.uploads.begin(place, "application/octet-stream"),
        part_bytes=max(PART_BYTES, -(-order.bytes // MAX_PARTS)),
        status="pending",
        created_at=now(),
        expires_at=now() + EXPIRES_SECONDS,
    )

    def insert(session: Writing) -> dict[str, Any]:
        if known := once.answer(session):
            return known
        session.merge(row)
        answer = _shown(services, row, with_parts=True)
        once.keep(session, answer)
        return answer

    return services.database.write(insert)


def _found(services: Services, caller: Caller, upload_id: str) -> UploadRow:
    with services.database.reading() as session:
        row = session.scalar(
            select(UploadRow).where(UploadRow.id == upload_id, UploadRow.org_id == caller.org_id)
        )
    if row is None:
        raise Problem("upload_not_found", f"There is no upload {upload_id}.", param="upload_id")
    return row


def _pending(services: Services, caller: Caller, upload_id: str) -> UploadRow:
    row = _found(services, caller, upload_id)
    if row.status != "pending":
        raise Problem("upload_has_ended", f"The upload {upload_id} is {row.status}.")
    return row


@router.post(
    "/{upload_id}/parts",
    openapi_extra=needs(TRAIN) | {"requestBody": _FORM},
    operation_id="add_upload_part",
)
async def add_part(
    upload_id: str, request: Request, services: Served, caller: Called
) -> dict[str, Any]:
    """Send a part through the API, of at most 64 MiB."""
    row = await run_in_threadpool(_pending, services, caller, upload_id)
    # The part is kept as an object until the upload ends: its place is known only then.
    part_id = new_id("part_")
    place = S3Location(row.bucket, f"{row.key}.parts/{part_id}")

    def open_part(_: str, content_type: str) -> tuple[str, ToS3]:
        return part_id, ToS3(services.s3, services.uploads, place, content_type, MAX_PART_BYTES)

    form = Form(request.headers.get("content-type", ""), open_part, 2 * MAX_PART_BYTES)
    await form.read(request.stream())
    if len(form.files) != 1:
        await form.drop()
        raise Problem(
            "invalid_parameter", "data: the form must have one part `data`.", param="data"
        )
    received = form.files[0]

    def insert(session: Writing) -> dict[str, Any]:
        session.add(
            UploadPartRow(
                id=part_id,
                upload_id=row.id,
                number=0,
                bytes=received.size,
                etag=received.sha256,
                created_at=now(),
            )
        )
        return {
            "id": part_id,
            "object": "upload.part",
            "created_at": int(now()),
            "upload_id": row.id,
        }

    try:
        return await run_in_threadpool(services.database.write, insert)
    except BaseException:
        await form.drop()
        raise


@router.post("/{upload_id}/complete", openapi_extra=needs(TRAIN), operation_id="complete_upload")
def complete_upload(
    upload_id: str, services: Served, caller: Called, end: UploadEnd | None = None
) -> dict[str, Any]:
    """Make the file of its parts."""
    row = _pending(services, caller, upload_id)
    part_ids = (end.part_ids if end else None) or []
    place = S3Location(row.bucket, row.key)
    if part_ids:
        _put_together(services, row, part_ids)
    else:
        parts = services.uploads.parts(place, row.s3_upload_id)
        _require_bytes(row, sum(size for _, _, size in parts))
        services.uploads.complete(
            place, row.s3_upload_id, [(number, etag) for number, etag, _ in parts]
        )

    def insert(session: Writing) -> tuple[UploadRow, FileRow]:
        session.execute(
            update(UploadRow)
            .where(UploadRow.id == row.id, UploadRow.status == "pending")
            .values(status="completed")
        )
        file = session.get(FileRow, row.file_id)
        if file is None:
            file = FileRow(
                id=row.file_id,
                org_id=row.org_id,
                filename=row.filename,
                bytes=row.bytes,
                content_type=row.content_type,
                purpose=row.purpose,
                bucket=row.bucket,
                key=row.key,
                status="processed",
                created_at=now(),
            )
            session.add(file)
        return session.get_one(UploadRow, row.id, populate_existing=True), file

    done, file = services.database.write(insert)
    return _shown(services, done, file)


def _require_bytes(row: UploadRow, size: int) -> None:
    if size != row.bytes:
        raise Problem(
            "invalid_parameter",
            f"bytes: the parts have {size:,} bytes, and the upload was announced with "
            f"{row.bytes:,}.",
            param="bytes",
        )


def _put_together(services: Services, row: UploadRow, part_ids: list[str]) -> None:
    """Make the object of parts that came through the API, in the client's order."""
    with services.database.reading() as session:
        known = {
            part.id: part
            for part in session.scalars(
                select(UploadPartRow).where(UploadPartRow.upload_id == row.id)
            )
        }
    for part_id in part_ids:
        if part_id not in known:
            raise Problem(
                "invalid_parameter",
                f"part_ids: the upload {row.id} has no part {part_id}.",
                param="part_ids",
            )
    _require_bytes(row, sum(known[part_id].bytes for part_id in part_ids))
    place = S3Location(row.bucket, row.key)
    # S3 wants parts of 5 MiB at least, so smaller ones are joined.
    pending = bytearray()
    numbers: list[tuple[int, str]] = []
    for index, part_id in enumerate(part_ids):
        source = S3Location(row.bucket, f"{row.key}.parts/{part_id}")
        stored = services.s3.read(source, max_bytes=MAX_PART_BYTES)
        if hashlib.sha256(stored.body).hexdigest() != known[part_id].etag:
            raise Problem("invalid_parameter", f"part_ids: the part {part_id} is damaged.")
        pending += stored.body
        if len(pending) >= PART_BYTES // 4 or index == len(part_ids) - 1:
            number = len(numbers) + 1
            etag = services.uploads.put_part(place, row.s3_upload_id, number, bytes(pending))
            numbers.append((number, etag))
            pending.clear()
    services.uploads.complete(place, row.s3_upload_id, numbers)
    services.s3.delete(row.bucket, [f"{row.key}.parts/{part_id}" for part_id in known])


@router.post("/{upload_id}/cancel", openapi_extra=needs(TRAIN), operation_id="cancel_upload")
def cancel_upload(upload_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """Drop an upload and its parts."""
    row = _pending(services, caller, upload_id)
    place = S3Location(row.bucket, row.key)
    services.uploads.abort(place, row.s3_upload_id)
    objects = services.s3.list_objects(row.bucket, f"{row.key}.parts/")
    services.s3.delete(row.bucket, [info.key for info in objects])

    def act(session: Writing) -> UploadRow:
        found = session.get_one(UploadRow, row.id)
        found.status = "cancelled"
        return found

    return _shown(services, services.database.write(act))
