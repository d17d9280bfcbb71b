"""A new language model: a file, the account of its rows, and the start."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from api.gate.intake import Received
from api.gate.keys import TRAIN
from api.gate.problems import Problem
from api.life.orders import JobOrder
from api.page import rendering
from api.page.gate import UPLOADS, PageRoute, page_scope
from api.page.orders import drafts
from api.page.routes.styles import once_of
from api.page.visit import Visit, Visited
from api.routes import jobs
from conversations.intake import take_in
from conversations.reading import UnreadableFile
from jobs.llm import LlmParameters

router = APIRouter(prefix="/language-models", route_class=PageRoute, include_in_schema=False)
KIND = "llm"
MAX_EXAMINED_BYTES = 64 * 1024**2
"""A larger file is trained on without the page's account of its rows."""
EPOCHS = {"quick": 1.0, "balanced": 3.0, "thorough": 5.0}
"""Passes over the conversations of each preset."""


@router.get("/new", openapi_extra=page_scope(TRAIN))
def new(visit: Visited) -> Response:
    """The form for a file of conversations."""
    _require_kind(visit)
    found = drafts.newest(visit.services, visit.known, KIND)
    return rendering.page(visit, "language_new.html.j2", drafts=found)


@router.post("/new", openapi_extra=page_scope(TRAIN) | {UPLOADS: True})
async def begin(request: Request, visit: Visited) -> Response:
    """Begin a draft with a file."""
    _require_kind(visit)
    files = await drafts.receive(request, visit)
    draft_id = await run_in_threadpool(_begin, visit, files)
    return RedirectResponse(f"/language-models/{draft_id}", 303)


def _require_kind(visit: Visit) -> None:
    if KIND not in visit.services.kinds.served:
        raise Problem("kind_not_offered", "This server does no jobs of language models.")


def _begin(visit: Visit, files: list[Received]) -> str:
    if len(files) != 1:
        raise Problem("invalid_parameter", "file: choose one file of conversations.", param="file")
    account = _account(visit, files[0])
    draft_id = drafts.create(visit.services, visit.known, KIND)
    draft = drafts.find(visit.services, visit.known, draft_id, KIND)
    entry = {"id": files[0].file_id, "name": files[0].filename, "bytes": files[0].size}
    drafts.change(
        visit.services,
        visit.known,
        draft,
        lambda content: content | {"files": [entry], "account": account},
    )
    return draft_id


def _account(visit: Visit, file: Received) -> dict[str, Any]:
    """The account of the rows with the default settings of a training."""
    if file.size > MAX_EXAMINED_BYTES:
        return {"skipped": True}
    defaults = LlmParameters()
    place = visit.services.file_at(visit.known.org_id, file.file_id)
    with tempfile.TemporaryDirectory(prefix="account-") as folder:
        path = Path(folder) / "rows"
        visit.services.s3.download(place, path)
        try:
            intake = take_in(
                path,
                validation=None,
                train_on=defaults.train_on,
                system_prompt="",
                redact=False,
                validation_split=defaults.validation_split,
                seed=defaults.seed,
            )
        except UnreadableFile as error:
            return {"unreadable": str(error)}
    return intake.report()


@router.get("/{draft_id}", openapi_extra=page_scope(TRAIN))
def show(visit: Visited, draft_id: str) -> Response:
    """A draft: the account of its rows, and the settings."""
    draft = drafts.find(visit.services, visit.known, draft_id, KIND)
    if draft.job_id is not None:
        return RedirectResponse(f"/jobs/{draft.job_id}", 303)
    return rendering.page(
        visit,
        "language_draft.html.j2",
        draft=draft,
        content=draft.content,
        account=draft.content["account"],
        file=draft.files[0],
        epochs=EPOCHS,
    )


@router.post("/{draft_id}/start", openapi_extra=page_scope(TRAIN))
def start(request: Request, visit: Visited, draft_id: str) -> Response:
    """Order the training. Pressing the button twice makes one job."""
    draft = drafts.find(visit.services, visit.known, draft_id, KIND)
    if draft.job_id is not None:
        return RedirectResponse(f"/jobs/{draft.job_id}", 303)
    account = draft.content["account"]
    if "unreadable" in account:
        raise Problem("order_invalid", f"The file cannot be read: {account['unreadable']}")
    fields = visit.fields
    preset = fields.get("preset", "balanced")
    if preset not in EPOCHS:
        raise Problem("invalid_parameter", "preset: is none of the presets.", param="preset")
    prompt = fields.get("system_prompt", "").strip()
    order = JobOrder(
        kind=KIND,
        model=fields.get("model", "")[:200].strip(),
        training_files=[draft.files[0]["id"]],
        parameters={"epochs": EPOCHS[preset]},
        options={"system_prompt": prompt} if prompt else {},
        name=fields.get("name", "")[:100].strip() or None,
    )
    job = jobs.create(visit.services, visit.known, order, request, once=once_of(visit.known, draft))
    drafts.became(visit.services, visit.known, draft, job["id"])
    return RedirectResponse(f"/jobs/{job['id']}", 303)
