"""The HTTP pages for operators and their tools: /health, /ready, /status and /metrics.

A thread serves them from facts that are already known, so pages and jobs never wait for each other.
Nothing can be changed here, so only GET and HEAD are answered. The pages contain no secret, but
they are for operators: `HTTP_HOST` is this machine unless it is set.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from jobs.kinds import JobKind
from utils.errors import ConfigurationError
from utils.events import Progress
from utils.logger import get_logger
from utils.metrics import Metrics, formats

log = get_logger(__name__)

_STOP_SECONDS = 2.0
_CONNECTION_SECONDS = 5.0
_CONNECTIONS = 100
_HEADER_BYTES = 16 * 1024
_KEPT_SECONDS = 1.0
"""The metrics' text is made once per this time: it takes milliseconds of a core that training
needs."""
_BYTES_PER_GB = 10**9
_NO_STORE = {"Cache-Control": "no-store", "Connection": "close"}


class Answers(Protocol):
    """The contents of the pages: a worker's condition, or that of a local training."""

    def health(self) -> dict[str, Any]:
        """Whether the process should go on; the key `problem` is the reason if not."""

    def ready(self) -> dict[str, Any]:
        """Whether a job can be taken: `ready`, and a sentence for each of `checks`."""

    def status(self) -> dict[str, Any]:
        """Facts about the process and its job."""

    def numbers(self) -> dict[str, Any]:
        """The metrics as JSON."""

    def show(self) -> None:
        """Update the metrics that change with time."""


def numbers_of(kind: JobKind, latest: Progress | None, is_training: bool) -> dict[str, Any]:
    """The metrics of a job as JSON.

    Memory is in bytes; the fields that end in `_gb` are in gigabytes. Allocated memory holds the
    trainer's tensors, reserved memory also what its allocator keeps for the next ones.

    Args:
        kind: The kind of the job; without a job, that of the first one that may come.
        latest: The newest report of the trainer; None before there is one.
        is_training: Whether the job runs. Its memory and remaining time are 0 afterwards.
    """
    now = latest if is_training else None
    allocated = (now.gpu_memory_allocated or 0) if now else 0
    reserved = (now.gpu_memory_reserved or 0) if now else 0
    return {
        "current_step": latest.done if latest else 0,
        "total_steps": latest.total if latest else 0,
        **kind.shown(latest.facts if latest else {}).numbers,
        "steps_per_second": latest.per_second if latest else None,
        "estimated_seconds": now.seconds_left if now else None,
        "is_training": is_training,
        "gpu_memory_allocated": allocated,
        "gpu_memory_allocated_gb": round(allocated / _BYTES_PER_GB, 2),
        "gpu_memory_reserved": reserved,
        "gpu_memory_reserved_gb": round(reserved / _BYTES_PER_GB, 2),
    }


class HttpPages:
    """The pages of one worker; a context manager.

    Args:
        host: `HTTP_HOST`.
        port: `HTTP_PORT`; 0 for any that is free, which the log then names.
        condition: The contents of the pages.
        metrics: The contents of `/metrics` for Prometheus.

    Attributes:
        port: The port that the pages are on.

    Raises:
        ConfigurationError: The port is in use or may not be used, or the host is not this
            machine's.
    """

    def __init__(self, host: str, port: int, condition: Answers, metrics: Metrics) -> None:
        self._condition = condition
        self._metrics = metrics
        self._kept: dict[frozenset[str], tuple[float, bytes, str]] = {}
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        routes = {
            "/health": self._health,
            "/ready": self._ready,
            "/status": self._status,
            "/metrics": self._show_metrics,
        }
        app = Starlette(
            routes=[Route(path, _guarded(page), methods=["GET"]) for path, page in routes.items()],
            exception_handlers={404: _refusal, 405: _refusal},
        )
        app.router.redirect_slashes = False  # it would redirect to the host that a request names
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_BriefConnection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=_HEADER_BYTES,
                timeout_graceful_shutdown=1,
            )
        )
        # uvicorn logs every malformed request, and anyone can send one. `_guarded` logs our bugs.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        log.info("http_listening", host=host, port=self.port)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=_STOP_SECONDS)
        self._socket.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])

    async def _health(self, _request: Request) -> Response:
        health = self._condition.health()
        return _json(health, status=503 if "problem" in health else 200)

    async def _ready(self, _request: Request) -> Response:
        ready = self._condition.ready()
        return _json(ready, status=200 if ready["ready"] else 503)

    async def _status(self, _request: Request) -> Response:
        return _json(self._condition.status())

    async def _show_metrics(self, request: Request) -> Response:
        accept = ",".join(request.headers.getlist("accept"))
        wanted = formats(accept)
        if not wanted:
            return _json(self._condition.numbers())
        now = time.monotonic()
        made_at, text, content_type = self._kept.get(wanted, (float("-inf"), b"", ""))
        if now - made_at >= _KEPT_SECONDS:
            self._condition.show()
            text, content_type = self._metrics.render(accept)
            self._kept[wanted] = now, text, content_type
        return Response(text, headers={"Content-Type": content_type, **_NO_STORE})


class _BriefConnection(H11Protocol):
    """A connection for one request, cut off after some seconds.

    If there are many at once, a new one takes the place of the oldest. So a probe is answered even
    if a client holds as many connections as it can open.
    """

    begun_at: float

    def connection_made(self, transport: Any) -> None:
        """uvicorn's hook at the connection's beginning."""
        super().connection_made(transport)
        self.begun_at = self.loop.time()
        self.loop.call_later(_CONNECTION_SECONDS, transport.abort)
        if len(self.connections) > _CONNECTIONS:
            oldest = min(
                (each for each in self.connections if isinstance(each, _BriefConnection)),
                key=lambda each: each.begun_at,
            )
            self.connections.discard(oldest)  # it is closed a moment later and must not count twice
            oldest.transport.abort()


_Page = Callable[[Request], Awaitable[Response]]


def _guarded(page: _Page) -> _Page:
    """The page; a bug goes to the log and not to the client."""

    async def answer(request: Request) -> Response:
        try:
            return await page(request)
        except Exception:  # pylint: disable=broad-exception-caught  # logged
            log.exception("page_broke", page=request.scope["path"])
            return _json({"error": "internal error: see the worker's log"}, status=500)

    return answer


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A new worker must not wait for the end of its predecessor's connections.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host, port))
        opened.listen(_CONNECTIONS)
    except OSError as error:
        opened.close()
        raise ConfigurationError(
            f"The health and metrics pages cannot listen on HTTP_HOST {host}, HTTP_PORT {port} "
            f"({error.strerror}): stop what uses the port, or set another (0 takes any free one)"
        ) from error
    return opened


def _json(content: dict[str, Any], *, status: int = 200) -> Response:
    return JSONResponse(content, status_code=status, headers=_NO_STORE)


async def _refusal(_request: Request, error: Exception) -> Response:
    status: int = getattr(error, "status_code", 404)
    headers = _NO_STORE | ({"Allow": "GET, HEAD"} if status == 405 else {})
    known = "/health, /ready, /status, /metrics"
    return JSONResponse({"error": f"GET one of {known}"}, status_code=status, headers=headers)
