"""Traces, to a collector that reads OTLP."""

from __future__ import annotations

import contextvars
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from services.telemetry.tracing import Tracing, open_tracing
from tests.collectors import Collector, attributes
from utils.errors import ConfigurationError, LeaseLost, WorkerCrashed

SECRET = "a-secret-that-nobody-may-see"
PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture(name="collector")
def _collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def opened(collector: Collector, headers: str = "") -> Tracing:
    """Tracing to this collector."""
    return open_tracing(
        collector.endpoint, headers=headers, service="training-server", secrets=(SECRET,)
    )


def test_a_job_is_a_trace_and_its_parts_are_spans_of_it(collector: Collector) -> None:
    tracing = opened(collector, headers="X-Api-Key=abc%20def")
    with tracing.job("t-1", carrier={}, style_id=7, nothing=None):
        with tracing.span("fetch", images=3):
            pass
        tracing.note(ending="complete")
    tracing.close(5)
    fetch, job = collector.spans()
    assert (job.name, fetch.name) == ("job", "fetch")
    assert fetch.parent_span_id == job.span_id and fetch.trace_id == job.trace_id
    assert not job.parent_span_id
    assert attributes(job) == {
        "training.task_id": "t-1",
        "training.style_id": 7,
        "training.ending": "complete",
    }
    assert collector.posts[0][1]["x-api-key"] == "abc def"


def test_every_attempt_at_a_job_is_in_one_trace_on_any_worker(collector: Collector) -> None:
    for task_id in ("t-1", "t-1", "t-2"):
        tracing = opened(collector)
        with tracing.job(task_id, carrier={}):
            pass
        tracing.close(5)
    first, again, other = (span.trace_id for span in collector.spans())
    assert first == again != other


def test_the_trace_of_the_backend_is_continued_and_passed_on(collector: Collector) -> None:
    tracing = opened(collector)
    assert not tracing.headers()
    with tracing.job("t-1", carrier={"traceparent": PARENT, "other": 1}):
        handed = tracing.headers()["traceparent"]
    tracing.close(5)
    (job,) = collector.spans()
    assert job.trace_id.hex() == "4bf92f3577b34da6a3ce929d0e0e4736"
    assert job.parent_span_id.hex() == "00f067aa0ba902b7"
    assert handed == f"00-{job.trace_id.hex()}-{job.span_id.hex()}-01"


@pytest.mark.parametrize("given", ["", "nonsense", "00-0-0-0", 7, b"\xff", True])
def test_a_malformed_traceparent_is_ignored(collector: Collector, given: object) -> None:
    tracing = opened(collector)
    with tracing.job("t-1", carrier={"traceparent": given}):
        pass
    tracing.close(5)
    (job,) = collector.spans()
    assert not job.parent_span_id


def test_an_error_marks_its_span_without_secrets_or_a_stack_trace(collector: Collector) -> None:
    tracing = opened(collector)
    with pytest.raises(WorkerCrashed), tracing.job("t-1", carrier={}):
        with tracing.span("train"):
            raise WorkerCrashed(f"the trainer died of {SECRET}")
    with pytest.raises(LeaseLost), tracing.job("t-1", carrier={}):
        raise LeaseLost()
    tracing.close(5)
    train, job, lost = collector.spans()
    assert train.status.code == job.status.code == 2
    assert train.status.message == "WorkerCrashed: the trainer died of [redacted]"
    assert not train.events
    assert lost.status.code == 0 and attributes(lost)["training.stopped"] == "lease_lost"


def test_a_thread_with_the_context_of_the_job_is_in_its_trace(collector: Collector) -> None:
    tracing = opened(collector)
    handed: list[dict[str, str]] = []
    with tracing.job("t-1", carrier={}):
        context = contextvars.copy_context()
        thread = threading.Thread(
            target=context.run, args=(lambda: handed.append(tracing.headers()),)
        )
        thread.start()
        thread.join()
        assert handed == [tracing.headers()]
    tracing.close(5)


def test_a_collector_that_hangs_delays_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracing = open_tracing(endpoint, headers="", service="s", secrets=())
        with tracing.job("t-1", carrier={}):
            pass
        began = time.monotonic()
        tracing.close(0.3)
        assert time.monotonic() - began < 3


def test_malformed_headers_are_reported_with_their_setting(collector: Collector) -> None:
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_HEADERS"):
        opened(collector, headers="just-a-key")


def test_without_an_address_nothing_is_traced() -> None:
    tracing = open_tracing(None, headers="", service="s", secrets=())
    with tracing.job("t-1", carrier={"traceparent": PARENT}), tracing.span("fetch"):
        tracing.note(ending="complete")
        assert not tracing.headers()
    tracing.close(1)
