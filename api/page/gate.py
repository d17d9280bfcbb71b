"""The gate before every route of the page: session, scope, forms of this site only, and errors.

A route states the scope that it needs (`x-scope`), as the routes of the API do; without one it is
public. Errors are answered with a page, and a visitor without a session is sent to `/login`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from api.gate import cleaning
from api.gate.guard import SCOPE, Handler, check_address, services_of
from api.gate.keys import DEFAULT_ORG, OPEN_KEY, SCOPES, Caller
from api.gate.problems import Problem, of_validation
from api.page import rendering, sessions
from api.page.catalogue import Texts, chosen, languages
from api.page.visit import Visit, visit_of
from api.services import Services
from api.store.database import DatabaseAway
from utils.errors import StorageError
from utils.logger import get_logger

log = get_logger(__name__)

SESSION_COOKIE = "training_session"
VISITOR_COOKIE = "training_visitor"
"""Ties forms to a visitor who has no session: the form of `/login`, and all in open mode."""
LANGUAGE_COOKIE = "training_language"
TOKEN_FIELD = "form_token"
TOKEN_HEADER = "x-form-token"
UPLOADS = "x-uploads"
"""Marks a route whose form has files: it reads the body itself, after the token in its address."""
MAX_FORM_BYTES = 2 * 1024**2
MAX_FIELDS = 3000
_YEAR = 365 * 86_400
_LOCAL_PATH = re.compile(r"/(?:[A-Za-z0-9_.~:=&?%+-][A-Za-z0-9_.~:=&?%+/-]*)?")


def page_scope(scope: str) -> dict[str, Any]:
    """The `openapi_extra` of a page that needs a scope."""
    return {SCOPE: scope}


class PageRoute(APIRoute):
    """A route of the page, behind its gate."""

    def get_route_handler(self) -> Handler:
        """The handler of FastAPI, behind the gate."""
        handler = super().get_route_handler()
        extra = self.openapi_extra or {}
        scope, has_files = extra.get(SCOPE), bool(extra.get(UPLOADS))

        async def guarded(request: Request) -> Response:
            services = services_of(request)
            texts = chosen(
                request.query_params.get("lang") or request.cookies.get(LANGUAGE_COOKIE),
                request.headers.get("accept-language", ""),
            )
            request.state.visit = Visit(services, None, "", "", texts)
            try:
                response = await _admitted(request, services, texts, scope, has_files, handler)
            except (Problem, RequestValidationError, DatabaseAway, StorageError) as error:
                response = _failed(request, _problem_of(error))
            _remember(request, response)
            return rendering.secured(response)

        return guarded


async def _admitted(
    request: Request,
    services: Services,
    texts: Texts,
    scope: str | None,
    has_files: bool,
    handler: Handler,
) -> Response:
    check_address(request)
    visit = await run_in_threadpool(_recognised, request, services, texts)
    visit = dataclasses.replace(visit, here=_here(request))
    request.state.visit = visit
    request.state.raw_body = b""
    if scope is not None:
        if visit.caller is None:
            return _to_login(request)
        services.rates.request(visit.caller.key_id)
        if scope not in visit.caller.scopes:
            raise Problem("scope_missing", f"This page needs an API key with the scope {scope}.")
    if request.method == "POST":
        _require_this_site(request, services)
        fields = {} if has_files else await _fields(request)
        _require_token(request, services, visit.cookie, fields)
        request.state.visit = dataclasses.replace(visit, fields=fields)
    return await handler(request)


def _recognised(request: Request, services: Services, texts: Texts) -> Visit:
    cookie = request.cookies.get(SESSION_COOKIE, "")
    if found := sessions.find(services, cookie):
        return Visit(services, found.caller, found.public_id, cookie, texts)
    visitor = request.cookies.get(VISITOR_COOKIE, "") or sessions.new_cookie()
    if services.is_open:
        everything = Caller(DEFAULT_ORG, OPEN_KEY, frozenset(SCOPES))
        return Visit(services, everything, "", visitor, texts)
    return Visit(services, None, "", visitor, texts)


def _require_this_site(request: Request, services: Services) -> None:
    """Refuse a form that the browser states to be of another site."""
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin")
    own = {request.headers.get("host", "")}
    if services.settings.api_public_url:
        own.add(urlsplit(str(services.settings.api_public_url)).netloc)
    if site not in ("same-origin", "none") or (origin and urlsplit(origin).netloc not in own):
        raise Problem("form_refused", "The form was sent from another site.")


def _require_token(
    request: Request, services: Services, cookie: str, fields: dict[str, str]
) -> None:
    given = fields.pop(TOKEN_FIELD, "") or request.headers.get(TOKEN_HEADER, "")
    given = given or request.query_params.get(TOKEN_FIELD, "")
    if not sessions.is_form_token(services, cookie, given):
        raise Problem(
            "form_refused", "The form is of another session. Open the page again, and repeat it."
        )


async def _fields(request: Request) -> dict[str, str]:
    """The fields of an ordinary form; the values of a repeated field are separated by newlines."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise Problem("too_large", f"A form may have {MAX_FORM_BYTES:,} bytes.")
    request.state.raw_body = bytes(body)
    try:
        pairs = parse_qsl(body.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError as error:
        raise Problem("invalid_parameter", f"The form cannot be read: {error}.") from None
    found: dict[str, str] = {}
    for name, value in pairs:
        cleaning.check_text(name, "form")
        cleaning.check_text(value, name)
        found[name] = f"{found[name]}\n{value}" if name in found else value
    return found


def local_path(given: str | None) -> str:
    """A path on this server to go to; `/` in place of anything that leads elsewhere."""
    if given and _LOCAL_PATH.fullmatch(given):
        return given
    return "/"


def _here(request: Request) -> str:
    """The address of a page without the choice of a language; `/jobs` for a form."""
    if request.method != "GET":
        return "/jobs"
    kept = [pair for pair in request.query_params.multi_items() if pair[0] != "lang"]
    return local_path(request.url.path + (f"?{urlencode(kept)}" if kept else ""))


def _to_login(request: Request) -> Response:
    if request.method != "GET" or "text/event-stream" in request.headers.get("accept", ""):
        raise Problem("session_ended", "You are not signed in, or your session has ended.")
    target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"/login?next={quote(target, safe='/')}", 303)


def _problem_of(
    error: Problem | RequestValidationError | DatabaseAway | StorageError,
) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return of_validation(error)
    if isinstance(error, DatabaseAway):
        log.warning("database_away", reason=str(error))
        return Problem("database_away", str(error))
    log.warning("storage_away", reason=str(error))
    return Problem("storage_away", "The object storage cannot be used now. Try again.")


def _failed(request: Request, problem: Problem) -> Response:
    response = rendering.page(visit_of(request), "error.html.j2", problem=problem)
    response.status_code = problem.status
    for name, value in problem.headers.items():
        response.headers[name] = value
    return response


def is_secure(request: Request) -> bool:
    """Whether the visitor's browser reaches this server over https."""
    public = visit_of(request).services.settings.api_public_url
    return request.url.scheme == "https" or bool(public and str(public).startswith("https:"))


def set_cookie(request: Request, response: Response, name: str, value: str, seconds: int) -> None:
    """Set a cookie that no script and no other site can use."""
    response.set_cookie(
        name,
        value,
        max_age=seconds,
        path="/",
        secure=is_secure(request),
        httponly=True,
        samesite="lax",
    )


def _remember(request: Request, response: Response) -> None:
    """Keep the visitor's secret and language in cookies."""
    visit = visit_of(request)
    if (tag := request.query_params.get("lang")) in languages():
        set_cookie(request, response, LANGUAGE_COOKIE, str(tag), _YEAR)
    if visit.cookie and not visit.session_id:
        if request.cookies.get(VISITOR_COOKIE) != visit.cookie:
            set_cookie(request, response, VISITOR_COOKIE, visit.cookie, 86_400)
