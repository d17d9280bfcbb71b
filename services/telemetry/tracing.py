"""A job's spans: one interface, and the one that does nothing where no collector is set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from utils.errors import ConfigurationError


class Tracing:
    """Traces nothing. `services.telemetry.otel_tracing` has the one that does.

    Spans belong to the thread that opens them, and to threads that were given its context
    (`contextvars.copy_context`).
    """

    @contextlib.contextmanager
    def job(self, task_id: str, *, carrier: Mapping[str, Any], **facts: Any) -> Iterator[None]:
        """While the block runs, one worker holds a job.

        Args:
            task_id: The job; all attempts at it, by whichever workers, are one trace.
            carrier: The message's headers. A `traceparent` among them names the trace that the job
                is a part of.
            facts: Attributes of the span.
        """
        del task_id, carrier, facts
        yield

    @contextlib.contextmanager
    def span(self, name: str, **facts: Any) -> Iterator[None]:
        """While the block runs, this part of the job is done."""
        del name, facts
        yield

    def note(self, **facts: Any) -> None:
        """Attributes of the span in hand."""

    def headers(self) -> dict[str, str]:
        """The HTTP headers by which another service goes on with the trace in hand."""
        return {}

    def close(self, seconds: float) -> None:
        """Send what is left, for so long at most."""
        del seconds


def open_tracing(
    endpoint: str | None, *, headers: str, service: str, secrets: Iterable[str]
) -> Tracing:
    """Tracing as the settings say; the libraries for it are read only where it is wanted.

    Args:
        endpoint: `OTEL_EXPORTER_OTLP_ENDPOINT`; None for no tracing.
        headers: `OTEL_EXPORTER_OTLP_HEADERS`, `name=value` with commas between.
        service: `OTEL_SERVICE_NAME`.
        secrets: Values that must not be told.

    Raises:
        ConfigurationError: The libraries are not there, or the headers are malformed.
    """
    if endpoint is None:
        return Tracing()
    try:
        from services.telemetry import (
            otel_tracing,
        )  # pylint: disable=import-outside-toplevel,cyclic-import
    except ImportError as error:
        raise ConfigurationError(
            f"OTEL_EXPORTER_OTLP_ENDPOINT is set, and the libraries for it are not there ({error})"
        ) from error
    return otel_tracing.OtelTracing(endpoint, headers=headers, service=service, secrets=secrets)
