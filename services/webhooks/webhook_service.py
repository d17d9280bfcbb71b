"""Sends progress and endings to the backend, signed, by docs/protocol.md, section 3.

No error of the network or the backend is raised: every attempt ends in time, with an answer of
`services.webhooks.answers`.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import standardwebhooks

from services.webhooks.answers import (
    EndingAnswer,
    EndingOutcome,
    EndingWebhook,
    ProgressAnswer,
    Reply,
    RetrySchedule,
    judge_ending,
    judge_progress,
)
from services.webhooks.exchange import Exchange, Way, certificates
from services.webhooks.signing import signed_headers
from utils.errors import ConfigurationError
from utils.logger import bound_value, get_logger
from utils.metrics import Metrics
from utils.settings.groups import WebhookSettings
from utils.urls import base_of, origin_of, shown

__all__ = [
    "EndingWebhook",
    "EndingAnswer",
    "EndingOutcome",
    "ProgressAnswer",
    "RetrySchedule",
    "WebhookService",
]

log = get_logger(__name__)

PATHS = {
    "progress": "/api/webhooks/training/progress",
    "complete": "/api/webhooks/training/complete",
    "failed": "/api/webhooks/training/failed",
}
_DETAIL_CHARACTERS = 200
_REMEMBERED_JOBS = 100
_FINAL = (EndingOutcome.DELIVERED, EndingOutcome.REJECTED)


class WebhookService:
    """Sends webhooks. Safe to share between threads: every attempt opens its own connection.

    The environment's proxies, `.netrc` and CA bundle are ignored: a `.netrc` would replace the
    bearer token, and a proxy would see it. `ca_file` and `proxy` set them explicitly.

    Args:
        backend_url: The backend's origin, with the path in front of its routes, if any.
        allowed_origins: Further such addresses, whose origins a message may name.
        token: The bearer token.
        signing_secrets: `whsec_…`; each of them signs.
        timeout: Seconds that one attempt may take in all.
        schedule: The waits between attempts to deliver an ending.
        metrics: Count the attempts.
        trace_headers: Returns the headers by which the backend can continue a trace.
        ca_file: Certificates (PEM) of further authorities for the backend's certificate.
        proxy: Address of an HTTP proxy for requests; those to this machine do not use it.

    Raises:
        ConfigurationError: An address, a secret or the file of certificates is malformed.
    """

    def __init__(
        self,
        *,
        backend_url: str,
        allowed_origins: Collection[str],
        token: str,
        signing_secrets: Sequence[str],
        timeout: float = 10.0,
        schedule: RetrySchedule = RetrySchedule(),
        metrics: Metrics | None = None,
        trace_headers: Callable[[], Mapping[str, str]] = dict,
        ca_file: Path | None = None,
        proxy: str | None = None,
    ) -> None:
        self._trace_headers = trace_headers
        self._metrics = metrics or Metrics()
        try:
            self._backend = base_of(backend_url)
            bases = [self._backend, *map(base_of, allowed_origins)]
        except ValueError as error:
            raise ConfigurationError(
                f"BACKEND_API_URL or WEBHOOK_ALLOWED_ORIGINS: the address {error}"
            ) from error
        self._bases = {origin_of(base): base for base in reversed(bases)}
        if len(self._bases) < len(set(bases)):
            raise ConfigurationError(
                "BACKEND_API_URL and WEBHOOK_ALLOWED_ORIGINS name one origin with two paths. "
                "Remove one of them."
            )
        self._way = Way(certificates(ca_file), proxy)
        try:
            self._signers = [standardwebhooks.Webhook(secret) for secret in signing_secrets]
        except (standardwebhooks.webhooks.EmptyWebhookSecretError, ValueError):
            raise ConfigurationError(
                "WEBHOOK_SIGNING_SECRET: a secret must be whsec_ followed by base64."
            ) from None
        if not self._signers:
            raise ConfigurationError("WEBHOOK_SIGNING_SECRET is not set.")
        self._warned: dict[tuple[str, str], None] = {}
        self._token = token
        self._secrets = (token, *signing_secrets)
        self._timeout = timeout
        self._schedule = schedule

    def origin_for(self, requested: str | None) -> str:
        """The address for a message's webhooks: the origin that it names, if that is allowed.

        Args:
            requested: The message's webhook address, not checked.

        Returns:
            One of the configured addresses, with its path.
        """
        if not requested:
            return self._backend
        with contextlib.suppress(ValueError):
            if base := self._bases.get(origin_of(requested)):
                return base
        self._warn_once_a_job(requested)
        return self._backend

    def _warn_once_a_job(self, requested: str) -> None:
        """Log the address once per job, although progress and ending both name it."""
        about = (bound_value("task_id"), requested)
        # Each line is one operation, so threads need no lock; at worst a log line is repeated.
        if about in self._warned:
            return
        self._warned[about] = None
        for oldest in list(self._warned)[:-_REMEMBERED_JOBS]:
            self._warned.pop(oldest, None)
        log.warning("webhook_origin_not_allowed", named=shown(requested), used=self._backend)

    def send_progress(self, origin: str, body: Mapping[str, Any]) -> ProgressAnswer:
        """Report progress in one attempt; no error of the network or the backend is raised.

        Args:
            origin: From `origin_for`.
            body: JSON values.
        """
        reply = self._exchange("PATCH", origin, "progress", f"msg_{uuid.uuid4().hex}", body)
        answer = judge_progress(reply)
        if answer not in (ProgressAnswer.DONE, ProgressAnswer.PAUSE):
            level = log.error if answer is ProgressAnswer.UNAUTHORIZED else log.warning
            level(
                "progress_not_taken",
                answer=answer.value,
                status=reply.status,
                detail=self._detail(reply),
            )
        return answer

    def knock(self, origin: str, *, with_path: bool = True) -> tuple[Reply, str]:
        """Send an empty progress report, which a backend refuses and which changes nothing.

        Args:
            origin: From `origin_for`.
            with_path: False leaves out the configured path.

        Returns:
            The answer; and the answer in words, without secrets.
        """
        reply = self._exchange(
            "PATCH", origin, "progress", f"msg_{uuid.uuid4().hex}", {}, with_path=with_path
        )
        return reply, self._detail(reply)

    def send_ending(self, origin: str, ending: EndingWebhook) -> EndingAnswer:
        """Deliver an ending in one attempt; no error of the network or the backend is raised."""
        reply = self._exchange("POST", origin, ending.kind, ending.webhook_id, ending.body)
        answer = judge_ending(reply, self._detail(reply))
        if answer.outcome is not EndingOutcome.DELIVERED:
            log.warning(
                "ending_not_taken",
                outcome=answer.outcome.value,
                status=answer.status,
                detail=answer.detail,
                retry_after=answer.retry_after,
            )
        return answer

    def deliver(
        self, origin: str, ending: EndingWebhook, *, for_seconds: float, stop: threading.Event
    ) -> EndingAnswer:
        """Deliver an ending, with retries by the schedule. There is always one attempt.

        Args:
            origin: From `origin_for`.
            ending: The ending.
            for_seconds: No attempt begins later than this. If the next one would, the call returns
                at once.
            stop: Set when the worker shuts down; ends the waiting.

        Returns:
            The last attempt's answer: final, or one that needs another attempt later.
        """
        end = time.monotonic() + for_seconds
        attempts = 0
        while True:
            answer = self.send_ending(origin, ending)
            attempts += 1
            if answer.outcome in _FINAL:
                return answer
            delay = self._schedule.seconds(attempts, answer)
            if time.monotonic() + delay > end or stop.wait(delay):
                return answer

    def _exchange(
        self,
        method: str,
        origin: str,
        kind: str,
        webhook_id: str,
        body: Mapping[str, Any],
        *,
        with_path: bool = True,
    ) -> Reply:
        # Checked again, so that no mistake of a caller and no old record sends the token elsewhere.
        base = self.origin_for(origin)
        url = (base if with_path else origin_of(base)) + PATHS[kind]
        text = json.dumps(_finite(body), separators=(",", ":"))  # ASCII, so these are the bytes
        headers = self._headers(webhook_id, text)
        began = time.monotonic()
        reply = Exchange(
            method, url, headers, text.encode("ascii"), self._timeout, self._way
        ).reply()
        outcome = f"{reply.status // 100}xx" if reply.status else "no_answer"
        self._metrics.webhook_attempts.labels(kind, outcome).inc()
        self._metrics.webhook_duration_seconds.labels(kind).observe(time.monotonic() - began)
        return reply

    def _headers(self, webhook_id: str, text: str) -> dict[str, str]:
        return (
            dict(self._trace_headers())
            | {"Authorization": f"Bearer {self._token}", "X-Request-Source": "training-server"}
            | signed_headers(self._signers, webhook_id, text)
        )

    def _detail(self, reply: Reply) -> str:
        """The error in a line, redacted: a backend may echo the request with its secrets."""
        text = reply.problem or reply.body.decode(errors="replace")
        for secret in self._secrets:
            text = text.replace(secret, "[redacted]")
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        return " ".join(text.split())[:_DETAIL_CHARACTERS]


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON cannot write (infinity, not a number)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def open_webhooks(
    settings: WebhookSettings,
    *,
    metrics: Metrics | None = None,
    trace_headers: Callable[[], Mapping[str, str]] = dict,
) -> WebhookService:
    """The webhooks to the backend that the settings name.

    Args:
        metrics: Count the attempts.
        trace_headers: Returns the headers by which the backend can continue a trace.

    Raises:
        ConfigurationError: An address, a secret or the file of certificates is malformed.
    """
    return WebhookService(
        backend_url=settings.backend_api_url,
        allowed_origins=settings.webhook_allowed_origins,
        token=settings.internal_api_token.get_secret_value(),
        signing_secrets=settings.signing_secrets(),
        ca_file=settings.webhook_ca_file,
        proxy=settings.webhook_proxy.get_secret_value() if settings.webhook_proxy else None,
        metrics=metrics,
        trace_headers=trace_headers,
    )
