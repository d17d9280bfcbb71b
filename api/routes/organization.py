"""The caller's organisation: keys, limits, usage and the audit log."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import case, func, select

from api import views
from api.gate.administration import shown as key_shown
from api.gate.guard import Called, GuardedRoute, Served, needs
from api.gate.keys import ADMIN, OPEN_KEY, READ, ensure_organization
from api.gate.paging import Paged
from api.gate.problems import Problem
from api.life import erasure
from api.life.steering import audit
from api.store.database import Writing, now
from api.store.tables import ApiKeyRow, AuditRow, FileRow, JobRow, OrganizationRow

router = APIRouter(prefix="/v1", tags=["organization"], route_class=GuardedRoute)
DAY = 86_400.0
Scope = Literal["admin", "train", "infer", "read"]


class KeyOrder(BaseModel):
    """A new API key."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=100)]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=4)] = Field(
        default_factory=lambda: list[Scope](("train",))
    )
    expires_in_days: Annotated[int | None, Field(ge=1, le=3650)] = None


class Limits(BaseModel):
    """Limits of the organisation, each at most the server's own; null takes the server's."""

    model_config = ConfigDict(extra="forbid")

    max_concurrent_trainings: Annotated[int | None, Field(ge=1)] = None
    creates_per_minute: Annotated[int | None, Field(ge=1)] = None
    storage_bytes: Annotated[int | None, Field(ge=1)] = None


@router.get("/organization", openapi_extra=needs(READ), operation_id="get_organization")
def get_organization(services: Served, caller: Called) -> dict[str, Any]:
    """Show the organisation of the key."""
    with services.database.reading() as session:
        row = session.get(OrganizationRow, caller.org_id)
    return {
        "id": caller.org_id,
        "object": "organization",
        "name": row.name if row else caller.org_id,
        "created_at": int(row.created_at) if row else 0,
        "scopes": sorted(caller.scopes),
    }


@router.delete("/organization", openapi_extra=needs(ADMIN), operation_id="delete_organization")
def delete_organization(
    confirm: Annotated[str, Query(max_length=64, description="The id of the organisation.")],
    request: Request,
    services: Served,
    caller: Called,
) -> dict[str, Any]:
    """Delete the organisation and all its data: jobs, models, files and keys.

    Its keys stop at once, and its open jobs are cancelled. The data go when these have ended. This
    cannot be undone.
    """
    if confirm != caller.org_id:
        raise Problem(
            "invalid_parameter",
            "confirm: must be the id of the organisation that the API key belongs to.",
            param="confirm",
        )
    if caller.key_id == OPEN_KEY:
        raise Problem(
            "invalid_parameter",
            "confirm: the organisation of an open server cannot be deleted.",
            param="confirm",
        )
    erasure.ask_for(services, caller, request)
    return {"id": caller.org_id, "object": "organization.deleted", "deleted": True}


@router.post("/organization/api_keys", openapi_extra=needs(ADMIN), operation_id="create_api_key")
def create_api_key(
    order: KeyOrder, request: Request, services: Served, caller: Called
) -> dict[str, Any]:
    """Create an API key. `value` of the answer is the key, which is shown only now."""

    def act(session: Writing) -> dict[str, Any]:
        ensure_organization(session, caller.org_id)
        expires_at = now() + order.expires_in_days * DAY if order.expires_in_days else None
        row, secret = services.keys.create(
            session,
            caller.org_id,
            name=order.name,
            scopes=list(order.scopes),
            created_by=caller.key_id,
            expires_at=expires_at,
        )
        audit(session, caller, "key.create", row.id, request)
        session.flush()
        return key_shown(row) | {"value": secret}

    return services.database.write(act)


@router.get("/organization/api_keys", openapi_extra=needs(ADMIN), operation_id="list_api_keys")
def list_api_keys(page: Paged, services: Served, caller: Called) -> dict[str, Any]:
    """List the API keys of the organisation."""
    query = select(ApiKeyRow).where(ApiKeyRow.org_id == caller.org_id)
    with services.database.reading() as session:
        rows, has_more = page.rows(session, query, ApiKeyRow)
    return views.page([key_shown(row) for row in rows], has_more=has_more)


