"""A job's spans by OpenTelemetry, sent as OTLP over HTTP if a collector is configured.

The only importer of opentelemetry. Its API is always imported (10 ms) and does nothing without a
provider; the SDK is imported only if an endpoint is set. The global provider is not used: nothing
outlives the worker, and no other library adds spans.
"""

from __future__ import annotations

import contextlib
import contextvars
import hashlib
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from utils.errors import ConfigurationError, Stopped
from utils.logger import Redactor

_EXPORT_SECONDS = 5.0
_CARRIED = ("traceparent", "tracestate")
_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_MAX_TRACESTATE = 512
_wanted_trace: contextvars.ContextVar[int | None] = contextvars.ContextVar("trace", default=None)


def carried(headers: Mapping[str, Any]) -> dict[str, str]:
    """The trace headers among others; none if their `traceparent` is malformed.

    Args:
        headers: Headers of a message or a request, names in lower case.
    """
    parent, state = (headers.get(name) for name in _CARRIED)
    if not isinstance(parent, str) or not _TRACEPARENT.fullmatch(parent):
        return {}
    found = {"traceparent": parent}
    if isinstance(state, str) and state.isascii() and len(state) <= _MAX_TRACESTATE:
        found["tracestate"] = state
    return found


def trace_id_of(headers: Mapping[str, Any], task_id: str) -> str:
    """The trace of a job, in hexadecimal: the one that its headers name, or its own.

    Log lines carry it, also where no spans are sent.
    """
    if parent := carried(headers).get("traceparent"):
        return parent.split("-")[1]
    return f"{_own_trace(task_id):032x}"


def _own_trace(task_id: str) -> int:
    return int.from_bytes(hashlib.sha256(task_id.encode()).digest()[:16], "big")


class Tracing:
    """The spans of jobs.

    Spans belong to the thread that opens them, and to threads that have a copy of its context
    (`contextvars.copy_context`). A span of an error has a redacted message and no stack trace; the
    log has it.

    Args:
        provider: OpenTelemetry's provider; the default one traces nothing.
        secrets: Values to mask.
    """

    def __init__(
        self, provider: trace.TracerProvider | None = None, *, secrets: Iterable[str] = ()
    ) -> None:
        self._redactor = Redactor(secrets)
        self._propagator = TraceContextTextMapPropagator()
        self._provider = provider or trace.NoOpTracerProvider()
        self._tracer = self._provider.get_tracer("training_server")

    @contextlib.contextmanager
    def job(
        self, task_id: str, *, carrier: Mapping[str, Any], name: str = "job", **facts: Any
    ) -> Iterator[None]:
        """A span for the time in which one worker holds a job, or for an act of the API on it.

        Args:
            task_id: The job; all attempts at it, on any worker, are one trace.
            carrier: The headers of the message or the request. A `traceparent` among them names the
                trace that the job is a part of.
            name: The span's name.
            facts: Attributes of the span.
        """
        texts = {each: carrier[each] for each in _CARRIED if isinstance(carrier.get(each), str)}
        # With an empty context to begin with, a malformed header has no effect.
        parent = self._propagator.extract(texts, otel_context.Context())
        wanted = _wanted_trace.set(_own_trace(task_id))
        try:
            with self._open(name, parent, facts | {"task_id": task_id}):
                yield
        finally:
            _wanted_trace.reset(wanted)

    @contextlib.contextmanager
    def span(self, name: str, **facts: Any) -> Iterator[None]:
        """A span for a part of the job."""
        with self._open(name, None, facts):
            yield

    def note(self, **facts: Any) -> None:
        """Add attributes to the current span."""
        trace.get_current_span().set_attributes(_attributes(facts))

    def headers(self) -> dict[str, str]:
        """The HTTP headers by which another service continues the current trace."""
        carrier: dict[str, str] = {}
        if trace.get_current_span().is_recording():
            self._propagator.inject(carrier)
        return carrier

    def close(self, seconds: float) -> None:
        """Send the last spans, for this long at most."""
        if shutdown := getattr(self._provider, "shutdown", None):
            # The SDK's own time-out does not hold while a collector hangs.
            last = threading.Thread(target=shutdown, name="last-spans", daemon=True)
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
            except Stopped as stopped:  # not a fault
                span.set_attributes(_attributes({"stopped": stopped.reason}))
                raise
            except Exception as error:
                text = self._redactor.clean(f"{type(error).__name__}: {error}")
                span.set_status(trace.Status(trace.StatusCode.ERROR, text))
                raise


def open_tracing(
    endpoint: str | None, *, headers: str, service: str, secrets: Iterable[str]
) -> Tracing:
    """Open tracing by the settings.

    Args:
        endpoint: `OTEL_EXPORTER_OTLP_ENDPOINT`; None for no tracing.
        headers: `OTEL_EXPORTER_OTLP_HEADERS`, `name=value` separated by commas.
        service: `OTEL_SERVICE_NAME`.
        secrets: Values to mask.

    Raises:
        ConfigurationError: The SDK is not installed, or the headers are malformed.
    """
    if endpoint is None:
        return Tracing()
    # pylint: disable=import-outside-toplevel
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    except ImportError as error:
        raise ConfigurationError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set, and a package for it is missing ({error}). "
            "Install opentelemetry-sdk and opentelemetry-exporter-otlp-proto-http, or unset it."
        ) from error

    class JobIds(RandomIdGenerator):
        """Random ids, but the id of a job's trace is derived from the job."""

        def generate_trace_id(self) -> int:
            return _wanted_trace.get() or super().generate_trace_id()

    exporter = OTLPSpanExporter(
        endpoint=endpoint.rstrip("/") + "/v1/traces",
        headers=_headers(headers),
        timeout=_EXPORT_SECONDS,
    )
    provider = TracerProvider(
        resource=Resource.create({"service.name": service}),
        id_generator=JobIds(),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, secrets=secrets)


def _attributes(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as OTLP can carry them: without None, and as text unless number or boolean."""
    return {
        f"training.{name}": value if isinstance(value, (bool, int, float)) else str(value)
        for name, value in facts.items()
        if value is not None
    }


def _headers(text: str) -> dict[str, str]:
    """`name=value,name=value`, percent-encoded as OpenTelemetry specifies.

    Raises:
        ConfigurationError: The text has another form.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not all(equals and name.strip() for name, equals, _ in pairs):
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_HEADERS is malformed. Write name=value pairs separated by commas."
        )
    return {name.strip().lower(): unquote(value.strip()) for name, _, value in pairs}
