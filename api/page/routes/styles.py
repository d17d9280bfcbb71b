"""A new style: images are judged before anything is spent, captions edited, and the job started."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from api.gate.intake import Received
from api.gate.keys import TRAIN, Caller
from api.gate.once import Once
from api.gate.problems import Problem
from api.life.orders import JobOrder
from api.page import pictures, rendering
from api.page.gate import UPLOADS, PageRoute, page_scope
from api.page.orders import drafts, estimates
from api.page.visit import Visit, Visited
from api.routes import jobs
from api.services import Services
from images import judgement
from images.judgement import ImageFacts, ImageJudgement, SeenImage
from jobs.captions import clean_caption
from jobs.style import HyperParameters, StyleOptions

router = APIRouter(prefix="/styles", route_class=PageRoute, include_in_schema=False)
KIND = "style"
MAX_CAPTION, MAX_NAME, MAX_TAGS = 2000, 100, 20
_AT_ONCE = threading.Semaphore(2)
"""Decoders of this process; more would only take each other's time and memory."""


@dataclasses.dataclass(frozen=True, slots=True)
class ImageCard:
    """One image of a draft as the page shows it."""

    id: str
    name: str
    has_whole: bool
    facts: ImageFacts
    judgement: ImageJudgement
    caption: str
    caption_problem: str


@router.get("/new", openapi_extra=page_scope(TRAIN))
def new(visit: Visited) -> Response:
    """The form for images, and the drafts that were not started."""
    found = drafts.newest(visit.services, visit.known, KIND)
    return rendering.page(visit, "style_new.html.j2", drafts=found)


@router.post("/new", openapi_extra=page_scope(TRAIN) | {UPLOADS: True})
async def begin(request: Request, visit: Visited) -> Response:
    """Begin a draft with images."""
    files = await drafts.receive(request, visit)
    draft_id = await run_in_threadpool(_begin, visit, files)
    return RedirectResponse(f"/styles/{draft_id}", 303)


def _begin(visit: Visit, files: list[Received]) -> str:
    if not files:
        raise Problem("invalid_parameter", "file: choose at least one image.", param="file")
    draft_id = drafts.create(visit.services, visit.known, KIND)
    _take_in(visit, draft_id, files)
    return draft_id


@router.post("/{draft_id}/images", openapi_extra=page_scope(TRAIN) | {UPLOADS: True})
async def add(request: Request, visit: Visited, draft_id: str) -> Response:
    """Add images to a draft."""
    await run_in_threadpool(drafts.find, visit.services, visit.known, draft_id, KIND)
    files = await drafts.receive(request, visit)
    await run_in_threadpool(_take_in, visit, draft_id, files)
    return RedirectResponse(f"/styles/{draft_id}", 303)


def _take_in(visit: Visit, draft_id: str, files: list[Received]) -> None:
    """Decode images, keep small copies of them, and add them to the draft."""
    services, caller = visit.services, visit.known
    seen = _seen(services, caller, files)
    entries = []
    for file, found in zip(files, seen, strict=True):
        for name, content in (("whole", found.thumbnail), ("crop", found.crop)):
            if content:
                place = drafts.copy_at(services, caller, file.file_id, name)
                services.s3.write(place, content, "image/jpeg")
        entries.append(
            {
                "id": file.file_id,
                "name": file.filename,
                "facts": dataclasses.asdict(found.facts),
                "has_whole": bool(found.thumbnail),
                "caption": "",
            }
        )

    def added(content: dict[str, Any]) -> dict[str, Any]:
        known = list(content.get("files", ()))
        if len(known) + len(entries) > drafts.MAX_FILES:
            raise Problem("too_large", f"A style may have {drafts.MAX_FILES} images.")
        return content | {"files": known + entries}

    draft = drafts.find(services, caller, draft_id, KIND)
    drafts.change(services, caller, draft, added)


def _seen(services: Services, caller: Caller, files: list[Received]) -> list[SeenImage]:
    options, resolution = StyleOptions(), HyperParameters().resolution
    with _AT_ONCE, tempfile.TemporaryDirectory(prefix="judged-") as folder:
        paths = []
        for number, file in enumerate(files):
            path = Path(folder) / str(number)
            if file.size <= options.max_image_bytes:
                services.s3.download(services.file_at(caller.org_id, file.file_id), path)
            paths.append(path)
        found = judgement.see(paths, resolution=resolution, max_pixels=options.max_image_pixels)
        return [
            image if file.size <= options.max_image_bytes else _too_large(options)
            for file, image in zip(files, found, strict=True)
        ]


def _too_large(options: StyleOptions) -> SeenImage:
    most = f"{options.max_image_bytes:,}"
    return SeenImage(ImageFacts(f"has more than the {most} bytes that are allowed"))


@router.get("/{draft_id}", openapi_extra=page_scope(TRAIN))
def show(visit: Visited, draft_id: str) -> Response:
    """A draft: the judgement of each image, captions, settings, and the estimate."""
    draft = drafts.find(visit.services, visit.known, draft_id, KIND)
    if draft.job_id is not None:
        return RedirectResponse(f"/jobs/{draft.job_id}", 303)
    cards = cards_of(draft)
    usable = [card for card in cards if card.judgement.status != judgement.LEFT_OUT]
    return rendering.page(
        visit,
        "style_draft.html.j2",
        draft=draft,
        content=draft.content,
        cards=cards,
        counts=[
            (status, sum(card.judgement.status == status for card in cards))
            for status in (judgement.USED, judgement.WARNED, judgement.LEFT_OUT)
        ],
        usable=len(usable),
        least=StyleOptions().min_images,
        about_all=judgement.about_all([card.facts for card in usable]),
        presets=estimates.PRESETS,
        estimates=estimates.estimates(visit.services, len(usable)),
        chosen=draft.content.get("preset", "balanced"),
        epochs={each: estimates.epochs_of(each, len(usable)) for each in estimates.PRESETS},
    )


