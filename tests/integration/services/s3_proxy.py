"""A proxy in front of an S3 server, with the faults of a test."""

from __future__ import annotations

import dataclasses
import http.client
import socket
import struct
import threading
from collections.abc import Callable, Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY
from services.s3.s3_service import S3Service

_CONDITIONS = ("if-match", "if-none-match")


@dataclasses.dataclass(frozen=True)
class Fault:
    """The fault of one request.

    Attributes:
        status: Answer with this status and `body`; 0 forwards the request.
        body: The body of that answer.
        reset: Reset the connection instead of answering, after forwarding if `forward` is set.
        forward: Whether the S3 server sees the request although its answer does not arrive.
        keep: Send only so many bytes of the body that the head declares.
        flip: Change the body's first byte.
        no_length: Declare no length; the connection's end is the body's.
        delay: Seconds before the answer.
        drip: Seconds between two bytes of the body.
        careless: Forward it without its conditions, as a store does that ignores them.
        path: Forward it with this path instead; empty for its own.
        hide: Headers of the answer that are not passed on.
    """

    status: int = 0
    body: bytes = b""
    reset: bool = False
    forward: bool = True
    keep: int | None = None
    flip: bool = False
    no_length: bool = False
    delay: float = 0.0
    drip: float = 0.0
    careless: bool = False
    path: str = ""
    hide: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """One request that arrived.

    Attributes:
        headers: With names in lower case.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def impatient(endpoint: str, **more: Any) -> S3Service:
    """A service that waits a second for an answer and asks twice."""
    patience = {"connect_timeout": 1.0, "read_timeout": 1.0, "attempts": 2} | more
    return S3Service(
        region=REGION,
        endpoint_url=endpoint,
        access_key_id=ACCESS_KEY_ID,
        secret_access_key=SECRET_ACCESS_KEY,
        **patience,
    )


def refusal(status: int, code: str) -> Fault:
    """S3's own form of an error."""
    return Fault(status, f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode())


class S3Proxy:
    """A context manager; `fault(method, path)` or `judge(request)` chooses each request's fault.

    Attributes:
        endpoint: Its address.
        requests: Method and path of every request so far.
        headers: The headers of each, names in lower case.
    """

    def __init__(self, target: str) -> None:
        self.fault: Callable[[str, str], Fault | None]
        self.judge: Callable[[Request], Fault | None]
        self.requests: list[str]
        self.headers: list[dict[str, str]]
        self.reset()
        self.closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._server.target = urlsplit(target).netloc
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def reset(self) -> None:
        """Remove all faults, and forget the requests."""
        self.fault = lambda method, path: None
        self.judge = lambda request: None
        self.requests = []
        self.headers = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: S3Proxy
    target: str

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: some tests let clients hang up."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # pylint: disable=redefined-builtin
        """Print nothing."""

    def _handle(self) -> None:
        proxy = self.server.proxy
        proxy.requests.append(f"{self.command} {self.path}")
        headers_sent = {name.lower(): value for name, value in self.headers.items()}
        proxy.headers.append(headers_sent)
        told = proxy.fault(self.command, self.path)
        sent = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        request = Request(self.command, self.path, headers_sent, sent)
        fault = told or proxy.judge(request) or Fault()
        self.close_connection = True
        status, headers, body = fault.status, [("Content-Type", "application/xml")], fault.body
        if not fault.status and fault.forward:
            without = _CONDITIONS if fault.careless else ()
            status, headers, body = self._forward(fault.path or self.path, sent, without)
        proxy.closing.wait(fault.delay)
        if fault.reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            return
        self._answer(fault, status, headers, body)

    def _forward(
        self, path: str, sent: bytes, without: Collection[str]
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection(self.server.target, timeout=30)
        left_out = {"expect", *without}
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in left_out
        }
        try:
            upstream.request(self.command, path, body=sent, headers=headers)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _answer(
        self, fault: Fault, status: int, headers: list[tuple[str, str]], body: bytes
    ) -> None:
        hidden = {"connection", "transfer-encoding", *fault.hide} | (
            {"content-length"} if fault.no_length else set()
        )
        names = {name.lower() for name, _ in headers}
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in hidden:
                self.send_header(name, value)
        if "content-length" not in names and not fault.no_length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if fault.flip:
            body = bytes([body[0] ^ 1]) + body[1:]
        body = body[: fault.keep] if self.command != "HEAD" else b""
        for piece in [body[i : i + 1] for i in range(len(body))] if fault.drip else [body]:
            self.wfile.write(piece)
            if fault.drip and self.server.proxy.closing.wait(fault.drip):
                return

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle


def once(fault: Fault, *methods: str) -> Callable[[str, str], Fault | None]:
    """The fault for the first request with one of these methods, nothing for the others."""
    left = [fault]

    def script(method: str, _path: str) -> Fault | None:
        return left.pop() if left and method in methods else None

    return script


def always(fault: Fault) -> Callable[[str, str], Fault | None]:
    """The fault for every request."""
    return lambda _method, _path: fault
