"""Errors of the API: problem+json (RFC 9457) with OpenAI's `error` object in it.

`CODES` is the table of all codes. `type` is the address of a page about the code, which the server
answers itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from api.store.database import DatabaseAway
from utils.errors import StorageError
from utils.logger import get_logger

log = get_logger(__name__)

MEDIA_TYPE = "application/problem+json"
MAX_DETAIL = 2000

CODES: dict[str, tuple[int, str]] = {
    "invalid_json": (400, "The body is not valid JSON"),
    "invalid_parameter": (400, "A parameter is wrong"),
    "path_not_accepted": (400, "A path of a disk is not accepted"),
    "method_not_supported": (400, "This method of training is not supported"),
    "invalid_signature": (400, "The webhook is not signed as it must be"),
    "missing_key": (401, "An API key is needed"),
    "unknown_key": (401, "The API key is not valid"),
    "scope_missing": (403, "The API key lacks a scope"),
    "session_ended": (401, "You are not signed in"),
    "form_refused": (403, "The form was refused"),
    "organization_mismatch": (403, "The organisation is not that of the API key"),
    "not_found": (404, "There is nothing at this address"),
    "file_not_found": (404, "There is no such file"),
    "upload_not_found": (404, "There is no such upload"),
    "job_not_found": (404, "There is no such job"),
    "model_not_found": (404, "There is no such model"),
    "key_not_found": (404, "There is no such API key"),
    "draft_not_found": (404, "There is no such draft"),
    "endpoint_not_found": (404, "There is no such webhook endpoint"),
    "report_not_found": (404, "There is no report"),
    "method_not_allowed": (405, "This method is not allowed here"),
    "job_has_ended": (409, "The job has ended"),
    "job_is_running": (409, "The job is running"),
    "job_not_paused": (409, "The job is not paused"),
    "upload_has_ended": (409, "The upload has ended"),
    "file_deleted": (410, "The file was deleted"),
    "too_large": (413, "The body is too large"),
    "unsupported_media_type": (415, "The type of the body is not supported"),
    "idempotency_key_reused": (422, "The idempotency key belongs to another request"),
    "order_invalid": (422, "The job cannot be done as ordered"),
    "rate_limited": (429, "Too many requests"),
    "internal": (500, "The server has failed"),
    "kind_not_offered": (501, "This server does not do jobs of this kind"),
    "format_not_offered": (501, "This is not offered"),
    "no_engine": (503, "No engine serves models here"),
    "database_away": (503, "The database cannot be used now"),
    "storage_away": (503, "The object storage cannot be used now"),
    "storage_full": (507, "The organisation's storage is full"),
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_BY_STATUS = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}


class Problem(Exception):
    """An error that the client gets as problem+json.

    Args:
        code: One of `CODES`.
        detail: A sentence with the failure and its remedy.
        param: The parameter that is wrong.
        errors: All wrong parameters, with `param` and `detail`.
        headers: More headers of the answer.
        more: More members of the answer.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        errors: Sequence[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.param = param
        self.errors = errors
        self.headers = dict(headers or {})
        self.more = more

    @property
    def status(self) -> int:
        """HTTP status."""
        return CODES[self.code][0]

    def body(self, request_id: str) -> dict[str, Any]:
        """The members of the answer."""
        status, title = CODES[self.code]
        errors = list(self.errors)
        if self.param and not errors:
            errors = [{"param": self.param, "detail": self.detail}]
        return {
            "type": f"/problems/{self.code}",
            "title": title,
            "status": status,
            "detail": self.detail[:MAX_DETAIL],
            "code": self.code,
            "request_id": request_id,
            **({"errors": errors} if errors else {}),
            **self.more,
            "error": {
                "message": self.detail[:MAX_DETAIL],
                "type": _OPENAI_TYPES.get(
                    status, "server_error" if status >= 500 else "invalid_request_error"
                ),
                "param": self.param,
                "code": self.code,
            },
        }


def answer_to(problem: Problem, request_id: str) -> JSONResponse:
    """The answer for a problem."""
    headers = dict(problem.headers)
    if problem.status == 409:
        headers["x-should-retry"] = "false"  # OpenAI's client would try again
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if problem.status == 503:
        headers.setdefault("Retry-After", "2")
    return JSONResponse(
        problem.body(request_id), problem.status, headers=headers, media_type=MEDIA_TYPE
    )


def request_id_of(request: Request) -> str:
    """The id of the request, which the answer and the log carry."""
    return str(request.scope.get("request_id", ""))


def add_handlers(app: FastAPI) -> None:
    """Have every error of a route answered as a problem."""

    @app.exception_handler(Problem)
    def known(request: Request, problem: Problem) -> JSONResponse:
        return answer_to(problem, request_id_of(request))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer_to(of_validation(error), request_id_of(request))

    @app.exception_handler(HTTPException)
    def plain(request: Request, error: HTTPException) -> JSONResponse:
        code = _BY_STATUS.get(error.status_code, "invalid_parameter")
        allow = (
            {"Allow": error.headers["Allow"]} if error.headers and "Allow" in error.headers else {}
        )
        problem = Problem(
            code, f"{request.method} {request.url.path}: {error.detail}.", headers=allow
        )
        return answer_to(problem, request_id_of(request))

    @app.exception_handler(DatabaseAway)
    def without_database(request: Request, error: DatabaseAway) -> JSONResponse:
        log.warning("database_away", reason=str(error))
        return answer_to(Problem("database_away", str(error)), request_id_of(request))

    @app.exception_handler(StorageError)
    def without_storage(request: Request, error: StorageError) -> JSONResponse:
        log.warning("storage_away", reason=str(error))
        detail = "The object storage cannot be used now. Try again."
        return answer_to(Problem("storage_away", detail), request_id_of(request))


def of_validation(error: RequestValidationError) -> Problem:
    """Pydantic's complaints as sentences that name the parameters, all at once."""
    found = [(_param(each["loc"]), _sentence(each)) for each in error.errors()]
    if any(each["type"] == "json_invalid" for each in error.errors()):
        return Problem("invalid_json", f"The body is not valid JSON: {found[0][1]}")
    errors = [{"param": param, "detail": detail} for param, detail in found]
    detail = "; ".join(f"{param}: {text}" for param, text in found)
    return Problem("invalid_parameter", detail + ".", param=found[0][0], errors=errors)


def _param(place: Sequence[int | str]) -> str:
    names = [str(part) for part in place[1:]] or [str(part) for part in place]
    return ".".join(names)


def _sentence(error: Mapping[str, Any]) -> str:
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "json_invalid":
        return str(error.get("ctx", {}).get("error", "it cannot be read"))
    if error["type"] == "extra_forbidden":
        return "is not a parameter of this request"
    text = str(error["msg"]).removeprefix("Value error, ")
    return text[0].lower() + text[1:]


@dataclasses.dataclass(frozen=True, slots=True)
class CodePage:
    """The page about one code."""

    code: str
    status: int
    title: str
