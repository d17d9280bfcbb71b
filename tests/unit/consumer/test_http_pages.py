"""The pages with a condition that the test sets: their answers, and clients without one."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from consumer.pages import condition as condition_module
from consumer.pages import http_pages
from consumer.pages.condition import Condition
from consumer.pages.http_pages import HttpPages, numbers_of
from consumer.pages.local import local_pages
from consumer.pages.observer import Observer
from consumer.trainer.machine import Machine
from consumer.trainer.trainer_process import TrainerProcess
from services.broker.connection import BrokerLoop
from tests.unit.jobs.message_samples import style_kind
from utils.errors import ConfigurationError
from utils.events import Progress, Stage
from utils.gpu_monitor import GpuReading
from utils.metrics import Metrics


class Broker(BrokerLoop):
    # pylint: disable=super-init-not-called
    """A connection in a state that the test sets."""

    def __init__(self) -> None:
        self.connected = self.consuming = self.holds = True
        self.silent_for = 0.0

    @property
    def busy(self) -> bool:
        """Whether a job runs."""
        return self.holds

    def turned_within(self, seconds: float) -> bool:
        """Whether the thread works."""
        return self.silent_for < seconds


class Trainer(TrainerProcess):
    # pylint: disable=super-init-not-called
    """A child that lives, or not."""

    def __init__(self) -> None:
        self.alive = self.loaded = True

    @property
    def pid(self) -> int | None:
        """Of the child."""
        return 1 if self.alive else None

    @property
    def base_model_ready(self) -> bool:
        """Whether it has its model."""
        return self.loaded


def _condition_of(observer: Observer, stop: threading.Event) -> Condition:
    return Condition(
        observer, stop, first_kind=style_kind(), base_model="owner/name", queue="model_training"
    )


@pytest.fixture(name="trainer")
def _trainer() -> Trainer:
    return Trainer()


@pytest.fixture(name="broker")
def _broker() -> Broker:
    return Broker()


@pytest.fixture(name="stop")
def _stop() -> threading.Event:
    return threading.Event()


@pytest.fixture(name="condition")
def _condition(trainer: Trainer, broker: Broker, stop: threading.Event) -> Condition:
    """A healthy worker."""
    condition = _condition_of(Observer(), stop)
    condition.machine_tested(Machine(cuda=True, device="NVIDIA H200", count=2, capability="9.0"))
    condition.has_trainer(trainer)
    condition.has_broker(broker)
    condition.storage_tested(None)
    return condition


@pytest.fixture(name="pages")
def _pages(condition: Condition) -> Iterator[HttpPages]:
    with HttpPages("127.0.0.1", 0, condition, Observer().metrics) as pages:
        yield pages


def ask(pages: HttpPages, path: str) -> tuple[int, dict[str, Any]]:
    """Status and content of a page."""
    connection = http.client.HTTPConnection("127.0.0.1", pages.port, timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    body: dict[str, Any] = json.loads(answer.read())
    connection.close()
    return answer.status, body


def test_the_json_metrics_give_bytes_and_gigabytes(pages: HttpPages) -> None:
    numbers = ask(pages, "/metrics")[1]
    assert (numbers["gpu_memory_allocated"], numbers["gpu_memory_allocated_gb"]) == (0, 0.0)
    progress = Progress(
        *("t", Stage.TRAINING, 5, 10),
        gpu_memory_allocated=12_500_000_000,
        gpu_memory_reserved=20_000_000_000,
    )
    assert numbers_of(style_kind(), progress, True)["gpu_memory_reserved_gb"] == 20
    assert numbers_of(style_kind(), progress, True)["gpu_memory_allocated"] == 12_500_000_000
    assert numbers_of(style_kind(), progress, True)["gpu_memory_allocated_gb"] == 12.5
    assert numbers_of(style_kind(), progress, False)["gpu_memory_allocated_gb"] == 0


def test_a_local_training_has_the_same_pages() -> None:
    machine = Machine(cuda=True, device="NVIDIA H200", count=1, capability="9.0")
    pages, condition = local_pages("127.0.0.1", 0, style_kind(), machine, "model")
    with pages:
        assert ask(pages, "/health") == (
            200,
            {"status": "healthy", "cuda_available": True, "is_training": True},
        )
        assert ask(pages, "/ready")[0] == 503
        assert ask(pages, "/status")[1]["stage"] is None
        condition.saw(Progress("local", Stage.TRAINING, 5, 10, per_second=2.0))
        status, numbers = ask(pages, "/status")[1], ask(pages, "/metrics")[1]
    assert (status["stage"], status["gpu_compute_capability"]) == ("training", "9.0")
    assert (numbers["current_step"], numbers["estimated_seconds"]) == (5, 2)


def test_a_healthy_worker_is_ready(pages: HttpPages) -> None:
    assert ask(pages, "/ready")[0] == ask(pages, "/health")[0] == 200
    status = ask(pages, "/status")[1]
    assert (status["is_running"], status["gpu_count"], status["gpu_name"]) == (
        True,
        2,
        "NVIDIA H200",
    )


@pytest.mark.parametrize("part", ["broker", "s3", "gpu", "base_model"])
def test_each_missing_part_is_named_and_no_other(
    pages: HttpPages, condition: Condition, part: str, broker: Broker, trainer: Trainer
) -> None:
    match part:
        case "broker":
            broker.connected = False
        case "s3":
            condition.storage_tested("s3://state: S3 did not answer in time")
        case "gpu":
            condition.machine_failed("the GPU does not compute any more")
        case "base_model":
            trainer.loaded = False
    code, ready = ask(pages, "/ready")
    assert (code, ready["ready"]) == (503, False)
    assert [name for name, said in ready["checks"].items() if said != "ok"] == [part]
    assert ask(pages, "/health")[0] == 200, "no reason to shoot it"


def test_a_state_bucket_that_was_not_tested_yet_keeps_the_worker_from_being_ready(
    pages: HttpPages, condition: Condition
) -> None:
    problem = "the state bucket could not be tested for conditional writes: down"
    condition.state_tested(problem)
    code, ready = ask(pages, "/ready")
    assert (code, ready["checks"]["s3"]) == (503, problem)


def test_a_part_that_is_ready_can_have_a_remark(pages: HttpPages, condition: Condition) -> None:
    condition.state_tested(None, "ok, but unguarded: run this worker only")
    code, ready = ask(pages, "/ready")
    assert (code, ready["ready"]) == (200, True)
    assert ready["checks"]["s3"] == "ok, but unguarded: run this worker only"
    condition.storage_tested("S3 did not answer in time")
    assert ask(pages, "/ready")[1]["checks"]["s3"] == "S3 did not answer in time"


def test_a_worker_that_neither_consumes_nor_holds_a_job_is_not_ready(
    pages: HttpPages, broker: Broker
) -> None:
    broker.consuming = False
    assert ask(pages, "/ready")[0] == 200
    broker.holds = False
    assert ask(pages, "/ready")[0] == 503


def test_a_service_that_has_not_answered_for_long_is_reported_without_an_error(
    pages: HttpPages, monkeypatch: pytest.MonkeyPatch, broker: Broker
) -> None:
    """A machine that vanishes closes no connection, and a request to it may hang."""
    broker.silent_for = 6.0
    checks = ask(pages, "/ready")[1]["checks"]
    assert checks["broker"] == "RabbitMQ has not answered for 5 seconds"
    assert {checks[part] for part in ("s3", "gpu", "base_model")} == {"ok"}
    broker.silent_for = 0.0
    monkeypatch.setattr(condition_module, "S3_SILENT_SECONDS", 0.01)
    time.sleep(0.05)
    assert "has not answered" in ask(pages, "/ready")[1]["checks"]["s3"]


def test_a_gpu_that_was_read_and_is_not_any_more_is_lost() -> None:
    observer = Observer()
    condition = _condition_of(observer, threading.Event())
    condition.machine_tested(Machine(cuda=True, device="NVIDIA H200", count=1))
    observer.gpus([])
    assert "gpu" not in condition.problems(), "NVIDIA's driver was never there"
    observer.gpus([GpuReading(0, "NVIDIA H200", 1, 2, None, None, None)])
    assert "gpu" not in condition.problems()
    observer.gpus([])
    assert "NVML" in condition.problems()["gpu"]


def test_a_page_that_breaks_breaks_no_other(
    pages: HttpPages, condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(condition, "status", lambda: 1 / 0)
    assert ask(pages, "/status") == (500, {"error": "internal error: see the worker's log"})
    assert ask(pages, "/health")[0] == 200


def test_a_client_that_holds_all_connections_does_not_block_probes(
    pages: HttpPages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_pages, "_CONNECTIONS", 5)
    monkeypatch.setattr(http_pages, "_CONNECTION_SECONDS", 60.0)
    with contextlib.ExitStack() as held:
        greedy = []
        for _ in range(20):
            greedy.append(socket.create_connection(("127.0.0.1", pages.port), timeout=10))
            held.callback(greedy[-1].close)
            greedy[-1].sendall(b"GET /health HTTP/1.1\r\n")
        assert ask(pages, "/health")[0] == 200
        with contextlib.suppress(ConnectionResetError):
            assert greedy[0].recv(1) == b"", "the oldest made room"


def test_the_metrics_text_is_made_once_a_second_however_many_ask(
    condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    made: list[str] = []

    def render(accept: str) -> tuple[bytes, str]:
        made.append(accept)
        return b"text", "text/plain"

    monkeypatch.setattr(metrics, "render", render)
    monkeypatch.setattr(http_pages, "_KEPT_SECONDS", 60.0)
    with HttpPages("127.0.0.1", 0, condition, metrics) as pages:

        def scrape(accept: str) -> None:
            connection = http.client.HTTPConnection("127.0.0.1", pages.port, timeout=10)
            connection.request("GET", "/metrics", headers={"Accept": accept})
            assert connection.getresponse().read() == b"text"
            connection.close()

        for _ in range(3):
            scrape("text/plain")
            scrape("application/openmetrics-text")
        assert made == ["text/plain", "application/openmetrics-text"], "each its own"
        monkeypatch.setattr(http_pages, "_KEPT_SECONDS", 0.0)
        scrape("text/plain")
        assert len(made) == 3


def test_a_client_that_sends_nonsense_writes_nothing_into_the_log(
    pages: HttpPages, caplog: pytest.LogCaptureFixture
) -> None:
    chunked = b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzzzz\r\n"
    upgrade = b"GET /health HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
    for nonsense in (b"\x16\x03\x01garbage\r\n\r\n", chunked, upgrade):
        with socket.create_connection(("127.0.0.1", pages.port), timeout=10) as stranger:
            stranger.sendall(nonsense)
            assert stranger.recv(100).startswith(b"HTTP/1.1 ")
    assert ask(pages, "/health")[0] == 200
    assert not caplog.records


def test_before_anything_is_known_it_is_alive_and_not_ready() -> None:
    newborn = _condition_of(Observer(), threading.Event())
    assert len(newborn.problems()) == 4
    assert newborn.health()["status"] == "healthy"


def test_a_missing_trainer_is_a_reason_to_restart_the_worker(
    pages: HttpPages, monkeypatch: pytest.MonkeyPatch, trainer: Trainer
) -> None:
    trainer.alive = False
    assert ask(pages, "/health")[0] == 200, "it is being replaced, perhaps"
    monkeypatch.setattr(condition_module, "CHILDLESS_SECONDS", 0.05)
    time.sleep(0.1)
    code, health = ask(pages, "/health")
    assert (code, health["status"]) == (503, "unhealthy")
    assert "no trainer process" in health["problem"]
    trainer.alive = True
    assert ask(pages, "/health")[0] == 200


def test_a_connection_thread_that_stands_still_is_a_reason_to_restart_the_worker(
    pages: HttpPages, broker: Broker
) -> None:
    broker.silent_for = 181.0
    assert ask(pages, "/health")[0] == 503


def test_a_broker_that_does_not_answer_a_request_is_named_and_is_no_reason_to_restart(
    pages: HttpPages, broker: Broker, stop: threading.Event
) -> None:
    assert "broker" not in ask(pages, "/health")[1]
    broker.silent_for = 6.0
    status, health = ask(pages, "/health")
    assert (status, health["status"]) == (200, "healthy")
    assert health["broker"] == "RabbitMQ has not answered for 5 seconds"
    assert "problem" not in health
    broker.connected = False
    assert "broker" not in ask(pages, "/health")[1], "the worker tries to connect"
    broker.connected = True
    stop.set()
    assert "broker" not in ask(pages, "/health")[1]


def test_a_worker_that_stops_is_alive_but_not_ready(
    condition: Condition, stop: threading.Event
) -> None:
    stop.set()
    assert condition.problems() == {"broker": "the worker shuts down"}
    assert condition.health()["status"] == "healthy"
    assert condition.status()["is_running"] is False


def test_a_client_that_sends_half_a_request_is_cut_off(
    condition: Condition, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_pages, "_CONNECTION_SECONDS", 0.2)
    with (
        HttpPages("127.0.0.1", 0, condition, Observer().metrics) as pages,
        socket.create_connection(("127.0.0.1", pages.port), timeout=30) as lingering,
    ):
        lingering.sendall(b"GET /health HTTP/1.1\r\n")
        try:
            assert lingering.recv(1) == b""
        except ConnectionResetError:
            pass


def test_a_host_that_is_not_this_machine_is_reported_with_its_setting(condition: Condition) -> None:
    with pytest.raises(ConfigurationError, match="HTTP_HOST 192.0.2.1"):
        HttpPages("192.0.2.1", 0, condition, Observer().metrics)
