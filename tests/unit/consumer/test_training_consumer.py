"""The threads of the handlers, and the fate of a message whose handler breaks."""

# A counter is read where prometheus_client keeps it.
# pylint: disable=protected-access

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from structlog.testing import capture_logs

from consumer import training_consumer
from consumer.pages.observer import Observer
from consumer.training_consumer import MAX_CRASHES, HandlerThreads
from services.broker.settlement import (
    CRASHES,
    MIN_LEVEL,
    OWN_COPY,
    PUT_OFFS,
    Action,
    Delivery,
    Publication,
    Queue,
    Settlement,
)
from tests.unit.services.fake_broker import soon

DELAYS = (10.0, 60.0, 600.0)


def broken(
    error: BaseException,
    delivery: Delivery,
    *,
    crash_delays: Sequence[float] = DELAYS,
    observer: Observer | None = None,
) -> Settlement:
    """The settlement of a delivery whose handler breaks."""

    def handle(_: Delivery) -> Settlement:
        raise error

    decided: list[Settlement] = []
    HandlerThreads(handle, crash_delays, observer or Observer()).start(delivery, decided.append)
    soon(lambda: decided)
    return decided[0]


def test_a_handler_works_in_a_thread_that_is_named_after_the_queue() -> None:
    go = threading.Event()
    names: list[str] = []
    decided: list[Settlement] = []

    def handle(_: Delivery) -> Settlement:
        names.append(threading.current_thread().name)
        assert go.wait(5)
        return Settlement.requeue()

    threads = HandlerThreads(handle, DELAYS, Observer())
    threads.start(Delivery(b"x"), decided.append)
    assert not decided
    go.set()
    soon(lambda: decided)
    assert decided == [Settlement.requeue()]
    assert names == ["training-handler"]


# --- a handler that breaks


def test_the_message_of_a_handler_that_breaks_returns_with_a_count() -> None:
    delivery = Delivery(b"order", "id", headers={MIN_LEVEL: 2, "x-theirs": "stays behind"})
    settlement = broken(ZeroDivisionError("a secret"), delivery, crash_delays=(3.0, 9.0))
    assert settlement == Settlement(
        Action.ACK,
        (
            Publication(
                Queue.TRAINING, b"order", "id", {MIN_LEVEL: 2, PUT_OFFS: 1, CRASHES: 1}, 3.0
            ),
        ),
    )


def test_a_message_without_an_id_stays_without_one() -> None:
    (publication,) = broken(ValueError(), Delivery(b"order")).publish
    assert publication.message_id is None
    assert OWN_COPY not in publication.headers


def test_a_redelivered_message_that_returns_is_not_a_new_order() -> None:
    (publication,) = broken(ValueError(), Delivery(b"order", redelivered=True)).publish
    assert publication.headers[OWN_COPY] is True


@pytest.mark.parametrize(
    ("crashes", "delay"), [(0, 10.0), (1, 60.0), (2, 600.0), (MAX_CRASHES - 1, 600.0)]
)
def test_the_delay_grows_and_the_last_one_repeats(crashes: int, delay: float) -> None:
    delivery = Delivery(b"order", headers={CRASHES: crashes, PUT_OFFS: 8})
    (publication,) = broken(ValueError(), delivery).publish
    assert publication.delay_seconds == delay
    assert publication.headers == {CRASHES: crashes + 1, PUT_OFFS: 9}


@pytest.mark.parametrize("queue", [Queue.ENDINGS, Queue.of_kind("llm"), Queue.of_kind("toy")])
def test_a_message_comes_back_to_the_queue_that_it_came_from(queue: Queue) -> None:
    (publication,) = broken(ValueError(), Delivery(b"ending", "id", queue=queue)).publish
    assert publication.queue == queue


def test_after_five_crashes_the_message_is_a_dead_letter_that_names_the_error_only() -> None:
    assert MAX_CRASHES == 5
    observer = Observer()
    delivery = Delivery(b"order", "id", headers={CRASHES: MAX_CRASHES})
    settlement = broken(ZeroDivisionError("a secret"), delivery, observer=observer)
    assert settlement.action is Action.ACK
    (letter,) = settlement.publish
    assert (letter.queue, letter.body, letter.message_id) == (Queue.DEAD, b"order", "id")
    assert letter.delay_seconds is None
    reason = letter.headers["x-error-message"]
    assert "ZeroDivisionError" in str(reason) and "secret" not in str(reason)
    assert {name: letter.headers[name] for name in letter.headers if name != "x-error-message"} == {
        "x-error-code": "TRAINING_FAILED",
        "x-task-id": "id",
        "x-attempts": MAX_CRASHES + 1,
    }
    metrics = observer.metrics
    assert metrics.messages_dead_lettered.labels("TRAINING_FAILED")._value.get() == 1
    assert metrics.messages_put_off.labels("crash")._value.get() == 0


def test_put_offs_for_other_reasons_do_not_make_the_first_crash_the_last() -> None:
    (publication,) = broken(ValueError(), Delivery(b"order", headers={PUT_OFFS: 150})).publish
    assert publication.queue is Queue.TRAINING


def test_a_crash_is_logged_with_its_stack_and_counted() -> None:
    observer = Observer()
    error = ZeroDivisionError()
    with capture_logs() as lines:
        broken(error, Delivery(b"order", "id", headers={CRASHES: 1}), observer=observer)
        broken(error, Delivery(b"order", "id", headers={CRASHES: MAX_CRASHES}))
    assert lines == [
        {
            "event": "handler_crashed",
            "log_level": "error",
            "queue": "training",
            "task_id": "id",
            "crashes": crashes,
            "again_in": again_in,
            "exc_info": error,
        }
        for crashes, again_in in ((2, 60.0), (MAX_CRASHES + 1, None))
    ]
    assert observer.metrics.messages_put_off.labels("crash")._value.get() == 1


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_a_handler_that_ends_its_thread_loses_nothing_either(error: BaseException) -> None:
    (publication,) = broken(error, Delivery(b"order", "id")).publish
    assert (publication.body, publication.headers[CRASHES]) == (b"order", 1)


def test_a_message_goes_back_to_the_broker_if_it_cannot_even_be_put_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)

    def no_copy(*_: object) -> Settlement:
        raise ValueError

    monkeypatch.setattr(training_consumer, "put_off", no_copy)
    assert broken(ZeroDivisionError(), Delivery(b"order")) == Settlement.requeue()
    soon(lambda: died)


@pytest.mark.parametrize(
    ("body", "message_id", "task_id"),
    [
        (b'{"task_id": "t-1"}', None, "t-1"),
        (b'{"task_id": "t-1"}', "id", "id"),
        (b'{"task_id": "' + b"x" * 128 + b'"}', None, "x" * 128),
        (b'{"task_id": "' + b"x" * 129 + b'"}', None, ""),
        ('{"task_id": "수"}'.encode(), None, ""),
        (b'{"task_id": ""}', None, ""),
        (b'{"task_id": 7}', None, ""),
        (b"{}", None, ""),
        (b"[1]", None, ""),
        (b"7", None, ""),
        (b"\xff", None, ""),
        (b"[" * 100_000, None, ""),
    ],
)
def test_a_dead_letter_has_the_task_id_that_can_be_read(
    body: bytes, message_id: str | None, task_id: str
) -> None:
    delivery = Delivery(body, message_id, headers={CRASHES: MAX_CRASHES})
    (letter,) = broken(ValueError(), delivery).publish
    assert letter.headers["x-task-id"] == task_id
    assert letter.message_id == (task_id or None)
