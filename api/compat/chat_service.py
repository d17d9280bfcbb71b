"""The dialect of a chat service: `/api/v1/training/...`, `/api/v1/generate`, `/api/v1/models/...`.

Thin translations of the API's own routes; docs/api.md has the table.
"""

from __future__ import annotations

import datetime
import json
import secrets
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy import select

from api.compat import kinds
from api.gate.guard import Called, GuardedRoute, Served, needs
from api.gate.keys import INFER, READ, TRAIN, Caller, new_id
from api.gate.problems import Problem
from api.life import steering
from api.life.orders import JobOrder, OpenAiHyperParameters
from api.routes.jobs import create, found, report
from api.services import Services
from api.store import jobs as store
from api.store.database import Writing, now
from api.store.tables import ENDED, FileRow, JobRow, ModelRow

router = APIRouter(prefix="/api/v1", tags=["chat service"], route_class=GuardedRoute)
MAX_INLINE_BYTES = 8 * 1024**2
MAX_JOBS = 100
_STATUS = {"succeeded": "completed", "failed": "failed", "cancelled": "cancelled"}

OrgId = Annotated[str, Query(max_length=64)]


class Said(BaseModel):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=1_000_000)]


class SentConversation(BaseModel):
    """A conversation to learn from."""

    messages: Annotated[list[Said], Field(min_length=1)]
    platform: str | None = None
    timestamp: str | None = None


class ChatOrder(BaseModel):
    """An order with its conversations in it."""

    org_id: Annotated[str, Field(max_length=64)]
    base_model: Annotated[str, Field(max_length=200)] = ""
    conversations: Annotated[list[SentConversation], Field(min_length=1)]
    validation_split: Annotated[float, Field(ge=0, lt=1)] = 0.1
    num_epochs: Annotated[int | None, Field(ge=1, le=1000)] = None


class Evaluate(BaseModel):
    """Prompts to evaluate a model with."""

    org_id: Annotated[str, Field(max_length=64)]
    model_id: str = "latest"
    test_prompts: list[dict[str, Any]] = Field(default_factory=list)


class Generate(BaseModel):
    """A message to answer."""

    message: str
    system_prompt: str | None = None
    history: list[Said] | None = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=32768)] = None


def _shown(row: JobRow) -> dict[str, Any]:
    shown = _STATUS.get(row.status, "training" if row.started_at else "queued")
    percent = row.progress.get("progress_percent", 0)
    done = percent / 100 if isinstance(percent, (int, float)) else 0.0
    return {
        "training_id": row.id,
        "org_id": row.org_id,
        "status": shown,
        "progress": 1.0 if row.status == "succeeded" else done,
        "started_at": _time(row.started_at),
        "completed_at": _time(row.finished_at),
        "error": row.error_message if row.error_code else None,
        "metadata": row.job_metadata | ({"model_id": row.model_id} if row.model_id else {}),
    }


def _time(value: float | None) -> str | None:
    if value is None:
        return None
    return datetime.datetime.fromtimestamp(value, datetime.UTC).isoformat()


@router.post(
    "/training/start",
    openapi_extra=needs(TRAIN, body_limit=MAX_INLINE_BYTES),
    operation_id="chat_start",
)
def start(order: ChatOrder, request: Request, services: Served, caller: Called) -> dict[str, Any]:
    """Train on conversations. They become a file of the organisation."""
    kinds.require(services, kinds.CHAT, "Training on conversations")
    caller = kinds.of_organization(services, caller, order.org_id)
    job_order = JobOrder(
        kind=kinds.CHAT,
        model=order.base_model,
        training_file=_conversations(services, caller, order.conversations),
        hyperparameters=OpenAiHyperParameters(n_epochs=order.num_epochs),
        parameters=kinds.parameters_of(
            services, kinds.CHAT, {"validation_split": order.validation_split}
        ),
    )
    job = create(services, caller, job_order, request, f"train_{secrets.token_hex(6)}")
    with services.database.reading() as session:
        return _shown(found(session, caller, job["id"]))


