"""WebhookService against a backend that verifies every signature."""

from __future__ import annotations

import base64
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from sandbox.backend import COMPLETE, FAILED, PROGRESS, SIGNING_SECRET, Answer, Backend
from services.webhooks import webhook_service
from services.webhooks.webhook_service import (
    EndingAnswer,
    EndingOutcome,
    EndingWebhook,
    ProgressAnswer,
    RetrySchedule,
    WebhookService,
)
from tests.integration.services.webhook_setup import (
    ENDING,
    REPORT,
    sequence,
    service,
)
from utils.errors import ConfigurationError
from utils.metrics import PREFIX, Metrics

OTHER_SECRET = "whsec_" + base64.b64encode(b"another secret of 24 byte").decode()

# ---- requests ------------------------------------------------------------------------------------


def test_progress_is_a_signed_patch_with_bearer_and_source(
    backend: Backend, webhooks: WebhookService
) -> None:
    assert webhooks.send_progress(backend.url, REPORT) is ProgressAnswer.DONE
    assert not backend.rejected  # bearer, source, type and signature are judged there
    (request,) = backend.requests
    assert (request.method, request.path, request.body) == ("PATCH", PROGRESS, REPORT)
    assert request.headers["x-request-source"] == "training-server"
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 5


@pytest.mark.parametrize(("kind", "path"), [("complete", COMPLETE), ("failed", FAILED)])
def test_an_ending_is_a_signed_post_under_its_own_id(
    backend: Backend, webhooks: WebhookService, kind: str, path: str
) -> None:
    backend.answer = sequence(Answer(204, body=b""))
    answer = webhooks.send_ending(backend.url, EndingWebhook(kind, "msg_7", {"style_id": 1}))
    assert answer == EndingAnswer(EndingOutcome.DELIVERED, status=204)
    (request,) = backend.endings()
    assert (request.method, request.path, request.webhook_id) == ("POST", path, "msg_7")


def test_each_progress_report_has_a_separate_id(backend: Backend, webhooks: WebhookService) -> None:
    for _ in range(3):
        webhooks.send_progress(backend.url, REPORT)
    assert len({request.webhook_id for request in backend.progress()}) == 3


def test_while_keys_rotate_every_secret_signs() -> None:
    with Backend(secrets=(SIGNING_SECRET, OTHER_SECRET)) as backend:
        both = service(backend.url, signing_secrets=(SIGNING_SECRET, OTHER_SECRET))
        assert both.send_progress(backend.url, REPORT) is ProgressAnswer.DONE
        one = service(backend.url, signing_secrets=(SIGNING_SECRET,))
        assert one.send_progress(backend.url, REPORT) is ProgressAnswer.REJECTED
        assert "signature" in backend.rejected[0].reason


def test_a_wrong_token_is_unauthorized_and_an_error_in_the_log(backend: Backend) -> None:
    wrong = service(backend.url, token="x" * 32)
    with capture_logs() as logs:
        assert wrong.send_progress(backend.url, REPORT) is ProgressAnswer.UNAUTHORIZED
    assert [(line["log_level"], line["status"]) for line in logs] == [("error", 401)]
    assert wrong.send_ending(backend.url, ENDING).outcome is EndingOutcome.RETRY_SLOWLY


def test_any_text_arrives_as_it_was_signed(backend: Backend, webhooks: WebhookService) -> None:
    body = {**REPORT, "text": 'Aquarell ü 수채화 🎨 \u2028 \\ " \n \ud800'}
    assert webhooks.send_progress(backend.url, body) is ProgressAnswer.DONE
    assert backend.requests[0].body == body


def test_values_that_json_cannot_hold_become_null(
    backend: Backend, webhooks: WebhookService
) -> None:
    body = {**REPORT, "loss": [math.nan, {"rate": math.inf}, 0.5]}
    assert webhooks.send_progress(backend.url, body) is ProgressAnswer.DONE
    assert backend.requests[0].body["loss"] == [None, {"rate": None}, 0.5]


def test_an_empty_report_is_refused_by_the_backend_as_by_the_real_one(
    backend: Backend, webhooks: WebhookService
) -> None:
    assert webhooks.send_progress(backend.url, {}) is ProgressAnswer.REJECTED
    assert backend.requests[0].status == 400


