"""Counts a client's requests, by what the SDK tells of each; the SDK itself stays outside."""

from __future__ import annotations

import io
import re
import time
from typing import Any

from utils.metrics import Metrics

_BEGAN_AT, _BYTES = "training_server_began_at", "training_server_bytes"


def count_requests(events: Any, metrics: Metrics) -> None:
    """Have every call of a client counted, and timed with the SDK's own repetitions.

    Args:
        events: `client.meta.events`.
        metrics: Where.
    """
    observer = _Observer(metrics)
    events.register("before-call.s3", observer.begins)
    events.register("after-call.s3", observer.is_answered)
    events.register("after-call-error.s3", observer.fails)


class _Observer:
    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def begins(
        self, *, event_name: str, params: dict[str, Any], context: dict[str, Any], **_: Any
    ) -> None:
        """A request is about to be made."""
        context[_BEGAN_AT] = time.monotonic()
        if event_name.endswith(".PutObject"):
            context[_BYTES] = _size(params["body"])

    def is_answered(
        self,
        *,
        event_name: str,
        http_response: Any,
        parsed: dict[str, Any],
        context: dict[str, Any],
        **_: Any,
    ) -> None:
        """A request got an answer, of whatever status."""
        status = http_response.status_code
        self._count(event_name, f"{status // 100}xx", context)
        if status >= 300:
            return
        if event_name.endswith(".GetObject"):
            self._metrics.s3_bytes.labels("received").inc(parsed.get("ContentLength", 0))
        elif _BYTES in context:
            self._metrics.s3_bytes.labels("sent").inc(context[_BYTES])

    def fails(self, *, event_name: str, context: dict[str, Any], **_: Any) -> None:
        """A request got no answer."""
        self._count(event_name, "no_answer", context)

    def _count(self, event_name: str, outcome: str, context: dict[str, Any]) -> None:
        operation = _snake(event_name.rpartition(".")[2])
        self._metrics.s3_requests.labels(operation, outcome).inc()
        if _BEGAN_AT in context:
            seconds = time.monotonic() - context[_BEGAN_AT]
            self._metrics.s3_request_duration_seconds.labels(operation).observe(seconds)


def _size(body: Any) -> int:
    """Bytes of a request's body: bytes, or a file at its beginning."""
    if not hasattr(body, "seek"):
        return len(body)
    size: int = body.seek(0, io.SEEK_END)
    body.seek(0)
    return size


def _snake(operation: str) -> str:
    """`PutObject` as `put_object`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", operation).lower()
