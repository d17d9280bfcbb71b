"""Sign in with an API key, sign out, and the list of sessions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse

from api.gate.keys import READ
from api.page import rendering, sessions
from api.page.gate import (
    SESSION_COOKIE,
    VISITOR_COOKIE,
    PageRoute,
    local_path,
    page_scope,
    set_cookie,
)
from api.page.visit import Visited

router = APIRouter(route_class=PageRoute, include_in_schema=False)
MAX_KEY = 200
Next = Annotated[str | None, Query(alias="next", max_length=2000)]


@router.get("/login")
def show_login(visit: Visited, target: Next = None) -> Response:
    """The form for an API key."""
    if visit.caller is not None:
        return RedirectResponse(local_path(target), 303)
    return rendering.page(visit, "login.html.j2", target=local_path(target), is_wrong=False)


@router.post("/login")
def login(request: Request, visit: Visited) -> Response:
    """Begin a session, with a new cookie."""
    target = local_path(visit.fields.get("next"))
    services, secret = visit.services, visit.fields.get("key", "").strip()
    visitor = f"login:{request.client.host if request.client else ''}"
    services.rates.request(visitor)
    is_possible = secret.isascii() and 0 < len(secret) <= MAX_KEY
    caller = services.keys.caller(secret) if is_possible else None
    if caller is None or READ not in caller.scopes:
        response = rendering.page(visit, "login.html.j2", target=target, is_wrong=True)
        response.status_code = 401
        return response
    if visit.session_id:
        sessions.end(services, visit.cookie)
    cookie = sessions.begin(services, caller, request.headers.get("user-agent", ""))
    answer = RedirectResponse(target, 303)
    set_cookie(request, answer, SESSION_COOKIE, cookie, int(sessions.LIFETIME_SECONDS))
    answer.delete_cookie(VISITOR_COOKIE, path="/")
    return answer


@router.post("/logout", openapi_extra=page_scope(READ))
def logout(visit: Visited) -> Response:
    """End the session."""
    sessions.end(visit.services, visit.cookie)
    response = RedirectResponse("/login", 303)
    response.delete_cookie(SESSION_COOKIE, path="/")
    return response


@router.get("/sessions", openapi_extra=page_scope(READ))
def list_sessions(visit: Visited) -> Response:
    """The sessions of the organisation; a key that is not an admin's sees only its own."""
    rows = sessions.listed(visit.services, visit.known.org_id)
    if not visit.may("admin"):
        rows = [row for row in rows if row.api_key_id == visit.known.key_id]
    return rendering.page(visit, "sessions.html.j2", rows=rows)


@router.post("/sessions/{public_id}/end", openapi_extra=page_scope(READ))
def end_session(visit: Visited, public_id: str) -> Response:
    """End one of the sessions that the visitor sees."""
    own = sessions.listed(visit.services, visit.known.org_id)
    for row in own:
        if row.public_id == public_id and (
            visit.may("admin") or row.api_key_id == visit.known.key_id
        ):
            sessions.revoke(visit.services, visit.known.org_id, public_id)
    return RedirectResponse("/sessions", 303)
