"""A stand-in for the platform's backend that checks every request as the contract says.

It verifies bearer, source and Standard Webhooks signature (docs/protocol.md, section 3), keeps all
that it was told, and can be told to answer otherwise: late, wrongly, drop by drop or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple, Self

from standardwebhooks import Webhook, WebhookVerificationError

PROGRESS = "/api/webhooks/training/progress"
COMPLETE = "/api/webhooks/training/complete"
FAILED = "/api/webhooks/training/failed"

TOKEN = "sandbox-internal-api-token-of-more-than-32-characters"
SIGNING_SECRET = "whsec_c2FuZGJveC1zaWduaW5nLXNlY3JldC0wMTIzNDU2Nzg5"

# Route -> method, and the fields without which the backend answers 400.
ROUTES: dict[str, tuple[str, frozenset[str]]] = {
    PROGRESS: ("PATCH", frozenset({"style_id", "progress"})),
    COMPLETE: (
        "POST",
        frozenset({"style_id", "model_url", "model_path", "metadata", "training_metric"}),
    ),
    FAILED: ("POST", frozenset({"style_id", "error_message", "error_code"})),
}
_WANTED_HEADERS = {"x-request-source": "training-server", "content-type": "application/json"}
_KEPT_HEADERS = (
    "content-type",
    "user-agent",
    "webhook-id",
    "traceparent",
    "webhook-timestamp",
    "x-request-source",
)


@dataclasses.dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """One request.

    Attributes:
        path: Its path.
        method: Its method.
        headers: Some of its headers, names in lower case; never the token.
        body: Its JSON body; None where it had none that can be read.
        received_at: Seconds on `time.monotonic`.
        webhook_id: Its `webhook-id`.
        status: What it was answered; 0 for a connection that was reset instead.
        reason: Why it was refused; empty otherwise.
    """

    path: str
    method: str
    headers: Mapping[str, str]
    body: Any
    received_at: float
    webhook_id: str
    status: int = 200
    reason: str = ""

    @property
    def task_id(self) -> str | None:
        """The task that it is about."""
        return self.body.get("task_id") if isinstance(self.body, dict) else None

    @property
    def accepted(self) -> bool:
        """Whether the answer was a 2xx."""
        return 200 <= self.status < 300


class Answer(NamedTuple):
    """What to answer.

    Attributes:
        status: HTTP status.
        headers: More headers.
        body: The body.
        delay: Seconds before the answer begins.
        reset: Reset the connection instead of answering.
        drip: Seconds between two bytes of the whole answer, its head included.
    """

    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes = b'{"status": "ok"}'
    delay: float = 0.0
    reset: bool = False
    drip: float = 0.0


class Backend:
    """A context manager: the backend listens while the block runs.

    Args:
        token: The bearer token that it accepts.
        secrets: Signing secrets; a request must verify with every one of them.
        answer: Asked for each verified request; None answers as the real backend does. A plain
            (status, headers, body) does as well.
        on_request: Told of each verified request.
        host, port: Where it listens; port 0 takes any free one.

    Attributes:
        url: Its origin, `http://127.0.0.1:port`.
        answer: May be exchanged at any time.
    """

    def __init__(
        self,
        *,
        token: str = TOKEN,
        secrets: Collection[str] = (SIGNING_SECRET,),
        answer: Callable[[ReceivedRequest], tuple[Any, ...] | None] | None = None,
        on_request: Callable[[ReceivedRequest], None] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.answer = answer
        self._token = token
        self._webhooks = [Webhook(secret) for secret in secrets]
        self._on_request = on_request
        self._changed = threading.Condition()
        self._requests: list[ReceivedRequest] = []
        self._rejected: list[ReceivedRequest] = []
        self.closing = threading.Event()
        self._server = _Server(self, (host, port))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, name="backend"
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def requests(self) -> tuple[ReceivedRequest, ...]:
        """Every verified request so far, in order of arrival."""
        with self._changed:
            return tuple(self._requests)

    @property
    def rejected(self) -> tuple[ReceivedRequest, ...]:
        """Every request that was not as the contract wants it."""
        with self._changed:
            return tuple(self._rejected)

    def progress(self, task_id: str | None = None) -> tuple[ReceivedRequest, ...]:
        """The progress reports, of one task or of all."""
        return self._of((PROGRESS,), task_id)

    def endings(self, task_id: str | None = None) -> tuple[ReceivedRequest, ...]:
        """The endings, every attempt to deliver them included."""
        return self._of((COMPLETE, FAILED), task_id)

    def wait_for_ending(self, task_id: str, timeout: float = 60.0) -> ReceivedRequest:
        """The first ending of a task that was accepted.

        Raises:
            TimeoutError: There was none in time; the text says what there was.
        """

        def accepted() -> list[ReceivedRequest]:
            return [each for each in self.endings(task_id) if each.accepted]

        with self._changed:
            if not self._changed.wait_for(accepted, timeout):
                heard = [(each.path, each.task_id, each.status) for each in self._requests[-10:]]
                raise TimeoutError(f"no ending of {task_id} in {timeout} s; last heard {heard}")
            return accepted()[0]

    def _of(self, paths: Collection[str], task_id: str | None) -> tuple[ReceivedRequest, ...]:
        return tuple(
            each
            for each in self.requests
            if each.path in paths and (task_id is None or each.task_id == task_id)
        )

    def handle(self, method: str, path: str, headers: Mapping[str, str], raw: bytes) -> Answer:
        """Judge one request, remember it, and say what to answer."""
        headers = {name.lower(): value for name, value in headers.items()}
        request = ReceivedRequest(
            path=path,
            method=method,
            headers={name: headers[name] for name in _KEPT_HEADERS if name in headers},
            body=_json(raw),
            received_at=time.monotonic(),
            webhook_id=headers.get("webhook-id", ""),
        )
        refusal = self._refusal(request, headers, raw)
        if refusal:
            status, reason = refusal
            with self._changed:
                self._rejected.append(dataclasses.replace(request, status=status, reason=reason))
            return Answer(status, body=json.dumps({"error": reason}).encode())
        scripted = self.answer(request) if self.answer else None
        answer = _usual(request) if scripted is None else Answer(*scripted)
        request = dataclasses.replace(request, status=0 if answer.reset else answer.status)
        with self._changed:
            self._requests.append(request)
            self._changed.notify_all()
        if self._on_request:
            self._on_request(request)
        return answer

    def _refusal(
        self, request: ReceivedRequest, headers: Mapping[str, str], raw: bytes
    ) -> tuple[int, str] | None:
        bearer = headers.get("authorization", "").encode()
        if not hmac.compare_digest(bearer, f"Bearer {self._token}".encode()):
            return 401, "the bearer token is not the right one"
        for name, wanted in _WANTED_HEADERS.items():
            if headers.get(name) != wanted:
                return 400, f"{name} is not {wanted}"
        for webhook in self._webhooks:
            try:
                webhook.verify(raw, dict(headers), json_parse=False)
            except (WebhookVerificationError, ValueError) as error:
                return 400, f"the signature does not verify: {error}"
        if ROUTES.get(request.path, ("",))[0] != request.method:
            return 404, "there is no such route"
        return None


def _usual(request: ReceivedRequest) -> Answer:
    """What the real backend answers to a verified request."""
    present = set(request.body) if isinstance(request.body, dict) else set()
    wanted = ROUTES[request.path][1]
    if "kind" in present:  # other kinds name their subject in place of a style
        wanted = wanted - {"style_id"} | {"subject"}
    if missing := wanted - present:
        return Answer(400, body=json.dumps({"missing": sorted(missing)}).encode())
    return Answer()


def _json(raw: bytes) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(raw)
    return None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, backend: Backend, address: tuple[str, int]) -> None:
        super().__init__(address, _Handler)
        self.backend = backend

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # pylint: disable=redefined-builtin
        """Say nothing."""

    def _answer(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        answer = self.server.backend.handle(self.command, self.path, dict(self.headers), raw)
        self.server.backend.closing.wait(answer.delay)
        if answer.reset:
            # A linger time of nought turns the close into a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            return
        head = [f"HTTP/1.1 {answer.status} Scripted", f"Content-Length: {len(answer.body)}"]
        head += [f"{name}: {value}" for name, value in answer.headers.items()]
        whole = "\r\n".join(head).encode() + b"\r\n\r\n" + answer.body
        for piece in [bytes([byte]) for byte in whole] if answer.drip else [whole]:
            self.wfile.write(piece)
            if answer.drip and self.server.backend.closing.wait(answer.drip):
                return

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer
