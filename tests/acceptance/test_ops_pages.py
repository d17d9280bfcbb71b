"""A running worker's pages for operators, with a broker that is killed and restarted."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from local.rabbitmq_node import RabbitMqNode
from sandbox.backend import Backend
from sandbox.photographs import photographs
from sandbox.s3_server import S3Server
from sandbox.worker_process import WorkerProcess
from tests.acceptance.pages import Pages
from tests.acceptance.world import World, log_lines, until
from tests.chaos.tcp_proxy import TcpProxy
from tests.collectors import Collector, SentryDoor, attributes
from tests.metric_names import exported_names
from utils.metrics import READINESS

TRUTH_SECONDS = 10.0
SCRAPER = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"


@pytest.fixture(scope="module", name="mortal")
def _mortal(
    s3_server: S3Server, base_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """A world with a separate broker, so that a test may kill it."""
    folder = tmp_path_factory.mktemp("mortal")
    with RabbitMqNode(folder / "broker") as broker, Backend() as backend:
        world = World(broker, s3_server, backend, base_model, folder)
        world.photographs = tuple(world.upload(each.name, each.content) for each in photographs())
        yield world
        assert backend.rejected == ()


@pytest.fixture(scope="module", name="storage_way")
def _storage_way(s3_server: S3Server) -> Iterator[TcpProxy]:
    with TcpProxy("127.0.0.1", int(s3_server.endpoint.rsplit(":", 1)[1])) as way:
        yield way


@pytest.fixture(scope="module", name="broker_way")
def _broker_way(mortal: World) -> Iterator[TcpProxy]:
    with TcpProxy(mortal.broker.host, mortal.broker.port) as way:
        yield way


@pytest.fixture(scope="module", name="collector")
def _collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module", name="sentry")
def _sentry() -> Iterator[SentryDoor]:
    with SentryDoor() as sentry:
        yield sentry


@pytest.fixture(scope="module", name="watched")
def _watched(
    mortal: World,
    storage_way: TcpProxy,
    broker_way: TcpProxy,
    collector: Collector,
    sentry: SentryDoor,
) -> Iterator[WorkerProcess]:
    with mortal.worker(
        RABBITMQ_PORT=str(broker_way.port),
        RABBITMQ_HEARTBEAT_SECONDS="20",  # as it is by default
        AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{storage_way.port}",
        LEASE_TTL_SECONDS="60",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
        SENTRY_DSN=sentry.dsn,
        TENSORBOARD="true",
    ) as worker:
        yield worker
        assert worker.stop() == 0, worker.last_words(20)


@pytest.fixture(scope="module", name="pages")
def _pages(watched: WorkerProcess) -> Pages:
    return Pages(watched)


def test_it_is_healthy_from_the_first_moment_and_ready_when_the_model_is_loaded(
    pages: Pages, watched: WorkerProcess
) -> None:
    status, _, body = pages.ask("/ready")
    early = (status, b"not" in body)
    assert pages.status("/health") == 200
    until(lambda: pages.status("/ready") == 200)
    assert early == (503, True), "it was asked before the GPU was tested"
    assert pages.json("/ready") == {"ready": True, "checks": dict.fromkeys(READINESS, "ok")}
    assert pages.json("/health") == {
        "status": "healthy",
        "cuda_available": False,
        "is_training": False,
    }
    assert log_lines(watched, "consuming")


def test_the_pages_are_shown_and_nothing_else(pages: Pages, watched: WorkerProcess) -> None:
    for path in ("/health", "/status", "/metrics"):
        status, head, body = pages.ask(path)
        assert (status, head["content-type"]) == (200, "application/json")
        assert "server" not in head and head["cache-control"] == "no-store"
        assert pages.ask(path, method="HEAD")[2] == b"" != body
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert pages.ask("/status", method=method)[0] == 405
    for path in ("/", "/docs", "/openapi.json", "/../config.py", "/health/"):
        assert pages.status(path) == 404
    said = watched.log.read_text(encoding="utf-8")
    assert "HTTP/1.1" not in said and "uvicorn" not in said, "a probe is no news"


def test_a_request_without_end_is_not_collected(pages: Pages) -> None:
    with socket.create_connection(("127.0.0.1", pages.port), timeout=30) as chatterer:
        chatterer.sendall(b"GET /health HTTP/1.1\r\nX: ")
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                chatterer.sendall(b"x" * 65536)
    assert pages.status("/health") == 200


def test_a_scraper_gets_text_and_any_other_client_json(pages: Pages) -> None:
    _, head, text = pages.ask("/metrics", headers={"Accept": SCRAPER})
    assert head["content-type"].startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    _, head, text = pages.ask("/metrics", headers={"Accept": "text/plain"})
    assert head["content-type"].startswith("text/plain")
    names = {line.split(b" ")[0].split(b"{")[0] for line in text.splitlines() if line[:1] != b"#"}
    assert {name.decode() for name in names} <= exported_names()
    numbers = pages.json("/metrics")
    assert {"current_step", "total_steps", "last_loss", "gpu_memory_allocated"} <= set(numbers)
    assert numbers["is_training"] is False


def test_an_outage_of_the_storage_is_reported_within_ten_seconds(
    pages: Pages, storage_way: TcpProxy
) -> None:
    began = time.monotonic()
    storage_way.refuse(TRUTH_SECONDS + 5)
    until(lambda: pages.status("/ready") == 503, TRUTH_SECONDS)
    checks = pages.json("/ready")["checks"]
    assert "could not be reached" in checks["s3"] and checks["broker"] == "ok"
    assert time.monotonic() - began < TRUTH_SECONDS
    assert pages.status("/health") == 200
    storage_way.calm()
    until(lambda: pages.status("/ready") == 200, TRUTH_SECONDS)


def test_a_silent_broker_is_reported_long_before_its_heartbeats_are_missed(
    pages: Pages, broker_way: TcpProxy
) -> None:
    """Like a machine that vanishes: no connection is closed, and no answer comes."""
    broker_way.go_silent(TRUTH_SECONDS + 10)
    until(lambda: pages.status("/ready") == 503, TRUTH_SECONDS)
    assert "not answered" in pages.json("/ready")["checks"]["broker"]
    assert pages.status("/health") == 200
    broker_way.calm()
    until(lambda: pages.status("/ready") == 200, TRUTH_SECONDS)
    assert pages.metric("broker_reconnects_total") == 0


def test_a_killed_broker_is_reported_within_ten_seconds_and_the_job_stays_visible(
    mortal: World, pages: Pages, watched: WorkerProcess
) -> None:
    message = mortal.envelope(style_id=71, parameters={"epochs": 1000})
    task_id = message["task_id"]
    mortal.publish(message)
    until(lambda: (pages.json("/status")["job"] or {}).get("step", 0) > 5)
    assert pages.status("/ready") == 200, "a worker with a job in hand is ready"
    job = pages.json("/status")["job"]
    assert (job["task_id"], job["style_id"], job["stage"]) == (task_id, 71, "training")
    assert job["total_epochs"] == 1000 and job["total_steps"] == 3000
    assert 0 < job["lease_remaining_seconds"] <= 60
    until(lambda: pages.json("/status")["job"]["steps_per_second"])
    until(lambda: pages.metric("queue_messages", queue="training") == 0)

    mortal.broker.kill()
    killed = time.monotonic()
    try:
        until(lambda: pages.status("/ready") == 503, TRUTH_SECONDS)
        assert time.monotonic() - killed < TRUTH_SECONDS
        assert "RabbitMQ" in pages.json("/ready")["checks"]["broker"]
        assert pages.json("/health") == {
            "status": "healthy",
            "cuda_available": False,
            "is_training": True,
        }
        until(lambda: pages.metric("ready_check", check="broker") == 0)
        assert pages.metric("ready_check", check="s3") == 1
        assert math.isnan(pages.metric("queue_oldest_message_age_seconds"))
        step = pages.json("/status")["job"]["step"]
    finally:  # the tests after this one need it
        mortal.broker.start()
    until(lambda: pages.status("/ready") == 200, TRUTH_SECONDS + 5)
    until(lambda: pages.metric("broker_reconnects_total") == 1)
    assert pages.json("/status")["job"]["step"] > step, "it went on training meanwhile"
    assert pages.status("/health") == 200
    mortal.s3.put_object(Bucket=mortal.state, Key=f"jobs/{task_id}.cancel", Body=b"")
    assert mortal.ending(task_id)[1]["error_code"] == "CANCELLED"
    until(lambda: pages.json("/status")["job"] is None)
    until(lambda: pages.metric("jobs_total", ending="failed", code="CANCELLED") == 1)
    assert pages.metric("wasted_gpu_seconds_total", reason="cancelled") > 1
    assert not log_lines(watched, "handler_crashed")


def test_a_job_is_counted_in_the_metrics(mortal: World, pages: Pages) -> None:
    message = mortal.envelope(style_id=72, parameters={"epochs": 4})
    before = pages.metric("epochs_total")
    mortal.publish(message)
    assert mortal.ending(message["task_id"])[0] == "complete"
    until(lambda: pages.metric("webhook_attempts_total", kind="complete", outcome="2xx") == 1)
    assert pages.metric("jobs_total", ending="complete", code="none") == 1
    assert pages.metric("epochs_total") - before == 4
    assert pages.metric("training_seconds_total") > 0
    assert pages.metric("checkpoint_save_seconds_count") >= 2
    assert pages.metric("checkpoint_upload_seconds_count") >= 1
    assert pages.metric("webhook_duration_seconds_count", kind="complete") == 1
    assert pages.metric("s3_bytes_total", direction="sent") > 100_000
    assert pages.metric("s3_bytes_total", direction="received") > 100_000
    assert pages.metric("s3_requests_total", operation="put_object", outcome="2xx") > 10
    assert pages.metric("s3_request_duration_seconds_count", operation="get_object") > 3
    assert pages.metric("messages_total", queue="training") >= 2
    assert pages.metric("disk_free_bytes", folder="work") > 0
    assert pages.metric("trainer_up") == 1 and pages.metric("trainer_restarts_total") == 0
    numbers = pages.json("/metrics")
    assert numbers["current_step"] == numbers["total_steps"] == 12
    assert numbers["last_loss"] > 0 and numbers["is_training"] is False
    kept = mortal.keys(mortal.state, f"checkpoints/style_72/{message['task_id']}/")
    assert [key for key in kept if "/tensorboard/claim-0001.events.out.tfevents." in key]
    assert not mortal.keys(mortal.state, "checkpoints/style_71/"), "that one was cancelled"


def test_the_trace_of_a_job_continues_that_of_the_backend_and_returns_to_it(
    mortal: World, collector: Collector, watched: WorkerProcess
) -> None:
    message = mortal.envelope(style_id=73)
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    mortal.publish(message, headers={"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"})
    assert mortal.ending(message["task_id"])[0] == "complete"
    names = {"job", "fetch", "vet", "train", "export", "upload", "tell"}
    until(lambda: {span.name for span in collector.spans(trace_id)} == names)
    spans = {span.name: span for span in collector.spans(trace_id)}
    job = spans.pop("job")
    assert job.parent_span_id.hex() == "00f067aa0ba902b7"
    assert attributes(job)["training.task_id"] == message["task_id"]
    assert attributes(job)["training.ending"] == "complete"
    order = ["fetch", "vet", "train", "export", "upload", "tell"]
    assert sorted(spans, key=lambda name: spans[name].start_time_unix_nano) == order
    assert {span.parent_span_id for span in spans.values()} == {job.span_id}
    (told,) = mortal.backend.endings(message["task_id"])
    assert told.headers["traceparent"].startswith(f"00-{trace_id}-{spans['tell'].span_id.hex()}")
    story = [line for line in log_lines(watched) if line.get("task_id") == message["task_id"]]
    events = [line["event"] for line in story]
    steps = ["job_claimed", "pictures_fetched", "run_taken", "training_started", "epoch_done"]
    steps += ["checkpoint_uploaded", "model_published", "job_ended", "ending_sent"]
    assert [event for event in dict.fromkeys(events) if event in steps] == steps
    assert all({"level", "timestamp", "logger"} <= set(line) for line in story)


def test_a_job_that_will_be_retried_reports_its_place_in_the_queue(
    mortal: World, pages: Pages, watched: WorkerProcess
) -> None:
    """The job before it was done, so the worker knows how long a job takes."""
    message = mortal.envelope(style_id=75, parameters={"epochs": 200})
    task_id = message["task_id"]
    mortal.publish(message)
    until(lambda: (pages.json("/status")["job"] or {}).get("epoch", 0) > 2)
    waiting = mortal.envelope(style_id=76)
    mortal.publish(waiting)
    until(lambda: pages.metric("queue_messages", queue="training") == 1)
    (trainer,) = (
        each for each in psutil.Process(watched.pid).children() if "--runs-fd" in each.cmdline()
    )
    trainer.kill()

    def placed() -> list[dict[str, Any]]:
        told = (each.body["progress"] for each in mortal.backend.progress(task_id))
        return [each for each in told if each["stage"] == "queued"]

    (progress,) = until(placed)
    assert progress["queue_position"] == 2 and progress["estimated_seconds"] > 0
    assert progress["current_epoch"] > 0
    mortal.s3.put_object(Bucket=mortal.state, Key=f"jobs/{task_id}.cancel", Body=b"")
    assert mortal.ending(waiting["task_id"])[0] == "complete"
    assert mortal.ending(task_id)[1]["error_code"] == "CANCELLED"
    assert pages.metric("trainer_restarts_total") == 1
    assert pages.metric("job_retries_total", code="WORKER_CRASHED") == 1
    assert pages.metric("wasted_gpu_seconds_total", reason="retry") > 0


def test_a_fault_of_the_service_is_an_error_report_and_one_of_the_order_is_not(
    mortal: World, sentry: SentryDoor
) -> None:
    message = mortal.envelope(style_id=74, images=[f"s3://{mortal.media}/training/none.jpg"] * 3)
    message["data"]["captions"] = None
    mortal.publish(message)
    assert mortal.ending(message["task_id"])[1]["error_code"] == "IMAGE_DOWNLOAD_FAILED"
    damaged = mortal.envelope(style_id=75)
    mortal.s3.put_object(Bucket=mortal.state, Key=f"jobs/{damaged['task_id']}.json", Body=b"{")
    mortal.publish(damaged)

    def reports() -> list[dict[str, str]]:
        told = [each for each in sentry.events() if each["message"] == "message_given_up"]
        return [each["tags"] for each in told if each["tags"]["task_id"] == damaged["task_id"]]

    (tags,) = until(reports)
    assert tags["style_id"] == "75"
    assert not [each for each in sentry.events() if each["message"] == "job_failed"]


def test_a_port_in_use_is_reported_at_once_with_its_setting(mortal: World) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with mortal.worker(HTTP_PORT=str(port)) as worker:
            until(lambda: worker.exit_code is not None)
            assert worker.exit_code == 2
            said = worker.last_words()
            assert f"HTTP_PORT {port}" in said and "in use" in said
            assert "Traceback" not in said