def cards_of(draft: drafts.Draft) -> list[ImageCard]:
    """The images of a draft with their judgements, in the order of their arrival."""
    files = draft.files
    facts = [_facts(each["facts"]) for each in files]
    judged = judgement.judge([(each["name"], fact) for each, fact in zip(files, facts)])
    return [
        ImageCard(
            each["id"],
            each["name"],
            each["has_whole"],
            fact,
            verdict,
            each["caption"],
            clean_caption(each["caption"]).problem or "",
        )
        for each, fact, verdict in zip(files, facts, judged)
    ]


def _facts(values: dict[str, Any]) -> ImageFacts:
    """Facts as they were before JSON, which has no tuples."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return ImageFacts(**given)


@router.get("/{draft_id}/images/{file_id}/{name}", openapi_extra=page_scope(TRAIN))
def image(visit: Visited, draft_id: str, file_id: str, name: Literal["whole", "crop"]) -> Response:
    """A small copy of an image of a draft."""
    draft = drafts.find(visit.services, visit.known, draft_id, KIND)
    if file_id not in {each["id"] for each in draft.files}:
        raise Problem("file_not_found", "There is no such image.")
    place = drafts.copy_at(visit.services, visit.known, file_id, name)
    return pictures.small_image(visit.services.s3, place, "image/jpeg")


@router.post("/{draft_id}", openapi_extra=page_scope(TRAIN))
def keep(visit: Visited, draft_id: str) -> Response:
    """Keep captions and settings; images whose button was pressed are taken out."""
    draft = drafts.find(visit.services, visit.known, draft_id, KIND)
    drafts.change(visit.services, visit.known, draft, lambda content: _kept(content, visit.fields))
    return RedirectResponse(f"/styles/{draft_id}", 303)


def _kept(content: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    removed = fields.get("remove", "")
    files = [
        each
        | {"caption": fields.get(f"caption.{each['id']}", each["caption"])[:MAX_CAPTION].strip()}
        for each in content.get("files", ())
        if each["id"] != removed
    ]
    preset = fields.get("preset", "balanced")
    if preset not in estimates.PRESETS:
        raise Problem("invalid_parameter", "preset: is none of the presets.", param="preset")
    return content | {
        "files": files,
        "name": fields.get("name", "")[:MAX_NAME].strip(),
        "trigger_word": fields.get("trigger_word", "")[:MAX_NAME].strip(),
        "model": fields.get("model", "")[:200].strip(),
        "prompts": fields.get("prompts", "")[:MAX_CAPTION],
        "tags": fields.get("tags", "")[:MAX_CAPTION],
        "preset": preset,
    }


@router.post("/{draft_id}/start", openapi_extra=page_scope(TRAIN))
def start(request: Request, visit: Visited, draft_id: str) -> Response:
    """Order the training. Pressing the button twice makes one job."""
    services, caller = visit.services, visit.known
    draft = drafts.find(services, caller, draft_id, KIND)
    if draft.job_id is not None:
        return RedirectResponse(f"/jobs/{draft.job_id}", 303)
    drafts.change(services, caller, draft, lambda content: _kept(content, visit.fields))
    draft = drafts.find(services, caller, draft_id, KIND)
    job = jobs.create(services, caller, order_of(draft), request, once=once_of(caller, draft))
    drafts.became(services, caller, draft, job["id"])
    return RedirectResponse(f"/jobs/{job['id']}", 303)


def once_of(caller: Caller, draft: drafts.Draft) -> Once:
    """The marks of the order of a draft: it is done once, however often it is sent."""
    return Once(caller, key=f"page-{draft.id}", request_hash=draft.id, is_retry=False)


def order_of(draft: drafts.Draft) -> JobOrder:
    """The order of a draft; images that would be left out are not sent.

    Raises:
        Problem: Too few images can be used.
    """
    usable = [card for card in cards_of(draft) if card.judgement.status != judgement.LEFT_OUT]
    least = StyleOptions().min_images
    if len(usable) < least:
        raise Problem(
            "order_invalid",
            f"{len(usable)} images can be used, and at least {least} are needed. Add images.",
        )
    content = draft.content
    captions = [card.caption or None for card in usable]
    prompts = [line.strip() for line in content.get("prompts", "").splitlines() if line.strip()]
    options = {
        "captions": captions if any(captions) else None,
        "trigger_word": content.get("trigger_word") or None,
        "sample_prompts": prompts or None,
    }
    tags = [each.strip()[:64] for each in content.get("tags", "").split(",") if each.strip()]
    return JobOrder(
        kind=KIND,
        model=content.get("model", ""),
        training_files=[card.id for card in usable],
        parameters=dict(estimates.parameters_of(content.get("preset", "balanced"), len(usable))),
        options={name: value for name, value in options.items() if value is not None},
        name=content.get("name") or None,
        tags=tags[:MAX_TAGS],
    )
