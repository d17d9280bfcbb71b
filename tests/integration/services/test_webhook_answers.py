"""WebhookService's judgement of answers, and of networks that give none."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import requests
import urllib3.exceptions
from structlog.testing import capture_logs

from sandbox.backend import SIGNING_SECRET, TOKEN, Answer, Backend
from services.webhooks.webhook_service import (
    EndingOutcome,
    EndingWebhook,
    ProgressAnswer,
    WebhookService,
)
from tests.integration.services.webhook_setup import (
    ENDING,
    REPORT,
    sequence,
    service,
)

# ---- the table of answers ------------------------------------------------------------------------


TABLE = [
    (200, ProgressAnswer.DONE, EndingOutcome.DELIVERED),
    (202, ProgressAnswer.DONE, EndingOutcome.DELIVERED),
    (204, ProgressAnswer.DONE, EndingOutcome.DELIVERED),
    (304, ProgressAnswer.REJECTED, EndingOutcome.REJECTED),
    (400, ProgressAnswer.REJECTED, EndingOutcome.REJECTED),
    (401, ProgressAnswer.UNAUTHORIZED, EndingOutcome.RETRY_SLOWLY),
    (403, ProgressAnswer.UNAUTHORIZED, EndingOutcome.RETRY_SLOWLY),
    (404, ProgressAnswer.NOT_FOUND, EndingOutcome.RETRY_A_FEW),
    (408, ProgressAnswer.DROPPED, EndingOutcome.RETRY),
    (409, ProgressAnswer.REJECTED, EndingOutcome.REJECTED),
    (410, ProgressAnswer.CANCEL, EndingOutcome.DELIVERED),
    (422, ProgressAnswer.REJECTED, EndingOutcome.REJECTED),
    (425, ProgressAnswer.DROPPED, EndingOutcome.RETRY),
    (429, ProgressAnswer.DROPPED, EndingOutcome.RETRY),
    (500, ProgressAnswer.DROPPED, EndingOutcome.RETRY),
    (502, ProgressAnswer.DROPPED, EndingOutcome.RETRY),
    (503, ProgressAnswer.DROPPED, EndingOutcome.RETRY),
    (599, ProgressAnswer.DROPPED, EndingOutcome.RETRY),
    (999, ProgressAnswer.REJECTED, EndingOutcome.REJECTED),
]


@pytest.mark.parametrize(("status", "progress", "ending"), TABLE)
def test_each_answer_has_its_meaning(
    backend: Backend,
    webhooks: WebhookService,
    status: int,
    progress: ProgressAnswer,
    ending: EndingOutcome,
) -> None:
    backend.answer = sequence(Answer(status, body=b""))
    assert webhooks.send_progress(backend.url, REPORT) is progress
    answer = webhooks.send_ending(backend.url, ENDING)
    assert (answer.outcome, answer.status) == (ending, status)


HTML = {"Content-Type": "text/html; charset=utf-8"}


@pytest.mark.parametrize(
    ("status", "progress", "ending"),
    [
        (200, ProgressAnswer.DROPPED, EndingOutcome.RETRY),  # a login page, a maintenance page
        (302, ProgressAnswer.REJECTED, EndingOutcome.RETRY_A_FEW),
        (400, ProgressAnswer.REJECTED, EndingOutcome.RETRY_A_FEW),
        (413, ProgressAnswer.REJECTED, EndingOutcome.RETRY_A_FEW),
        (404, ProgressAnswer.NOT_FOUND, EndingOutcome.RETRY_A_FEW),
        (410, ProgressAnswer.CANCEL, EndingOutcome.DELIVERED),
        (503, ProgressAnswer.DROPPED, EndingOutcome.RETRY),
    ],
)
def test_a_web_page_is_not_treated_as_the_backends_own_answer(
    backend: Backend,
    webhooks: WebhookService,
    status: int,
    progress: ProgressAnswer,
    ending: EndingOutcome,
) -> None:
    backend.answer = sequence(Answer(status, HTML, b"<!doctype html><h1>nginx</h1>"))
    assert webhooks.send_progress(backend.url, REPORT) is progress
    answer = webhooks.send_ending(backend.url, ENDING)
    assert (answer.outcome, answer.by_json) == (ending, False)


def test_a_page_with_the_word_cancel_cancels_nothing(
    backend: Backend, webhooks: WebhookService
) -> None:
    backend.answer = sequence(Answer(200, HTML, b'{"cancel": true}'))
    assert webhooks.send_progress(backend.url, REPORT) is ProgressAnswer.DROPPED


@pytest.mark.parametrize("status", [201, 302, 307, 400, 401, 403, 404, 409, 429, 500, 503])
def test_a_refusal_that_contains_cancel_cancels_nothing(
    backend: Backend, webhooks: WebhookService, status: int
) -> None:
    """Only the backend that takes the report can cancel the job."""
    backend.answer = sequence(Answer(status, {"Location": "/"}, b'{"cancel": true}'))
    answer = webhooks.send_progress(backend.url, REPORT)
    assert (answer is ProgressAnswer.CANCEL) is (status == 201)


@pytest.mark.parametrize(
    ("body", "by_json"),
    [(b'{"detail": "no such style"}', True), (b"[]", False), (b"not found", False), (b"", False)],
)
def test_an_answer_of_an_application_is_recognised(
    backend: Backend, webhooks: WebhookService, body: bytes, by_json: bool
) -> None:
    backend.answer = sequence(Answer(404, {"Content-Type": "text/plain"}, body))
    assert webhooks.send_ending(backend.url, ENDING).by_json is by_json


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b'{"cancel": true}', ProgressAnswer.CANCEL),
        (b'{"status": "ok", "cancel": true}', ProgressAnswer.CANCEL),
        (b'{"pause": true}', ProgressAnswer.PAUSE),
        (b'{"pause": true, "cancel": true}', ProgressAnswer.CANCEL),
        (b'{"pause": 1}', ProgressAnswer.DONE),
        (b'{"cancel": false}', ProgressAnswer.DONE),
        (b'{"cancel": "true"}', ProgressAnswer.DONE),
        (b'{"cancel": 1}', ProgressAnswer.DONE),
        (b'[{"cancel": true}]', ProgressAnswer.DONE),
        (b"cancel", ProgressAnswer.DONE),
        (b"\xff\xfe", ProgressAnswer.DONE),
        (b"[" * 60_000, ProgressAnswer.DONE),
        (b"", ProgressAnswer.DONE),
    ],
)
def test_a_report_can_be_answered_with_a_cancel_or_a_pause(
    backend: Backend, webhooks: WebhookService, body: bytes, answer: ProgressAnswer
) -> None:
    backend.answer = sequence(Answer(200, body=body))
    assert webhooks.send_progress(backend.url, REPORT) is answer


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": " 0 "}, 0.0),
        ({"Retry-After": "99999999999999999999"}, 3600.0),
        (
            {
                "Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT",
                "Date": "Wed, 21 Oct 2015 07:28:00 GMT",
            },
            30.0,
        ),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry-After": "Wed, 21 Oct 2999 07:28:00 GMT"}, 3600.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT", "Date": "yesterday"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 -0000"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "1e3"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "1, 2"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_both_forms_and_bounded(
    backend: Backend,
    webhooks: WebhookService,
    headers: dict[str, str],
    seconds: float | None,
) -> None:
    backend.answer = sequence(Answer(429, headers, b""))
    assert webhooks.send_ending(backend.url, ENDING).retry_after == seconds


def test_the_detail_is_one_short_line_without_secrets(
    backend: Backend, webhooks: WebhookService
) -> None:
    echo = f"you sent {TOKEN}\r\n\x1b[31m and {SIGNING_SECRET} " + "x" * 1000
    backend.answer = sequence(Answer(400, body=echo.encode()))
    with capture_logs() as logs:
        detail = webhooks.send_ending(backend.url, ENDING).detail
    assert detail.startswith("you sent [redacted] [31m and [redacted] xxx") and len(detail) == 200
    assert TOKEN not in str(logs) and SIGNING_SECRET not in str(logs)


# ---- networks that misbehave ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "progress", "ending"),
    [
        (Answer(delay=5), ProgressAnswer.DROPPED, EndingOutcome.RETRY),
        (Answer(reset=True), ProgressAnswer.DROPPED, EndingOutcome.RETRY),
        (Answer(drip=0.2), ProgressAnswer.DROPPED, EndingOutcome.RETRY),
    ],
    ids=["hang", "reset", "drop by drop"],
)
def test_a_backend_that_does_not_answer_is_a_dropped_report_and_a_retry_in_time(
    backend: Backend, answer: Answer, progress: ProgressAnswer, ending: EndingOutcome
) -> None:
    webhooks = service(backend.url, timeout=0.5)
    backend.answer = sequence(answer)
    began = time.monotonic()
    assert webhooks.send_progress(backend.url, REPORT) is progress
    assert webhooks.send_ending(backend.url, ENDING).outcome is ending
    assert time.monotonic() - began < 2


def wait_until_no_thread_is_left() -> None:
    """The threads of attempts that were given up end soon."""
    for _ in range(100):
        if not [thread for thread in threading.enumerate() if thread.name == "webhook"]:
            return
        time.sleep(0.02)
    raise AssertionError("a webhook's thread is still there")


class RawBackend:
    """Sends the bytes of a test to every client that connects."""

    def __init__(self, *pieces: bytes, pause: float = 0.0, reset: bool = False) -> None:
        self._pieces, self._pause, self._reset = pieces, pause, reset
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> RawBackend:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        try:
            connection.recv(65536)
            for piece in self._pieces:
                connection.sendall(piece)
                if self._closing.wait(self._pause):
                    return
            if self._reset:
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        except OSError:
            return


HEAD = b"HTTP/1.1 200 OK\r\n"
HEADLESS: dict[str, tuple[bytes, ...]] = {
    "nothing": (b"",),
    "not HTTP": (b"220 mail.example ESMTP\r\n",),
    "half a line": (b"HTTP/1.1 20",),
    "a status that is no number": (b"HTTP/1.1 abc OK\r\n\r\n",),
    "an endless header": (HEAD + b"x: " + b"y" * 100_000,),
    "a thousand headers": (HEAD + b"x: y\r\n" * 1000,),
}


@pytest.mark.parametrize("pieces", HEADLESS.values(), ids=HEADLESS)
def test_an_invalid_answer_leads_to_a_retry(pieces: tuple[bytes, ...]) -> None:
    with RawBackend(*pieces) as backend:
        webhooks = service(backend.url)
        assert webhooks.send_progress(backend.url, REPORT) is ProgressAnswer.DROPPED
        answer = webhooks.send_ending(backend.url, ENDING)
        assert (answer.outcome, answer.status) == (EndingOutcome.RETRY, None)
        assert answer.detail


@pytest.mark.parametrize(
    "rest",
    [
        b"Content-Length: 100\r\n\r\nhalf",
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x00\x00",
        b"Content-Length: x\r\n\r\n",
        b"Content-Length: 9999999999\r\n\r\n" + b"x" * 200_000,
    ],
)
@pytest.mark.parametrize("reset", [False, True])
def test_an_accepted_ending_stays_accepted_if_the_body_of_the_answer_breaks_off(
    rest: bytes, reset: bool
) -> None:
    with RawBackend(HEAD + rest, reset=reset, pause=0.05) as backend:
        webhooks = service(backend.url)
        assert webhooks.send_ending(backend.url, ENDING).outcome is EndingOutcome.DELIVERED
        assert webhooks.send_progress(backend.url, REPORT) is ProgressAnswer.DONE


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
def test_an_endless_slow_body_is_cut_off_in_time_with_its_thread(close: bytes) -> None:
    drops = [b"x"] * 1000
    with RawBackend(HEAD + close + b"Content-Length: 1000\r\n\r\n", *drops, pause=0.1) as backend:
        webhooks = service(backend.url, timeout=0.5)
        began = time.monotonic()
        assert webhooks.send_ending(backend.url, ENDING).outcome is EndingOutcome.DELIVERED
        assert time.monotonic() - began < 2
        wait_until_no_thread_is_left()


def test_an_endless_slow_head_is_cut_off_in_time_with_its_thread() -> None:
    with RawBackend(HEAD, *[b"x: y\r\n"] * 1000, pause=0.1) as backend:
        webhooks = service(backend.url, timeout=0.5)
        began = time.monotonic()
        assert webhooks.send_ending(backend.url, ENDING).outcome is EndingOutcome.RETRY
        assert time.monotonic() - began < 2
        wait_until_no_thread_is_left()


def test_a_refused_connection_leads_to_a_retry() -> None:
    webhooks = service("http://127.0.0.1:1")
    assert webhooks.send_progress("http://127.0.0.1:1", REPORT) is ProgressAnswer.DROPPED
    answer = webhooks.send_ending("http://127.0.0.1:1", ENDING)
    assert answer.outcome is EndingOutcome.RETRY and "Connection refused" in answer.detail


def test_a_backend_whose_certificate_cannot_be_verified_gets_nothing(backend: Backend) -> None:
    url = backend.url.replace("http:", "https:")
    assert service(url).send_ending(url, ENDING).outcome is EndingOutcome.RETRY
    assert not backend.requests and not backend.rejected


def families() -> list[type[BaseException]]:
    """Every class of error that requests and urllib3 can raise."""
    found: list[type[BaseException]] = []

    def walk(cls: type[BaseException]) -> None:
        found.append(cls)
        for child in cls.__subclasses__():
            walk(child)

    walk(requests.exceptions.RequestException)
    walk(urllib3.exceptions.HTTPError)
    return sorted(set(found), key=lambda cls: f"{cls.__module__}.{cls.__qualname__}")


@pytest.mark.parametrize("cls", families(), ids=lambda cls: cls.__name__)
def test_no_error_of_requests_escapes(
    monkeypatch: pytest.MonkeyPatch, cls: type[BaseException]
) -> None:
    def fail(*_: object, **__: object) -> None:
        error = cls.__new__(cls)
        vars(error).update(partial=0, expected=1, length=b"", response=None)  # their repr's
        raise error

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", fail)
    webhooks = service("https://a.com")
    progress = webhooks.send_progress("https://a.com", REPORT)
    outcome = webhooks.send_ending("https://a.com", ENDING).outcome
    assert (progress, outcome) in (
        (ProgressAnswer.DROPPED, EndingOutcome.RETRY),
        (ProgressAnswer.REJECTED, EndingOutcome.REJECTED),
    )
    hopeless = issubclass(cls, requests.exceptions.InvalidURL)
    assert not hopeless or outcome is EndingOutcome.REJECTED


def test_an_id_that_no_header_can_carry_is_refused_without_an_attempt(
    backend: Backend, webhooks: WebhookService
) -> None:
    ending = EndingWebhook("failed", "msg\r\nx: y", ENDING.body)
    assert webhooks.send_ending(backend.url, ending).outcome is EndingOutcome.REJECTED
    assert not backend.requests and not backend.rejected


def test_many_threads_may_send_at_once(backend: Backend, webhooks: WebhookService) -> None:
    threads = [
        threading.Thread(target=webhooks.send_progress, args=(backend.url, REPORT))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(backend.requests) == 16 and not backend.rejected