@router.delete(
    "/organization/api_keys/{key_id}", openapi_extra=needs(ADMIN), operation_id="revoke_api_key"
)
def revoke_api_key(
    key_id: str, request: Request, services: Served, caller: Called
) -> dict[str, Any]:
    """Revoke an API key."""

    def act(session: Writing) -> None:
        row = session.scalar(
            select(ApiKeyRow).where(ApiKeyRow.id == key_id, ApiKeyRow.org_id == caller.org_id)
        )
        if row is None:
            raise Problem("key_not_found", f"There is no API key {key_id}.", param="key_id")
        row.revoked_at = row.revoked_at or now()
        audit(session, caller, "key.revoke", key_id, request)

    services.database.write(act)
    services.keys.forget()
    return {"id": key_id, "object": "organization.api_key.deleted", "deleted": True}


@router.get("/organization/limits", openapi_extra=needs(READ), operation_id="get_limits")
def get_limits(services: Served, caller: Called) -> dict[str, Any]:
    """Show the limits of the organisation."""
    with services.database.reading() as session:
        row = session.get(OrganizationRow, caller.org_id)
    settings = services.settings
    own = row.limits if row else {}
    return {
        "object": "organization.limits",
        "max_concurrent_trainings": settings.max_concurrent_trainings,
        "creates_per_minute": settings.api_creates_per_minute,
        "storage_bytes": settings.api_max_storage_bytes,
    } | own


@router.put("/organization/limits", openapi_extra=needs(ADMIN), operation_id="set_limits")
def set_limits(order: Limits, request: Request, services: Served, caller: Called) -> dict[str, Any]:
    """Set limits of the organisation below those of the server."""
    settings = services.settings
    most = {
        "max_concurrent_trainings": settings.max_concurrent_trainings,
        "creates_per_minute": settings.api_creates_per_minute,
        "storage_bytes": settings.api_max_storage_bytes,
    }
    wanted = order.model_dump(exclude_none=True)
    for name, value in wanted.items():
        if value > most[name]:
            raise Problem(
                "invalid_parameter",
                f"{name}: must be at most {most[name]}, the limit of this server.",
                param=name,
            )

    def act(session: Writing) -> None:
        ensure_organization(session, caller.org_id)
        session.get_one(OrganizationRow, caller.org_id).limits = wanted
        audit(session, caller, "limits.set", caller.org_id, request)

    services.database.write(act)
    return get_limits(services, caller)


@router.get("/usage", openapi_extra=needs(READ), operation_id="get_usage")
def get_usage(
    services: Served,
    caller: Called,
    days: Annotated[int, Query(ge=1, le=366)] = 30,
) -> dict[str, Any]:
    """Jobs, their running time and its cost, and stored bytes of the last days.

    The cost is null unless the server has a price (`GPU_PRICE_PER_HOUR`).
    """
    since = now() - days * DAY
    seconds = func.coalesce(JobRow.finished_at, now()) - JobRow.started_at
    with services.database.reading() as session:
        kinds = session.execute(
            select(
                JobRow.kind,
                func.count(),
                func.sum(case((JobRow.started_at.is_not(None), seconds), else_=0.0)),
            )
            .where(JobRow.org_id == caller.org_id, JobRow.created_at >= since)
            .group_by(JobRow.kind)
        ).all()
        stored = session.scalar(
            select(func.coalesce(func.sum(FileRow.bytes), 0)).where(
                FileRow.org_id == caller.org_id, FileRow.deleted_at.is_(None)
            )
        )
    return {
        "object": "usage",
        "days": days,
        "kinds": {
            kind: {
                "jobs": count,
                "seconds": float(total or 0),
                "cost": services.cost(float(total or 0)),
            }
            for kind, count, total in kinds
        },
        "stored_bytes": int(stored or 0),
    }


@router.get("/organization/audit_log", openapi_extra=needs(ADMIN), operation_id="list_audit_log")
def list_audit_log(
    services: Served,
    caller: Called,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    after: Annotated[int | None, Query(ge=1, le=2**62)] = None,
) -> dict[str, Any]:
    """List acts on keys, jobs, files and models, newest first."""
    query = select(AuditRow).where(AuditRow.org_id == caller.org_id)
    if after is not None:
        query = query.where(AuditRow.id < after)
    with services.database.reading() as session:
        rows = list(session.scalars(query.order_by(AuditRow.id.desc()).limit(limit + 1)))
    data = [
        {
            "id": str(row.id),
            "object": "organization.audit_entry",
            "at": int(row.at),
            "act": row.act,
            "subject": row.subject,
            "api_key_id": row.api_key_id,
            "request_id": row.request_id,
        }
        for row in rows[:limit]
    ]
    return views.page(data, has_more=len(rows) > limit)
