"""Addresses of an organisation that get signed webhooks about its jobs."""

from __future__ import annotations

import ipaddress
import json
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api import views
from api.gate.guard import Called, GuardedRoute, Served, needs
from api.gate.keys import ADMIN, Caller, ensure_organization, new_id
from api.gate.paging import Paged
from api.gate.problems import Problem
from api.life.steering import audit
from api.services import Services
from api.store import endpoints as store
from api.store.database import Writing, now
from api.store.tables import EndpointRow, WebhookRow

router = APIRouter(
    prefix="/v1/organization/webhook_endpoints", tags=["webhooks"], route_class=GuardedRoute
)
MOST = 20
OLD_SECRET_SECONDS = 86_400.0
"""How long the secret before the last rotation still signs."""
_MAX_URL = 2000
_LOCAL = (".localhost", ".local", ".internal")
EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "fine_tuning.job.queued",
    "fine_tuning.job.running",
    "fine_tuning.job.pausing",
    "fine_tuning.job.paused",
]


class EndpointOrder(BaseModel):
    """A new endpoint."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"url": "https://customer.example.org/hooks"}]},
    )

    url: Annotated[str, Field(min_length=8, max_length=_MAX_URL)]
    events: Annotated[list[EventType], Field(min_length=1, max_length=len(store.TYPES))] = Field(
        default_factory=lambda: cast(list[EventType], list(store.ENDINGS))
    )


def _checked(services: Services, url: str) -> str:
    """The address, if webhooks may go there.

    A name is resolved only when a webhook is sent; then the address of the connection is checked.
    """
    wrong = Problem(
        "invalid_parameter",
        "url: must be an https address of a host that the internet reaches, without a user, a "
        "password or a fragment.",
        param="url",
    )
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise wrong from None
    is_plain = url.isascii() and url.isprintable() and " " not in url
    if not host or not is_plain or parts.username or parts.password or parts.fragment:
        raise wrong
    if not services.customers.only_public and parts.scheme in ("http", "https"):
        return url
    if parts.scheme != "https" or not _may_be_public(host):
        raise wrong
    return url


def _may_be_public(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not f".{host}".endswith(_LOCAL)


def _shown(services: Services, row: EndpointRow, *, with_secret: bool = False) -> dict[str, Any]:
    secret = services.keys.webhook_secret(row.id, row.secret_version)
    return {
        "id": row.id,
        "object": "organization.webhook_endpoint",
        "url": row.url,
        "events": row.events,
        "created_at": int(row.created_at),
        "is_active": row.disabled_at is None,
        "old_secret_until": int(row.old_secret_until) if row.old_secret_until else None,
        **({"secret": secret} if with_secret else {}),
    }


def _found(session: Session, caller: Caller, endpoint_id: str) -> EndpointRow:
    row = session.scalar(
        select(EndpointRow).where(
            EndpointRow.id == endpoint_id,
            EndpointRow.org_id == caller.org_id,
            EndpointRow.deleted_at.is_(None),
        )
    )
    if row is None:
        raise Problem(
            "endpoint_not_found",
            f"There is no webhook endpoint {endpoint_id}.",
            param="endpoint_id",
        )
    return row


@router.post("", openapi_extra=needs(ADMIN), operation_id="create_webhook_endpoint")
def create_endpoint(
    order: EndpointOrder, request: Request, services: Served, caller: Called
) -> dict[str, Any]:
    """Add an endpoint. `secret` of the answer verifies its webhooks, and is shown only now."""
    url = _checked(services, order.url)

    def act(session: Writing) -> dict[str, Any]:
        ensure_organization(session, caller.org_id)
        known = select(func.count()).where(
            EndpointRow.org_id == caller.org_id, EndpointRow.deleted_at.is_(None)
        )
        if (session.scalar(known) or 0) >= MOST:
            raise Problem(
                "invalid_parameter",
                f"url: an organisation has at most {MOST} webhook endpoints. Delete one first.",
                param="url",
            )
        row = EndpointRow(
            id=new_id("we_"),
            org_id=caller.org_id,
            url=url,
            events=list(dict.fromkeys(order.events)),
            secret_version=1,
            created_at=now(),
        )
        session.add(row)
        audit(session, caller, "webhook_endpoint.create", row.id, request)
        session.flush()
        return _shown(services, row, with_secret=True)

    return services.database.write(act)


@router.get("", openapi_extra=needs(ADMIN), operation_id="list_webhook_endpoints")
def list_endpoints(page: Paged, services: Served, caller: Called) -> dict[str, Any]:
    """List the endpoints of the organisation."""
    query = select(EndpointRow).where(
        EndpointRow.org_id == caller.org_id, EndpointRow.deleted_at.is_(None)
    )
    with services.database.reading() as session:
        rows, has_more = page.rows(session, query, EndpointRow)
    return views.page([_shown(services, row) for row in rows], has_more=has_more)


@router.get("/{endpoint_id}", openapi_extra=needs(ADMIN), operation_id="get_webhook_endpoint")
def get_endpoint(endpoint_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """Show an endpoint."""
    with services.database.reading() as session:
        return _shown(services, _found(session, caller, endpoint_id))


@router.post(
    "/{endpoint_id}/rotate_secret",
    openapi_extra=needs(ADMIN),
    operation_id="rotate_webhook_secret",
)
def rotate_secret(
    endpoint_id: str, request: Request, services: Served, caller: Called
) -> dict[str, Any]:
    """Give an endpoint a new secret. For a day, webhooks are signed with the old one, too."""

    def act(session: Writing) -> dict[str, Any]:
        row = _found(session, caller, endpoint_id)
        row.secret_version += 1
        row.old_secret_until = now() + OLD_SECRET_SECONDS
        audit(session, caller, "webhook_endpoint.rotate", row.id, request)
        session.flush()
        return _shown(services, row, with_secret=True)

    return services.database.write(act)


@router.post(
    "/{endpoint_id}/test", openapi_extra=needs(ADMIN), operation_id="test_webhook_endpoint"
)
def test_endpoint(endpoint_id: str, services: Served, caller: Called) -> dict[str, Any]:
    """Send a webhook of the type `webhook.test`. An endpoint that was switched off is on again."""

    def act(session: Writing) -> dict[str, Any]:
        row = _found(session, caller, endpoint_id)
        row.disabled_at = None
        sent = store.webhook(row, store.TEST_TYPE, {"id": row.id})
        session.add(sent)
        session.flush()
        return _webhook(sent)

    return services.database.write(act)


@router.get(
    "/{endpoint_id}/webhooks", openapi_extra=needs(ADMIN), operation_id="list_sent_webhooks"
)
def list_webhooks(
    endpoint_id: str, page: Paged, services: Served, caller: Called
) -> dict[str, Any]:
    """List the webhooks of an endpoint in the last 30 days, with the answers to them."""
    with services.database.reading() as session:
        _found(session, caller, endpoint_id)
        query = select(WebhookRow).where(WebhookRow.endpoint_id == endpoint_id)
        rows, has_more = page.rows(session, query, WebhookRow)
    return views.page([_webhook(row) for row in rows], has_more=has_more)


def _webhook(row: WebhookRow) -> dict[str, Any]:
    state = "waiting"
    if row.settled_at is not None:
        state = "delivered" if row.is_delivered else "given_up"
    return {
        "id": row.id,
        "object": "organization.webhook",
        "type": row.type,
        "data": json.loads(row.body)["data"],
        "created_at": int(row.created_at),
        "state": state,
        "attempts": row.attempts,
        "status": row.status,
        "problem": row.problem,
        "next_attempt_at": int(row.due_at) if row.settled_at is None else None,
    }


@router.delete("/{endpoint_id}", openapi_extra=needs(ADMIN), operation_id="delete_webhook_endpoint")
def delete_endpoint(
    endpoint_id: str, request: Request, services: Served, caller: Called
) -> dict[str, Any]:
    """Delete an endpoint. Webhooks that wait are given up."""

    def act(session: Writing) -> None:
        row = _found(session, caller, endpoint_id)
        row.deleted_at = now()
        store.drop(session, row.id)
        audit(session, caller, "webhook_endpoint.delete", row.id, request)

    services.database.write(act)
    return {"id": endpoint_id, "object": "organization.webhook_endpoint.deleted", "deleted": True}
