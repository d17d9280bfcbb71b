"""Sends log lines at ERROR or above to Sentry if a DSN is set, redacted like the log.

The only importer of sentry_sdk, and only if a DSN is set. The SDK's logging integration patches
`logging.Logger` and does not see the exceptions of structlog's lines, so a handler makes the
events.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from utils.errors import ConfigurationError
from utils.logger import Redactor

_TAGS = ("task_id", "code")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "_logger", "_name"}


@contextlib.contextmanager
def reported(
    dsn: str | None,
    *,
    environment: str | None,
    labels: Iterable[str],
    secrets: Iterable[str],
    flush_seconds: float,
) -> Iterator[None]:
    """Report logged errors while the block runs.

    Args:
        dsn: `SENTRY_DSN`; None reports nothing.
        environment: `SENTRY_ENVIRONMENT`.
        labels: Names of fields of log lines that become tags, besides those of `_TAGS`.
        secrets: Values to mask.
        flush_seconds: The longest wait for the last report, at the end.

    Raises:
        ConfigurationError: sentry-sdk is not installed, or the DSN is malformed.
    """
    if dsn is None:
        yield
        return
    sentry = _library()
    try:
        client = sentry.Client(
            dsn=dsn,
            environment=environment,
            # Nothing automatic: no patched libraries, no arguments, no local variables, no metrics.
            default_integrations=False,
            auto_enabling_integrations=False,
            include_local_variables=False,
            auto_session_tracking=False,
            send_client_reports=False,
            max_breadcrumbs=0,
        )
    except (sentry.utils.BadDsn, ValueError) as error:
        raise ConfigurationError(
            "SENTRY_DSN is malformed. Copy it from the settings of the Sentry project."
        ) from error
    from_exception = functools.partial(
        sentry.utils.event_from_exception, client_options=client.options
    )
    handler = _Handler(client.capture_event, from_exception, Redactor(secrets), (*_TAGS, *labels))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        client.close(timeout=flush_seconds)


def _library() -> Any:
    try:
        import sentry_sdk  # pylint: disable=import-outside-toplevel
        import sentry_sdk.utils  # pylint: disable=import-outside-toplevel
    except ImportError as error:
        raise ConfigurationError(
            "SENTRY_DSN is set, but sentry-sdk is not installed. Install it or unset SENTRY_DSN."
        ) from error
    return sentry_sdk


class _Handler(logging.Handler):
    """Turns a log line into Sentry's event, with the event name as its message and group."""

    def __init__(
        self,
        capture: Callable[..., object],
        from_exception: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
        redactor: Redactor,
        tags: Collection[str],
    ) -> None:
        super().__init__(logging.ERROR)
        self._capture = capture
        self._from_exception = from_exception
        self._redactor = redactor
        self._tags = tags

    def emit(self, record: logging.LogRecord) -> None:
        """logging's hook."""
        if record.name.startswith(("sentry_sdk", "urllib3")):
            return  # a report about a report
        try:
            self._capture(self._redactor.clean(self._event(record)))
        except Exception:  # pylint: disable=broad-exception-caught  # logging's own way
            self.handleError(record)

    def _event(self, record: logging.LogRecord) -> dict[str, Any]:
        if isinstance(record.msg, dict):  # structlog's
            fields = dict(record.msg)
            slug, trace = str(fields.pop("event", "")), fields.pop("exc_info", None)
            trace = sys.exc_info() if trace is True else trace
        else:
            slug, trace = record.getMessage(), record.exc_info
            fields = {name: value for name, value in vars(record).items() if name not in _OWN}
        event: dict[str, Any] = {}
        if isinstance(trace, tuple) and trace[0] is not None:
            event, _ = self._from_exception(trace)
            event.pop("timestamp", None)
        tags = {name: str(fields[name]) for name in self._tags if fields.get(name) is not None}
        return event | {
            "level": record.levelname.lower().replace("critical", "fatal"),
            "logger": record.name,
            "message": slug,
            "fingerprint": [slug, tags.get("code", "")],
            "tags": tags,
            "extra": fields,
        }