def _conversations(
    services: Services, caller: Caller, conversations: list[SentConversation]
) -> str:
    """Keep conversations as a file of JSON lines. Returns its id."""
    lines = [
        json.dumps({"messages": [said.model_dump() for said in each.messages]}, ensure_ascii=False)
        for each in conversations
    ]
    body = "\n".join(lines).encode() + b"\n"
    file_id = new_id("file-")
    place = services.file_at(caller.org_id, file_id)
    services.s3.write(place, body, "application/jsonl")
    row = FileRow(
        id=file_id,
        org_id=caller.org_id,
        filename="conversations.jsonl",
        bytes=len(body),
        content_type="application/jsonl",
        purpose="fine-tune",
        bucket=place.bucket,
        key=place.key,
        status="processed",
        created_at=now(),
    )

    def act(session: Writing) -> None:
        session.merge(row)

    services.database.write(act)
    return file_id


@router.get("/training/status/{training_id}", openapi_extra=needs(READ), operation_id="chat_status")
def status(training_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """Show a training."""
    caller = kinds.of_job(services, caller, training_id)
    with services.database.reading() as session:
        return _shown(found(session, caller, training_id))


@router.get("/training/jobs/{org_id}", openapi_extra=needs(READ), operation_id="chat_jobs")
def jobs(org_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """List the newest trainings of an organisation."""
    caller = kinds.of_organization(services, caller, org_id)
    with services.database.reading() as session:
        rows = session.scalars(
            store.visible(caller.org_id)
            .order_by(JobRow.created_at.desc(), JobRow.id.desc())
            .limit(MAX_JOBS)
        )
        return {"jobs": [_shown(row) for row in rows]}


@router.delete(
    "/training/jobs/{training_id}", openapi_extra=needs(TRAIN), operation_id="chat_cancel"
)
def cancel(training_id: str, request: Request, services: Served, caller: Called) -> dict[str, Any]:
    """Cancel a training."""
    caller = kinds.of_job(services, caller, training_id)
    with services.database.reading() as session:
        row = found(session, caller, training_id)
    if row.status in ENDED:
        raise Problem(
            "invalid_parameter",
            f"The training {training_id} has ended: it is {_shown(row)['status']}.",
            param="training_id",
        )
    steering.cancel(services, caller, training_id, request)
    return status(training_id, services, caller)


@router.post("/training/evaluate", openapi_extra=needs(TRAIN), operation_id="chat_evaluate")
def evaluate(order: Evaluate, services: Served, caller: Called) -> dict[str, Any]:
    """Show a model's perplexity and its answers to prompts, as its training measured them.

    Prompts that the training did not ask are refused: no engine serves models yet.
    """
    caller = kinds.of_organization(services, caller, order.org_id)
    row = _chat_model(services, caller, order.model_id)
    evaluation = report(services, caller, row.job_id).get("evaluation") or {}
    before, after = evaluation.get("before") or {}, evaluation.get("after") or {}
    answers = {each["question"]: each for each in evaluation.get("answers") or ()}
    asked = [_prompt_of(each) for each in order.test_prompts] or list(answers)
    if unknown := [prompt for prompt in asked if prompt not in answers]:
        raise Problem(
            "kind_not_offered",
            f"test_prompts: the training of {row.id} did not ask {unknown[0][:80]!r}. Order "
            "prompts with the training, as options.prompts of POST /v1/fine_tuning/jobs.",
            param="test_prompts",
        )
    return {
        "org_id": caller.org_id,
        "model_id": row.id,
        "training_id": row.job_id,
        "perplexity": after.get("perplexity"),
        "perplexity_interval": after.get("perplexity_interval"),
        "base_perplexity": before.get("perplexity"),
        "verdict": evaluation.get("verdict"),
        "responses": [
            {"prompt": each, "response": answers[each]["tuned"], "base": answers[each]["base"]}
            for each in asked
        ],
    }


def _chat_model(services: Services, caller: Caller, model_id: str) -> ModelRow:
    """A language model of an organisation; the newest one for `latest`."""
    query = (
        select(ModelRow)
        .where(ModelRow.org_id == caller.org_id, ModelRow.deleted_at.is_(None))
        .where(ModelRow.kind == kinds.CHAT)
        .order_by(ModelRow.created_at.desc(), ModelRow.id)
    )
    if model_id != "latest":
        query = query.where(ModelRow.id == model_id)
    with services.database.reading() as session:
        row = session.scalar(query.limit(1))
    if row is None:
        raise Problem(
            "model_not_found",
            f"model_id: the organisation {caller.org_id} has no language model {model_id}.",
            param="model_id",
        )
    return row


def _prompt_of(given: dict[str, Any]) -> str:
    """The text of a test prompt: its `prompt` or `message`."""
    text = given.get("prompt") or given.get("message")
    if not isinstance(text, str):
        raise Problem(
            "invalid_parameter",
            'test_prompts: each must have a text, such as {"prompt": "Hello!"}.',
            param="test_prompts",
        )
    return text


@router.post("/generate", openapi_extra=needs(INFER), operation_id="chat_generate")
def generate(order: Generate, org_id: OrgId, services: Served, caller: Called) -> dict[str, Any]:
    """Answer a message with the organisation's newest model. No engine serves models yet."""
    del order
    kinds.of_organization(services, caller, org_id)
    raise _no_engine()


@router.post("/models/load", openapi_extra=needs(INFER), operation_id="chat_load")
def load(
    org_id: OrgId,
    services: Served,
    caller: Called,
    model_id: Annotated[str, Query(max_length=255)] = "latest",
) -> dict[str, Any]:
    """Load a model. No engine serves models yet."""
    del model_id
    kinds.of_organization(services, caller, org_id)
    raise _no_engine()


@router.post("/models/unload", openapi_extra=needs(INFER), operation_id="chat_unload")
def unload(org_id: OrgId, services: Served, caller: Called) -> dict[str, Any]:
    """Unload a model. No engine serves models yet."""
    kinds.of_organization(services, caller, org_id)
    raise _no_engine()


def _no_engine() -> Problem:
    return Problem(
        "no_engine", "No engine serves models on this server.", headers={"Retry-After": "3600"}
    )


def _models(services: Services, caller: Caller) -> list[dict[str, Any]]:
    query = (
        select(ModelRow)
        .where(ModelRow.org_id == caller.org_id, ModelRow.deleted_at.is_(None))
        .order_by(ModelRow.created_at.desc(), ModelRow.id)
        .limit(MAX_JOBS)
    )
    with services.database.reading() as session:
        return [
            {
                "model_id": row.id,
                "training_id": row.job_id,
                "base_model": row.base_model,
                "kind": row.kind,
                "created_at": _time(row.created_at),
                "loaded": False,
            }
            for row in session.scalars(query)
        ]


@router.get("/models/{org_id}/info", openapi_extra=needs(READ), operation_id="chat_model_info")
def model_info(org_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """Show the newest model of an organisation."""
    models = _models(services, kinds.of_organization(services, caller, org_id))
    if not models:
        raise Problem("model_not_found", f"The organisation {org_id} has no model.")
    return {"org_id": org_id} | models[0]


@router.get("/models/{org_id}/list", openapi_extra=needs(READ), operation_id="chat_models")
def model_list(org_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """List the models of an organisation, newest first."""
    models = _models(services, kinds.of_organization(services, caller, org_id))
    return {"org_id": org_id, "models": models}


@router.get("/health", operation_id="chat_health")
def health() -> dict[str, Any]:
    """The process is alive."""
    return {"status": "ok", "gpu": None}
