"""Traces by OpenTelemetry, sent as OTLP over HTTP. The only importer of opentelemetry.

Not by its global provider: nothing here outlives the worker, and no other library's spans get in.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.telemetry.tracing import Tracing
from utils.errors import ConfigurationError, Stopped
from utils.logger import Redactor

_EXPORT_SECONDS = 5.0
_CARRIED = ("traceparent", "tracestate")
_wanted_trace: contextvars.ContextVar[int | None] = contextvars.ContextVar("trace", default=None)


class _Ids(RandomIdGenerator):
    """Random, but a job's trace has an id of the job's."""

    def generate_trace_id(self) -> int:
        """The SDK's hook for the first span of a trace."""
        return _wanted_trace.get() or super().generate_trace_id()


class OtelTracing(Tracing):
    """Traces to a collector; see `services.telemetry.tracing.open_tracing` for the arguments.

    What a span says of an error is redacted, and has no stack trace: that is the log's.
    """

    def __init__(
        self, endpoint: str, *, headers: str, service: str, secrets: Iterable[str]
    ) -> None:
        self._redactor = Redactor(secrets)
        self._propagator = TraceContextTextMapPropagator()
        exporter = OTLPSpanExporter(
            endpoint=endpoint.rstrip("/") + "/v1/traces",
            headers=_headers(headers),
            timeout=_EXPORT_SECONDS,
        )
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}),
            id_generator=_Ids(),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("training_server")

    @contextlib.contextmanager
    def job(self, task_id: str, *, carrier: Mapping[str, Any], **facts: Any) -> Iterator[None]:
        """See `Tracing.job`."""
        texts = {name: carrier[name] for name in _CARRIED if isinstance(carrier.get(name), str)}
        # An empty context to begin with: what a malformed header says is nothing.
        parent = self._propagator.extract(texts, otel_context.Context())
        wanted = _wanted_trace.set(
            int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:16], "big")
        )
        try:
            with self._open("job", parent, facts | {"task_id": task_id}):
                yield
        finally:
            _wanted_trace.reset(wanted)

    @contextlib.contextmanager
    def span(self, name: str, **facts: Any) -> Iterator[None]:
        """See `Tracing.span`."""
        with self._open(name, None, facts):
            yield

    def note(self, **facts: Any) -> None:
        """See `Tracing.note`."""
        trace.get_current_span().set_attributes(_attributes(facts))

    def headers(self) -> dict[str, str]:
        """See `Tracing.headers`."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier

    def close(self, seconds: float) -> None:
        """See `Tracing.close`."""
        # Its own time-out does not hold while a collector hangs.
        last = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        last.start()
        last.join(seconds)

    @contextlib.contextmanager
    def _open(
        self, name: str, parent: otel_context.Context | None, facts: Mapping[str, Any]
    ) -> Iterator[None]:
        with self._tracer.start_as_current_span(
            name,
            context=parent,
            attributes=_attributes(facts),
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except Stopped as stopped:  # is no fault
                span.set_attributes(_attributes({"stopped": stopped.reason}))
                raise
            except Exception as error:
                text = self._redactor.clean(f"{type(error).__name__}: {error}")
                span.set_status(trace.Status(trace.StatusCode.ERROR, text))
                raise


def _attributes(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What OTLP can carry: no None, and texts for what is neither number nor boolean."""
    return {
        f"training.{name}": value if isinstance(value, (bool, int, float)) else str(value)
        for name, value in facts.items()
        if value is not None
    }


def _headers(text: str) -> dict[str, str]:
    """`name=value,name=value`, percent-encoded as OpenTelemetry wants it.

    Raises:
        ConfigurationError: It is something else.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(equals and name.strip() for name, equals, _ in pairs):
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_HEADERS must be name=value, with commas between"
        )
    return {name.strip().lower(): unquote(value.strip()) for name, _, value in pairs}
