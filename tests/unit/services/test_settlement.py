"""Deliveries, publications and settlements: the headers of copies, and the limits of AMQP."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from services.broker.settlement import (
    BODY_BYTES,
    BODY_SHA256,
    CRASHES,
    CUT_BODY_BYTES,
    MAX_ERROR_MESSAGE,
    MAX_HEADER,
    MIN_LEVEL,
    OWN_COPY,
    PUT_OFFS,
    Action,
    Delivery,
    Publication,
    Queue,
    Settlement,
)


def test_a_copy_carries_known_headers_only() -> None:
    known: dict[str, Any] = {
        OWN_COPY: True,
        PUT_OFFS: 3,
        CRASHES: 1,
        MIN_LEVEL: 2,
        "traceparent": "00-1-2-01",
        "tracestate": "a=b",
    }
    theirs = {
        "x-death": [{"count": 9, "queue": "model_training"}],
        "x-first-death-queue": "model_training",
        "x-delivery-count": 5,
        "x-error-code": "GPU_OOM",
        "padding": "y" * 130_000,
    }
    assert Delivery(b"", headers=theirs | known).carried_headers == known


@pytest.mark.parametrize("value", [None, b"bytes", 1.5, ["list"], {"a": 1}])
def test_a_copy_carries_no_header_of_another_kind(value: Any) -> None:
    assert Delivery(b"", headers={"traceparent": value}).carried_headers == {}


@pytest.mark.parametrize(("length", "carried"), [(MAX_HEADER, True), (MAX_HEADER + 1, False)])
def test_a_copy_carries_no_long_header(length: int, carried: bool) -> None:
    headers = Delivery(b"", headers={"tracestate": "x" * length}).carried_headers
    assert bool(headers) is carried


@pytest.mark.parametrize(
    ("value", "count"),
    [(0, 0), (1, 1), (7, 7), (-1, 0), (True, 0), ("3", 0), (None, 0), (2.0, 0)],
)
@pytest.mark.parametrize("header", [PUT_OFFS, CRASHES])
def test_a_count_is_a_positive_whole_number_or_else_zero(
    header: str, value: Any, count: int
) -> None:
    delivery = Delivery(b"", headers={header: value})
    counts = {PUT_OFFS: delivery.put_offs, CRASHES: delivery.crashes}
    assert counts.pop(header) == count
    assert set(counts.values()) == {0}
    assert (Delivery(b"").put_offs, Delivery(b"").crashes) == (0, 0)


def test_amqp_carries_no_message_id_of_more_than_255_bytes() -> None:
    Publication(Queue.DEAD, b"", "수" * 85)
    with pytest.raises(ValueError, match="at most 255 bytes"):
        Publication(Queue.DEAD, b"", "수" * 85 + "x")


@pytest.mark.parametrize("value", [None, b"x", 1.5, []])
def test_a_publications_headers_are_texts_numbers_and_booleans(value: Any) -> None:
    Publication(Queue.DEAD, b"", None, {"x": "text", "y": 1, "z": True})
    with pytest.raises(ValueError, match="header x is a"):
        Publication(Queue.DEAD, b"", None, {"x": value})


def test_a_dead_letter_has_its_reasons() -> None:
    letter = Publication.to_dead(
        b"body", code="GPU_OOM", message="\ud800" + "x" * 3000, task_id=None, attempts=2
    )
    message = letter.headers["x-error-message"]
    assert isinstance(message, str)
    assert len(message) == MAX_ERROR_MESSAGE and message.startswith("?x")
    assert letter == Publication(
        Queue.DEAD,
        b"body",
        None,
        {"x-error-code": "GPU_OOM", "x-error-message": message, "x-task-id": "", "x-attempts": 2},
    )


def test_limits_are_those_of_the_protocol() -> None:
    assert (MAX_ERROR_MESSAGE, MAX_HEADER, CUT_BODY_BYTES) == (2000, 1024, 4096)


def test_by_default_a_delivery_is_a_first_one_and_a_letter_has_no_attempts() -> None:
    assert not Delivery(b"").redelivered
    letter = Publication.to_dead(b"", code="X", message="m", task_id=None)
    assert letter.headers["x-attempts"] == 0
    assert Settlement.dead(b"", code="X", message="m", task_id=None) == Settlement.ack(letter)


def test_settlements_publish_before_they_act() -> None:
    one, two = Publication(Queue.DEAD, b"1"), Publication(Queue.DEAD, b"2")
    assert Settlement.ack(one, two) == Settlement(Action.ACK, (one, two))
    assert Settlement.requeue() == Settlement(Action.REQUEUE, ())
    assert Settlement.dead(b"b", code="X", message="m", task_id="t", attempts=1) == Settlement.ack(
        Publication.to_dead(b"b", code="X", message="m", task_id="t", attempts=1)
    )
    assert Settlement.delayed(
        b"b", seconds=2.0, message_id="t", headers={"n": 1}, queue=Queue.ENDINGS
    ) == Settlement.ack(Publication(Queue.ENDINGS, b"b", "t", {"n": 1}, 2.0))
    assert Settlement.delayed(b"b", seconds=2.0, message_id=None) == Settlement.ack(
        Publication(Queue.TRAINING, b"b", None, {}, 2.0)
    )


# --- shorter forms


def test_a_message_that_is_given_up_is_a_complete_dead_letter_without_its_headers() -> None:
    letter = Publication(Queue.ENDINGS, b"body", "task", {PUT_OFFS: 4}, 5.0).given_up("too large")
    assert (letter.queue, letter.body, letter.message_id) == (Queue.DEAD, b"body", "task")
    assert letter.delay_seconds is None
    assert letter.headers == {
        "x-error-code": "PUBLICATION_REFUSED",
        "x-error-message": "a message for the queue endings was refused: too large",
        "x-task-id": "task",
        "x-attempts": 0,
    }


def test_a_dead_letter_that_is_given_up_keeps_its_own_reasons_and_nothing_else() -> None:
    letter = Publication.to_dead(b"body", code="GPU_OOM", message="m", task_id="t", attempts=2)
    assert letter.given_up("too large") == letter
    more = Publication(Queue.DEAD, b"body", "t", {**letter.headers, "large": "x" * 999}, 5.0)
    assert more.given_up("too large") == letter


def test_a_cut_letter_has_the_size_and_the_hash_of_the_whole_body() -> None:
    body = b"0123456789" * 1000
    letter = Publication.to_dead(body, code="GPU_OOM", message="m", task_id="t")
    cut = letter.cut()
    assert cut.body == body[:CUT_BODY_BYTES]
    assert cut.headers == {
        **letter.headers,
        BODY_BYTES: 10_000,
        BODY_SHA256: hashlib.sha256(body).hexdigest(),
    }
    assert (cut.queue, cut.message_id) == (Queue.DEAD, "t")
