"""Webhooks of organisations: written with the change that they tell of, and sent by the courier."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, delete, func, select, update
from sqlalchemy.orm import Session

from api.store.database import Writing, now
from api.store.tables import ENDED, EndpointRow, WebhookRow

PREFIX = "fine_tuning.job."
ENDINGS = tuple(f"{PREFIX}{status}" for status in ENDED)
"""The types that OpenAI has, too. An endpoint gets these by default."""
TYPES = (*ENDINGS, *(f"{PREFIX}{status}" for status in ("queued", "running", "pausing", "paused")))
TEST_TYPE = "webhook.test"
KEPT_SECONDS = 30 * 86_400.0


def announce(session: Writing, org_id: str | None, job_id: str, status: str) -> None:
    """Add the webhooks of a job's new status, in the transaction that changes it."""
    if org_id is None:
        return
    type_ = PREFIX + status
    for endpoint in session.scalars(_active(org_id)):
        if type_ in endpoint.events:
            session.add(webhook(endpoint, type_, {"id": job_id, "status": status}, job_id))


def _active(org_id: str) -> Select[EndpointRow]:
    return select(EndpointRow).where(
        EndpointRow.org_id == org_id,
        EndpointRow.deleted_at.is_(None),
        EndpointRow.disabled_at.is_(None),
    )


def webhook(
    endpoint: EndpointRow, type_: str, data: dict[str, Any], job_id: str | None = None
) -> WebhookRow:
    """A webhook for an endpoint, due now. Its body has the form of OpenAI's webhooks."""
    id_, at = f"evt_{secrets.token_hex(12)}", now()
    body = {
        "id": id_,
        "object": "event",
        "created_at": int(at),
        "type": type_,
        "data": data,
    }
    return WebhookRow(
        id=id_,
        endpoint_id=endpoint.id,
        org_id=endpoint.org_id,
        job_id=job_id,
        type=type_,
        body=json.dumps(body).encode("ascii"),
        created_at=at,
        due_at=at,
        attempts=0,
        is_delivered=0,
    )


def due(
    session: Session, limit: int, per_endpoint: int
) -> Sequence[tuple[WebhookRow, EndpointRow]]:
    """Webhooks that are due, the oldest first, and few of each endpoint.

    So an endpoint that does not answer delays no other.
    """
    place = func.row_number().over(
        partition_by=WebhookRow.endpoint_id, order_by=(WebhookRow.due_at, WebhookRow.id)
    )
    waiting = (
        select(WebhookRow.id, place.label("place"))
        .where(WebhookRow.settled_at.is_(None), WebhookRow.due_at <= now())
        .subquery()
    )
    rows = session.execute(
        select(WebhookRow, EndpointRow)
        .join(waiting, waiting.c.id == WebhookRow.id)
        .join(EndpointRow, EndpointRow.id == WebhookRow.endpoint_id)
        .where(
            waiting.c.place <= per_endpoint,
            EndpointRow.deleted_at.is_(None),
            EndpointRow.disabled_at.is_(None),
        )
        .order_by(WebhookRow.due_at, WebhookRow.id)
        .limit(limit)
    )
    return [(row[0], row[1]) for row in rows]


def drop(session: Writing, endpoint_id: str) -> None:
    """Give up all webhooks of an endpoint that wait."""
    session.execute(
        update(WebhookRow)
        .where(WebhookRow.endpoint_id == endpoint_id, WebhookRow.settled_at.is_(None))
        .values(settled_at=now())
    )


def forget_settled(session: Writing) -> None:
    """Delete webhooks that were settled long ago."""
    session.execute(delete(WebhookRow).where(WebhookRow.settled_at <= now() - KEPT_SECONDS))


def waiting_count(session: Session) -> tuple[int, float]:
    """The number of webhooks that wait, and the seconds since the oldest was written."""
    count, oldest = session.execute(
        select(func.count(), func.min(WebhookRow.created_at)).where(WebhookRow.settled_at.is_(None))
    ).one()
    return count, max(0.0, now() - oldest) if oldest else 0.0