def test_netrc_and_proxies_of_the_environment_are_not_used(
    backend: Backend,
    webhooks: WebhookService,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert webhooks.send_progress(backend.url, REPORT) is ProgressAnswer.DONE


def test_the_paths_are_the_protocols() -> None:
    assert webhook_service.PATHS == {"progress": PROGRESS, "complete": COMPLETE, "failed": FAILED}


# ---- addresses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "requested",
    [
        "https://api.good.com/api/webhooks/training/123/status",
        "https://api.good.com",
        "HTTPS://API.GOOD.COM:443/x",
        "  https://api.good.com?x=1#y",
        "https://xn--bcher-kva.example/",
        "https://bücher.example/",
        "http://local.host:8000/x",
    ],
)
def test_an_allowed_origin_is_used_and_only_the_origin(requested: str) -> None:
    webhooks = service(
        "https://api.default.com/",
        allowed_origins=(
            "https://Api.good.com/",
            "https://bücher.example",
            "http://local.host:8000",
        ),
    )
    with capture_logs() as logs:
        used = webhooks.origin_for(requested)
    assert used in (
        "https://api.good.com",
        "https://xn--bcher-kva.example",
        "http://local.host:8000",
    )
    assert not logs


@pytest.mark.parametrize(
    "requested",
    [
        "https://evil.example/",
        "https://api.good.com@evil.example/",
        "https://evil.example@api.good.com/",
        "https://user:hunter2@api.good.com/",
        "https://api.good.com\\@evil.example",
        "https://evil.example\\@api.good.com",
        "https://evil.example#@api.good.com",
        "https://evil.example?@api.good.com",
        "https://api.good.com.evil.example",
        "https://api.good.com:8443",
        "http://api.good.com",
        "https://api.good.com.",
        "https://api.good.com%2eevil.example",
        "https://api.good.com%00.evil.example",
        "https://api.good\n.com",
        "//api.good.com/x",
        "api.good.com",
        "ftp://api.good.com",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "https://[::1",
        "https://api.good.com:99999",
        "https:///x",
        "http://localhost:8000",
        "\x00",
        "x" * 100_000,
    ],
)
def test_any_other_address_goes_to_the_backend_with_a_warning(requested: str) -> None:
    webhooks = service("https://api.default.com", allowed_origins=("https://api.good.com",))
    with capture_logs() as logs:
        assert webhooks.origin_for(requested) == "https://api.default.com"
    assert [line["log_level"] for line in logs] == ["warning"]
    assert "hunter2" not in str(logs) and len(str(logs)) < 1000


@pytest.mark.parametrize("requested", [None, ""])
def test_no_address_means_the_backend_without_a_warning(requested: str | None) -> None:
    with capture_logs() as logs:
        assert service("https://a.com").origin_for(requested) == "https://a.com"
    assert not logs


def test_a_caller_cannot_send_the_token_to_another_host(
    backend: Backend, webhooks: WebhookService
) -> None:
    with Backend() as other:
        assert webhooks.send_progress(other.url, REPORT) is ProgressAnswer.DONE
        assert not other.requests and not other.rejected
    assert len(backend.requests) == 1


def test_a_second_allowed_backend_gets_its_own_webhooks(backend: Backend) -> None:
    with Backend() as other:
        webhooks = service(backend.url, allowed_origins=(other.url,))
        origin = webhooks.origin_for(f"{other.url}/api/webhooks/training/1/status")
        assert webhooks.send_progress(origin, REPORT) is ProgressAnswer.DONE
        assert len(other.requests) == 1 and not backend.requests


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(
    backend: Backend, webhooks: WebhookService, status: int
) -> None:
    with Backend() as other:
        away = {"Location": other.url + COMPLETE}
        backend.answer = sequence(Answer(status, away, b""))
        assert webhooks.send_progress(backend.url, REPORT) is ProgressAnswer.REJECTED
        assert webhooks.send_ending(backend.url, ENDING).outcome is EndingOutcome.REJECTED
        assert not other.requests and not other.rejected


