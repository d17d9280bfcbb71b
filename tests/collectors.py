"""Real receivers of a worker's telemetry: an OTLP collector, and a Sentry project."""

from __future__ import annotations

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

# pylint: disable=no-name-in-module  # protobuf makes these when they are imported
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Receiver:
    """An HTTP server that keeps every POST: path, headers (lower case), body unpacked."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, str], bytes]] = []
        posts = self.posts

        class Handler(BaseHTTPRequestHandler):
            # pylint: disable=missing-class-docstring,missing-function-docstring,invalid-name
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                head = {name.lower(): value for name, value in self.headers.items()}
                posts.append((self.path, head, body))
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Collector(Receiver):
    """Takes traces as OTLP over HTTP."""

    @property
    def endpoint(self) -> str:
        """For `OTEL_EXPORTER_OTLP_ENDPOINT`."""
        return f"http://127.0.0.1:{self.port}"

    def spans(self, trace_id: str | None = None) -> list[Span]:
        """All spans that have arrived, or those of one trace."""
        found = []
        for path, _, body in tuple(self.posts):
            assert path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(body)
            for resource in request.resource_spans:
                found += [span for scope in resource.scope_spans for span in scope.spans]
        return [span for span in found if trace_id in (None, span.trace_id.hex())]


class SentryDoor(Receiver):
    """Takes error reports as a Sentry project does."""

    @property
    def dsn(self) -> str:
        """For `SENTRY_DSN`."""
        return f"http://the-public-key@127.0.0.1:{self.port}/42"

    def events(self) -> list[dict[str, Any]]:
        """The events of all envelopes that have arrived."""
        found = []
        for path, _, body in tuple(self.posts):
            assert path == "/api/42/envelope/"
            lines = body.split(b"\n")
            for head, payload in zip(lines[1::2], lines[2::2]):
                if json.loads(head)["type"] == "event":
                    found.append(json.loads(payload))
        return found


def attributes(span: Span) -> dict[str, Any]:
    """A span's attributes by name."""
    return {
        each.key: getattr(each.value, str(each.value.WhichOneof("value")))
        for each in span.attributes
    }
