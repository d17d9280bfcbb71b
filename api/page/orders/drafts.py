"""Drafts: orders that are put together on the page, and what is known of their files.

A draft belongs to an organisation. Its files are ordinary uploaded files; small copies of its
images are next to them on S3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fastapi import Request
from sqlalchemy import delete, select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.gate.intake import Received
from api.gate.keys import Caller, new_id
from api.gate.limits import limit_of, require_room
from api.gate.problems import Problem
from api.page.visit import Visit
from api.routes.files import receive_form, row_of
from api.services import Services
from api.store.database import Writing, now
from api.store.tables import DraftRow
from jobs.addresses import S3Location

KEPT_SECONDS = 30 * 86_400.0
MAX_FILES = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """A draft that was read.

    Attributes:
        id: Its id.
        kind: The kind of job that it becomes.
        content: Its settings, and its files with the facts about them.
        job_id: The job that it became; None before that.
    """

    id: str
    kind: str
    content: dict[str, Any]
    job_id: str | None

    @property
    def files(self) -> list[dict[str, Any]]:
        """The files, in the order of their arrival."""
        return list(self.content.get("files", ()))


def create(services: Services, caller: Caller, kind: str) -> str:
    """Begin a draft. Returns its id. Old drafts of the organisation are forgotten."""
    draft_id = new_id("draft_")

    def act(session: Writing) -> None:
        old = delete(DraftRow).where(
            DraftRow.org_id == caller.org_id, DraftRow.created_at < now() - KEPT_SECONDS
        )
        session.execute(old)
        session.add(
            DraftRow(id=draft_id, org_id=caller.org_id, kind=kind, content={}, created_at=now())
        )

    services.database.write(act)
    return draft_id


def find(services: Services, caller: Caller, draft_id: str, kind: str) -> Draft:
    """A draft of the caller's organisation.

    Raises:
        Problem: There is none.
    """
    with services.database.reading() as session:
        row = _row(session, caller, draft_id, kind)
        return Draft(row.id, row.kind, row.content, row.job_id)


def newest(services: Services, caller: Caller, kind: str, limit: int = 10) -> list[Draft]:
    """The newest drafts that have not become jobs."""
    query = (
        select(DraftRow)
        .where(DraftRow.org_id == caller.org_id, DraftRow.kind == kind, DraftRow.job_id.is_(None))
        .order_by(DraftRow.created_at.desc())
        .limit(limit)
    )
    with services.database.reading() as session:
        return [Draft(row.id, row.kind, row.content, None) for row in session.scalars(query)]


def change(
    services: Services,
    caller: Caller,
    draft: Draft,
    how: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Change the content of a draft. Two changes at once follow each other.

    Raises:
        Problem: There is no such draft, or it has become a job.
    """

    def act(session: Writing) -> None:
        row = _row(session, caller, draft.id, draft.kind, lock=True)
        if row.job_id is not None:
            raise Problem("job_is_running", "This draft was started already. Begin a new one.")
        row.content = how(dict(row.content))

    services.database.write(act)


def became(services: Services, caller: Caller, draft: Draft, job_id: str) -> None:
    """Note the job that a draft became."""

    def act(session: Writing) -> None:
        _row(session, caller, draft.id, draft.kind, lock=True).job_id = job_id

    services.database.write(act)


def _row(
    session: Session, caller: Caller, draft_id: str, kind: str, *, lock: bool = False
) -> DraftRow:
    query = select(DraftRow).where(
        DraftRow.id == draft_id, DraftRow.org_id == caller.org_id, DraftRow.kind == kind
    )
    row = session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise Problem("draft_not_found", f"There is no draft {draft_id}.")
    return row


async def receive(request: Request, visit: Visit) -> list[Received]:
    """Read the files of a form into S3, under the limits of the organisation.

    Files without content are dropped: a browser sends one if no file was chosen.

    Raises:
        Problem: The form has too large a file, or the organisation has no room.
    """
    services, caller = visit.services, visit.known
    form = await receive_form(request, services, caller)
    try:
        files = [each for each in form.files if each.size]
        await run_in_threadpool(_keep, services, caller, files)
        return files
    except BaseException:
        await form.drop()
        raise


def _keep(services: Services, caller: Caller, files: list[Received]) -> None:
    quota = services.settings.api_max_storage_bytes

    def act(session: Writing) -> None:
        most = limit_of(session, caller.org_id, "storage_bytes", quota)
        require_room(session, caller.org_id, sum(each.size for each in files), most)
        session.add_all([row_of(services, caller, each, "fine-tune") for each in files])

    services.database.write(act)


def copy_at(services: Services, caller: Caller, file_id: str, name: str) -> S3Location:
    """Location of a small copy of a file: `whole` or `crop`."""
    place = services.file_at(caller.org_id, file_id)
    return S3Location(place.bucket, f"{place.key}.{name}.jpg")