@pytest.mark.parametrize(
    "settings",
    [
        {"backend_url": "api.example.com"},
        {"allowed_origins": ("https://u:p@a.com",)},
        {"signing_secrets": ()},
        {"signing_secrets": ("whsec_",)},
        {"signing_secrets": ("whsec_*",)},
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        service(**({"url": settings.pop("backend_url", "https://a.com")} | settings))


# ---- delivering ----------------------------------------------------------------------------------


@pytest.fixture(name="stop")
def _stop() -> Iterator[threading.Event]:
    yield threading.Event()


def test_an_ending_is_sent_again_under_the_same_id_until_it_is_accepted(
    backend: Backend, webhooks: WebhookService, stop: threading.Event
) -> None:
    backend.answer = sequence(Answer(503), Answer(reset=True), Answer(500), Answer(200))
    answer = webhooks.deliver(backend.url, ENDING, for_seconds=5, stop=stop)
    assert answer.outcome is EndingOutcome.DELIVERED
    assert [request.status for request in backend.endings()] == [503, 0, 500, 200]
    assert {request.webhook_id for request in backend.endings()} == {"msg_1"}
    assert backend.wait_for_ending("t").status == 200
    times = [request.received_at for request in backend.endings()]
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    assert gaps[0] >= 0.05 and gaps[1] >= 0.1 and gaps[2] >= 0.1


def test_each_attempt_has_its_own_time(backend: Backend, stop: threading.Event) -> None:
    backend.answer = sequence(Answer(500), Answer(200))
    webhooks = service(backend.url, schedule=RetrySchedule(delays=(1.1,), jitter=0))
    webhooks.deliver(backend.url, ENDING, for_seconds=5, stop=stop)
    first, second = (int(each.headers["webhook-timestamp"]) for each in backend.endings())
    assert second > first and not backend.rejected


def test_a_refused_ending_is_not_sent_again(
    backend: Backend, webhooks: WebhookService, stop: threading.Event
) -> None:
    backend.answer = sequence(Answer(422, body=b"no such field"))
    answer = webhooks.deliver(backend.url, ENDING, for_seconds=5, stop=stop)
    assert answer == EndingAnswer(EndingOutcome.REJECTED, None, 422, "no such field")
    assert len(backend.requests) == 1


def test_retry_after_is_waited_for(
    backend: Backend, webhooks: WebhookService, stop: threading.Event
) -> None:
    backend.answer = sequence(Answer(429, {"Retry-After": "1"}), Answer(200))
    webhooks.deliver(backend.url, ENDING, for_seconds=5, stop=stop)
    first, second = backend.endings()
    assert 1.0 <= second.received_at - first.received_at < 2.0


def test_a_refused_token_is_tried_more_slowly(
    backend: Backend, webhooks: WebhookService, stop: threading.Event
) -> None:
    backend.answer = sequence(Answer(401), Answer(200))
    webhooks.deliver(backend.url, ENDING, for_seconds=5, stop=stop)
    first, second = backend.endings()
    assert second.received_at - first.received_at >= 0.3


@pytest.mark.parametrize("for_seconds", [0.0, 0.5])
def test_a_wait_beyond_the_time_limit_does_not_begin(
    backend: Backend, webhooks: WebhookService, stop: threading.Event, for_seconds: float
) -> None:
    backend.answer = sequence(Answer(503, {"Retry-After": "60"}))
    began = time.monotonic()
    answer = webhooks.deliver(backend.url, ENDING, for_seconds=for_seconds, stop=stop)
    assert (answer.outcome, answer.retry_after) == (EndingOutcome.RETRY, 60.0)
    assert time.monotonic() - began < 0.4 and len(backend.requests) == 1


def test_a_stop_ends_the_waiting_but_one_attempt_is_always_made(
    backend: Backend, webhooks: WebhookService, stop: threading.Event
) -> None:
    stop.set()
    backend.answer = sequence(Answer(503))
    answer = webhooks.deliver(backend.url, ENDING, for_seconds=60, stop=stop)
    assert answer.outcome is EndingOutcome.RETRY and len(backend.requests) == 1


def test_the_default_schedule_is_that_of_the_fields_with_some_jitter() -> None:
    schedule = RetrySchedule()
    again = EndingAnswer(EndingOutcome.RETRY)
    for attempts, seconds in enumerate((5, 30, 30), start=1):
        waits = {schedule.seconds(attempts, again) for _ in range(50)}
        assert len(waits) > 1
        assert all(0.8 * seconds <= wait <= 1.2 * seconds for wait in waits)
    patient = EndingAnswer(EndingOutcome.RETRY, retry_after=100.0)
    assert schedule.seconds(1, patient) == 100.0


# ---- metrics -------------------------------------------------------------------------------------


def test_every_attempt_is_counted_and_timed(backend: Backend) -> None:
    metrics = Metrics()
    webhooks = service(backend.url, metrics=metrics)
    backend.answer = sequence(Answer(503), Answer(200))
    webhooks.deliver(backend.url, ENDING, for_seconds=10, stop=threading.Event())
    unreachable = service("http://127.0.0.1:1", metrics=metrics)
    unreachable.send_progress("http://127.0.0.1:1", REPORT)

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"{PREFIX}_webhook_{name}", labels)

    assert value("attempts_total", kind="failed", outcome="5xx") == 1
    assert value("attempts_total", kind="failed", outcome="2xx") == 1
    assert value("attempts_total", kind="progress", outcome="no_answer") == 1
    assert value("duration_seconds_count", kind="failed") == 2
