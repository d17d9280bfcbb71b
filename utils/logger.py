"""The log: one line of JSON per event, or coloured text. Lines name their job; secrets are masked.

Modules of the desk call `get_logger`; `training/` and third parties use the standard library's
loggers. Both go through the same processors to standard error.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

MASK = "[redacted]"

_SECRET_NAMES = re.compile(r"secret|token|passw|authorization|credential|signature", re.IGNORECASE)
_SECRET_SHAPES = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), r"\1 " + MASK),
    (re.compile(r"whsec_[\w+/=-]+"), MASK),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"), MASK),
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}"), MASK),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), MASK),
    (re.compile(r"(://[^/\s:@]*):[^@/\s]+@"), r"\1:" + MASK + "@"),
    (re.compile(r"(?i)([?&](?:x-amz-[\w-]*|signature|awsaccesskeyid)=)[^&\s\"']+"), r"\1" + MASK),
)
# These libraries log every request at DEBUG, with its headers.
TALKATIVE = (
    *("botocore", "boto3", "s3transfer", "urllib3", "pika", "PIL", "matplotlib", "httpx"),
    *("asyncio", "alembic", "uvicorn.error"),
)


class Redactor:
    """Replaces secrets in everything that is logged: by value, by key and by shape."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        # Long secrets first: one secret may contain another. A very short secret would mask half of
        # every line.
        values = sorted({s for s in secrets if len(s) >= 6}, key=len, reverse=True)
        self._values = re.compile("|".join(map(_spellings, values))) if values else None

    def __call__(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        """The processor's interface of structlog."""
        return cast(EventDict, self.clean(event))

    def clean(self, value: Any) -> Any:
        """The value with every secret masked, also inside containers."""
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, dict):
            return {
                self.clean(key): (
                    MASK
                    if isinstance(key, str) and _SECRET_NAMES.search(key) and isinstance(item, str)
                    else self.clean(item)
                )
                for key, item in value.items()
            }
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self.clean(item) for item in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        return self._text(str(value))

    def _text(self, text: str) -> str:
        if self._values:
            text = self._values.sub(MASK, text)
        for shape, replacement in _SECRET_SHAPES:
            text = shape.sub(replacement, text)
        return text


def _spellings(secret: str) -> str:
    """A pattern for a secret in its three spellings.

    It may stand as it is, percent-encoded as in an address, or escaped with backslashes as in a
    quoted text.
    """
    pattern = ""
    for sign in secret:
        if sign.isascii() and sign.isalnum():
            pattern += sign
            continue
        encoded = "".join(f"%{byte:02x}" for byte in sign.encode())
        escaped = json.dumps(sign)[1:-1]
        others = {" ": r"|\+"}.get(sign, "")
        pattern += rf"(?:\\*{re.escape(sign)}|(?i:{encoded})|\\*{re.escape(escaped)}{others})"
    return pattern


def configure(
    *, level: str = "INFO", log_format: str = "json", secrets: Iterable[str] = ()
) -> None:
    """Send every log line of this process to standard error, uncaught exceptions included.

    Args:
        level: `DEBUG`, `INFO`, `WARNING` or `ERROR`.
        log_format: `json`, or `text` for a person.
        secrets: Values that must never appear.
    """
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    final: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if log_format == "json":
        # The traceback becomes text first, so that the redaction sees it.
        final += [structlog.processors.format_exc_info, Redactor(secrets)]
        final += [structlog.processors.JSONRenderer(ensure_ascii=False, default=str)]
    else:
        final += [structlog.processors.format_exc_info, Redactor(secrets)]
        final += [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=final)
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_dead_thread


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):  # not a fault
        sys.__excepthook__(kind, error, trace)
    else:
        get_logger(__name__).critical("uncaught_exception", exc_info=(kind, error, trace))


def _log_dead_thread(dead: threading.ExceptHookArgs) -> None:
    if dead.exc_value is not None and not issubclass(dead.exc_type, SystemExit):
        thread = dead.thread.name if dead.thread else None
        trace = (dead.exc_type, dead.exc_value, dead.exc_traceback)
        get_logger(__name__).error("thread_died", thread=thread, exc_info=trace)


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger for the front desk: `log.info("event_slug", image=3)`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def bound(**values: Any) -> AbstractContextManager[None]:
    """Bind `task_id`, `style_id` and the like to every line of this thread until the block ends."""
    return structlog.contextvars.bound_contextvars(**values)


def bound_value(name: str) -> str:
    """The value that `bound` has set for a name in this thread; empty if there is none."""
    return str(structlog.contextvars.get_contextvars().get(name, ""))
