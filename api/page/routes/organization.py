"""Models, API keys, limits and usage of the organisation."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from pydantic import ValidationError

from api.gate.keys import ADMIN, READ, SCOPES, TRAIN
from api.gate.paging import Page
from api.gate.problems import Problem
from api.page import rendering
from api.page.gate import PageRoute, page_scope
from api.page.visit import Visit, Visited
from api.routes import models, organization

router = APIRouter(route_class=PageRoute, include_in_schema=False)
PER_PAGE = 50
USAGE_DAYS = 30
_LIMITS = ("max_concurrent_trainings", "creates_per_minute", "storage_bytes")


@router.get("/models", openapi_extra=page_scope(READ))
def list_models(
    visit: Visited, after: Annotated[str | None, Query(max_length=255)] = None
) -> Response:
    """The models of the organisation."""
    found = models.list_models(Page(PER_PAGE, after, "desc"), visit.services, visit.known)
    return rendering.page(
        visit,
        "models.html.j2",
        models=found["data"],
        more=found["last_id"] if found["has_more"] else None,
    )


@router.post("/models/delete", openapi_extra=page_scope(TRAIN))
def delete_model(request: Request, visit: Visited) -> Response:
    """Delete a model and its files."""
    models.delete_model(visit.fields.get("model", ""), request, visit.services, visit.known)
    return RedirectResponse("/models", 303)


@router.get("/organization", openapi_extra=page_scope(READ))
def show(visit: Visited) -> Response:
    """Keys, limits and usage."""
    return _shown(visit)


def _shown(visit: Visit, new_key: str = "") -> Response:
    services, caller = visit.services, visit.known
    keys = []
    if visit.may(ADMIN):
        keys = organization.list_api_keys(Page(100, None, "desc"), services, caller)["data"]
    return rendering.page(
        visit,
        "organization.html.j2",
        organization=organization.get_organization(services, caller),
        limits=organization.get_limits(services, caller),
        usage=organization.get_usage(services, caller, USAGE_DAYS),
        keys=keys,
        scopes=SCOPES,
        new_key=new_key,
    )


@router.post("/organization/keys", openapi_extra=page_scope(ADMIN))
def create_key(request: Request, visit: Visited) -> Response:
    """Create a key. The answer shows it, once."""
    fields = visit.fields
    days = fields.get("days", "").strip()
    try:
        order = organization.KeyOrder.model_validate(
            {
                "name": fields.get("name", ""),
                "scopes": [each for each in fields.get("scopes", "").split("\n") if each],
                "expires_in_days": int(days) if days.isascii() and days.isdigit() else None,
            }
        )
    except ValidationError as error:
        raise _sentence(error) from None
    made = organization.create_api_key(order, request, visit.services, visit.known)
    return _shown(visit, made["value"])


@router.post("/organization/keys/{key_id}/revoke", openapi_extra=page_scope(ADMIN))
def revoke_key(request: Request, visit: Visited, key_id: str) -> Response:
    """Revoke a key. Its sessions end, too."""
    organization.revoke_api_key(key_id, request, visit.services, visit.known)
    return RedirectResponse("/organization", 303)


@router.post("/organization/limits", openapi_extra=page_scope(ADMIN))
def set_limits(request: Request, visit: Visited) -> Response:
    """Set the limits of the organisation."""
    values = {
        name: int(text)
        for name in _LIMITS
        if (text := visit.fields.get(name, "").strip()).isascii() and text.isdigit()
    }
    try:
        order = organization.Limits.model_validate(values)
    except ValidationError as error:
        raise _sentence(error) from None
    organization.set_limits(order, request, visit.services, visit.known)
    return RedirectResponse("/organization", 303)


def _sentence(error: ValidationError) -> Problem:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    return Problem("invalid_parameter", f"{name}: {first['msg']}.", param=name)
