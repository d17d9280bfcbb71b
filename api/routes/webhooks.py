"""Webhooks of the workers (docs/protocol.md, section 3)."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from api.gate.guard import Served
from api.gate.problems import Problem
from api.life import news
from api.services import Services
from services.telemetry.tracing import carried, trace_id_of
from services.webhooks.verification import Unverified
from utils import logger

log = logger.get_logger(__name__)

router = APIRouter(prefix="/api/webhooks/training", tags=["webhooks"])
MAX_BYTES = 4 * 1024**2


async def _received(request: Request, services: Served, kind: str) -> dict[str, Any]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BYTES:
            raise Problem("too_large", f"A webhook may have {MAX_BYTES:,} bytes.")
    headers = {name.lower(): value for name, value in request.headers.items()}
    try:
        services.verifier.verify(headers, bytes(body))
    except Unverified as error:
        code = "unknown_key" if error.status == 401 else "invalid_signature"
        raise Problem(code, str(error)) from None
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not values:
        raise Problem("invalid_json", "The body of a webhook must be a JSON object.")
    services.metrics.webhooks.labels(kind).inc()
    webhook_id = headers["webhook-id"][:255]
    return await run_in_threadpool(_taken, services, kind, values, webhook_id, headers)


def _taken(
    services: Services, kind: str, values: dict[str, Any], webhook_id: str, headers: dict[str, str]
) -> dict[str, Any]:
    """Apply the news, in the job's trace."""
    task_id, carrier = str(values.get("task_id", "")), carried(headers)
    with (
        logger.bound(task_id=task_id[:255], trace_id=trace_id_of(carrier, task_id)),
        services.tracing.job(task_id, carrier=carrier, name="news", kind=kind),
    ):
        log.info("news_came", kind=kind, sequence=values.get("sequence"))
        return news.take(services, kind, values, webhook_id)


@router.patch("/progress", operation_id="webhook_progress")
async def progress(request: Request, services: Served) -> dict[str, Any]:
    """Progress of a job, from its worker."""
    return await _received(request, services, news.PROGRESS)


@router.post("/complete", operation_id="webhook_complete")
async def complete(request: Request, services: Served) -> dict[str, Any]:
    """A job has completed."""
    return await _received(request, services, news.COMPLETE)


@router.post("/failed", operation_id="webhook_failed")
async def failed(request: Request, services: Served) -> dict[str, Any]:
    """A job has failed, or was cancelled."""
    return await _received(request, services, news.FAILED)
