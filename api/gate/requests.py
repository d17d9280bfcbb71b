"""Middleware: each request has an id, in its answer and in the log; it is counted and timed."""

from __future__ import annotations

import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.gate import problems
from utils.logger import get_logger
from utils.metrics import ApiMetrics

log = get_logger(__name__)

_UNMATCHED = "unmatched"
_STREAMS = ("/events",)


class RequestMiddleware:
    """The outermost middleware. An error that nothing has handled becomes a 500 with the id.

    Args:
        app: The application.
        metrics: Count requests.
    """

    def __init__(self, app: ASGIApp, metrics: ApiMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope["request_id"] = request_id
        begun, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # pylint: disable=broad-exception-caught
            log.exception(
                "request_failed",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                error=type(error).__name__,
            )
            if status:
                raise
            detail = f"The server has failed. Its log has the request {request_id}."
            answer = problems.answer_to(problems.Problem("internal", detail), request_id)
            await answer(scope, receive, send_with_id)
        finally:
            self._count(scope, status, time.monotonic() - begun)
            log.debug(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
            )

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", _UNMATCHED)
        self._metrics.requests.labels(scope["method"], route, str(status)).inc()
        if not route.endswith(_STREAMS):
            self._metrics.request_seconds.labels(route).observe(seconds)
