"""Error reports, to a server that accepts Sentry's envelopes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from services.telemetry.error_reports import reported
from tests.collectors import SentryDoor
from utils import logger
from utils.errors import ConfigurationError

SECRET = "a-secret-that-nobody-may-see"


@pytest.fixture(name="door")
def _door() -> Iterator[SentryDoor]:
    """A project; what these tests change of the log is put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with SentryDoor() as door:
        logger.configure(secrets=(SECRET,))
        yield door
    root.handlers, root.level = handlers, level


def reporting(door: SentryDoor):  # type: ignore[no-untyped-def]
    """As the worker does."""
    return reported(
        door.dsn, environment="tests", labels=("style_id",), secrets=(SECRET,), flush_seconds=5
    )


def test_an_error_of_a_job_is_reported_by_its_slug_with_the_job(door: SentryDoor) -> None:
    log = logger.get_logger("consumer.pipeline")
    with reporting(door), logger.bound(task_id="t-1", style_id=7):
        log.info("job_ended")
        log.warning("job_put_off")
        log.error("job_failed", code="GPU_OOM", reason=f"no memory for {SECRET}", attempts=3)
    (event,) = door.events()
    assert (event["message"], event["level"]) == ("job_failed", "error")
    assert event["tags"] == {"task_id": "t-1", "style_id": "7", "code": "GPU_OOM"}
    assert event["extra"]["reason"] == "no memory for [redacted]"
    assert event["fingerprint"] == ["job_failed", "GPU_OOM"]
    assert (event["environment"], event["logger"]) == ("tests", "consumer.pipeline")


def test_a_stack_trace_is_reported_without_variables_or_secrets(door: SentryDoor) -> None:
    password = SECRET
    with reporting(door):
        try:
            raise ValueError(f"{password} is wrong")
        except ValueError:
            logger.get_logger("consumer.pipeline").exception("job_broke")
        logging.getLogger("some.library").critical("it fell over: %s", SECRET)
    broke, fell = door.events()
    (trouble,) = broke["exception"]["values"]
    assert (trouble["type"], trouble["value"]) == ("ValueError", "[redacted] is wrong")
    assert trouble["stacktrace"]["frames"][-1]["function"] == (
        "test_a_stack_trace_is_reported_without_variables_or_secrets"
    )
    assert (fell["message"], fell["level"]) == ("it fell over: [redacted]", "fatal")
    assert SECRET not in json.dumps([broke, fell]) and "vars" not in json.dumps(broke)


def test_after_the_block_and_without_an_address_nothing_is_reported(door: SentryDoor) -> None:
    with reporting(door):
        pass
    with reported(None, environment=None, labels=(), secrets=(), flush_seconds=1):
        logger.get_logger("main").error("unheard")
    assert not door.events()


@pytest.mark.parametrize("dsn", ["nonsense", "http://127.0.0.1/1", "ftp://key@host/1"])
def test_an_invalid_address_is_reported_with_its_setting(dsn: str) -> None:
    with pytest.raises(ConfigurationError, match="SENTRY_DSN"):
        with reported(dsn, environment=None, labels=(), secrets=(), flush_seconds=1):
            pass
