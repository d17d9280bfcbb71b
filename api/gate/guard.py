"""The gate before every route: key, scope, rate limit, and a body that can be stored.

The key is checked before the body is read. A route states the scope that it needs in its OpenAPI
description (`x-scope`); a route without one is public.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from api.gate import cleaning
from api.gate.keys import DEFAULT_ORG, OPEN_KEY, SCOPES, Caller
from api.gate.problems import Problem
from api.services import Services

MAX_JSON_BYTES = 1024**2
SCOPE = "x-scope"
BODY_LIMIT = "x-body-limit"

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def needs(scope: str, *, body_limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The `openapi_extra` of a route that needs a scope.

    Args:
        body_limit: The most bytes of its JSON body.
    """
    return {SCOPE: scope, BODY_LIMIT: body_limit, "security": [{"key": []}]}


class GuardedRoute(APIRoute):
    """A route behind the gate."""

    def get_route_handler(self) -> Handler:
        """The handler of FastAPI, behind the gate."""
        handler = super().get_route_handler()
        extra = self.openapi_extra or {}
        scope, limit = extra.get(SCOPE), extra.get(BODY_LIMIT, MAX_JSON_BYTES)

        async def guarded(request: Request) -> Response:
            if scope is not None:
                services = services_of(request)
                caller = await run_in_threadpool(authenticate, request, services, scope)
                request.state.caller = caller
                services.rates.request(caller.key_id)
            check_address(request)
            await check_body(request, limit)
            return await handler(request)

        return guarded


def services_of(request: Request) -> Services:
    """The services of the application."""
    services: Services = request.app.state.services
    return services


def caller_of(request: Request) -> Caller:
    """The caller of the request."""
    caller: Caller = request.state.caller
    return caller


Served = Annotated[Services, Depends(services_of)]
Called = Annotated[Caller, Depends(caller_of)]


def authenticate(request: Request, services: Services, scope: str) -> Caller:
    """Check the key of a request, and that it has a scope.

    Raises:
        Problem: 401 or 403.
    """
    header = request.headers.get("authorization")
    if header is None:
        if services.is_open:
            return Caller(DEFAULT_ORG, OPEN_KEY, frozenset(SCOPES))
        raise Problem(
            "missing_key", "No API key was given. Send the header Authorization: Bearer sk-…."
        )
    kind, _, secret = header.partition(" ")
    secret = secret.strip()
    caller = None
    if kind.lower() == "bearer" and secret.isascii() and "\x00" not in secret:
        caller = services.keys.caller(secret)
    if caller is None:
        raise Problem("unknown_key", "The API key is unknown, expired or revoked.")
    if scope not in caller.scopes:
        raise Problem(
            "scope_missing",
            f"This request needs an API key with the scope {scope}. Create one with "
            "POST /v1/organization/api_keys.",
            scope=scope,
        )
    return caller


def check_address(request: Request) -> None:
    """Refuse text in the path, the query and some headers that cannot be stored."""
    for name, value in (*request.query_params.multi_items(), *request.path_params.items()):
        cleaning.check_text(name, "query")
        cleaning.check_text(str(value), name)
    for name in ("idempotency-key", "last-event-id"):
        value = request.headers.get(name, "")
        if not value.isascii() or "\x00" in value or len(value) > 255:
            raise Problem(
                "invalid_parameter",
                f"The header {name} must be at most 255 ASCII characters.",
                param=name,
            )


async def check_body(request: Request, limit: int) -> None:
    """Read a JSON body up to its limit, and refuse values that cannot be stored."""
    request.state.raw_body = b""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method not in ("POST", "PUT", "PATCH", "DELETE") or not (
        kind == "application/json" or kind.endswith("+json")
    ):
        return
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise _too_large(limit)
    request._body = bytes(body)  # pylint: disable=protected-access  # as `Request.body` does
    request.state.raw_body = bytes(body)
    if body:
        cleaning.loads(request._body)  # pylint: disable=protected-access


def _too_large(limit: int) -> Problem:
    return Problem(
        "too_large",
        f"The body of this request may have {limit:,} bytes. Upload larger content as a file "
        "(POST /v1/files or POST /v1/uploads) and name the file instead.",
    )
