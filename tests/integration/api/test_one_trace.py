"""One trace from the request that orders a job, through the message, to the trainer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.broker.client import connect
from services.telemetry.tracing import open_tracing, trace_id_of
from tests.collectors import Collector, attributes
from tests.integration.api.world import Ground, World, running

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE = PARENT.split("-")[1]


@pytest.fixture(name="ground")
def _ground(request: pytest.FixtureRequest, tmp_path: Path) -> Ground:
    s3, broker = request.getfixturevalue("s3_server"), request.getfixturevalue("rabbitmq")
    return Ground(f"sqlite:///{tmp_path / 'api.db'}", s3, broker, tmp_path)


@pytest.fixture(name="collector")
def _collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def ordered(world: World, **headers: str) -> dict[str, Any]:
    """A new job, by a request with these headers."""
    files = world.upload()
    with world.client(headers_more=headers) as client:
        answer = client.post("/v1/jobs", json={"kind": "style", "training_files": files})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def message_headers(world: World) -> dict[str, Any]:
    """The headers of the next message on the queue."""
    connection = connect(world.settings.broker)
    try:
        channel = connection.channel()
        queue = world.settings.broker.training_queue
        method = None
        while method is None:
            method, properties, _ = channel.basic_get(queue, auto_ack=True)
        assert properties is not None
        return dict(properties.headers or {})
    finally:
        connection.close()


def test_a_request_the_message_and_the_worker_are_in_one_trace(
    ground: Ground, collector: Collector
) -> None:
    with running(ground, otel_exporter_otlp_endpoint=collector.endpoint) as world:
        job = ordered(world, traceparent=PARENT)
        headers = message_headers(world)
        worker = open_tracing(collector.endpoint, headers="", service="training-server", secrets=())
        with worker.job(job["id"], carrier=headers), worker.span("train"):
            sent = worker.headers()
        worker.close(5)
        world.worker().send(
            "progress",
            {"task_id": job["id"], "sequence": 1_000_001, "progress": {}},
            headers_more=sent,
        )
    spans = {span.name: span for span in collector.spans(TRACE)}
    assert set(spans) == {"order", "job", "train", "news"}
    assert spans["order"].parent_span_id.hex() == PARENT.split("-")[2]
    assert spans["job"].parent_span_id == spans["order"].span_id
    assert spans["news"].parent_span_id == spans["train"].span_id
    assert attributes(spans["order"])["training.task_id"] == job["id"]


def test_without_a_collector_the_clients_trace_reaches_the_worker(ground: Ground) -> None:
    with running(ground) as world:
        ordered(world, traceparent=PARENT, tracestate="a=b")
        headers = message_headers(world)
        assert (headers["traceparent"], headers["tracestate"]) == (PARENT, "a=b")


@pytest.mark.parametrize("given", ["nonsense", "00-" + "0" * 32 + "-00f067aa0ba902b7-01"])
def test_a_malformed_trace_of_a_client_is_not_passed_on(ground: Ground, given: str) -> None:
    with running(ground) as world:
        ordered(world, traceparent=given)
        assert "traceparent" not in message_headers(world)


def test_the_log_lines_of_a_job_have_its_id_and_its_trace(
    ground: Ground, capfd: pytest.CaptureFixture[str]
) -> None:
    with running(ground, log_level="INFO", log_format="json") as world:
        job = ordered(world, traceparent=PARENT)
        message_headers(world)
        world.worker().send(
            "progress",
            {"task_id": job["id"], "sequence": 1_000_001, "progress": {}},
            headers_more={"traceparent": PARENT},
        )
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line[:1] == "{"]
    named = {line["event"]: line["trace_id"] for line in lines if line.get("task_id") == job["id"]}
    assert named == dict.fromkeys(("job_ordered", "message_published", "news_came"), TRACE)


def test_the_trace_of_a_job_without_a_parent_is_derived_from_its_id() -> None:
    assert trace_id_of({}, "t-1") == trace_id_of({"traceparent": "x"}, "t-1")
    assert trace_id_of({}, "t-1") != trace_id_of({}, "t-2")
    assert trace_id_of({"traceparent": PARENT}, "t-1") == TRACE
