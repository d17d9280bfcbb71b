"""The time limit on the broker's answers, on a connection whose loop is a list of timers."""

# The names are pika's own.
# pylint: disable=missing-class-docstring

from __future__ import annotations

from collections.abc import Callable

import pytest
from structlog.testing import capture_logs

from services.broker.client import AnswerLimit, AnswerOverdue


class Loop:
    def __init__(self) -> None:
        self.timers: dict[int, tuple[float, Callable[[], None]]] = {}
        self.made = 0

    def call_later(self, seconds: float, act: Callable[[], None]) -> int:
        self.made += 1
        self.timers[self.made] = (seconds, act)
        return self.made

    def remove_timeout(self, timer: int) -> None:
        self.timers.pop(timer, None)

    def expire(self) -> None:
        """The time of every timer is over."""
        for timer, (_, act) in list(self.timers.items()):
            del self.timers[timer]
            act()


class Connection:
    def __init__(self) -> None:
        self.ioloop = Loop()
        self.is_closed = False
        self.ended: list[Exception] = []
        self.tell_blocked: list[Callable[..., None]] = []
        self._impl = self

    def add_on_connection_blocked_callback(self, tell: Callable[..., None]) -> None:
        self.tell_blocked.append(tell)

    add_on_connection_unblocked_callback = add_on_connection_blocked_callback

    def _terminate_stream(self, error: Exception) -> None:
        self.ended.append(error)


@pytest.fixture(name="connection")
def _connection() -> Connection:
    return Connection()


@pytest.fixture(name="limit")
def _limit(connection: Connection) -> AnswerLimit:
    return AnswerLimit(connection, 30.0)


def test_a_request_without_an_answer_ends_the_connection(
    connection: Connection, limit: AnswerLimit
) -> None:
    with limit():
        assert [seconds for seconds, _ in connection.ioloop.timers.values()] == [30.0]
        connection.ioloop.expire()
    (error,) = connection.ended
    assert isinstance(error, AnswerOverdue) and "no answer within 30 seconds" in repr(error)
    assert not connection.ioloop.timers


def test_a_request_that_is_answered_leaves_no_timer(
    connection: Connection, limit: AnswerLimit
) -> None:
    with limit():
        pass
    with pytest.raises(KeyError), limit():
        raise KeyError
    connection.ioloop.expire()
    assert not connection.ended and not connection.ioloop.timers


def test_a_broker_that_stopped_reading_is_waited_for_and_reported(
    connection: Connection, limit: AnswerLimit
) -> None:
    blocked, unblocked = connection.tell_blocked
    with capture_logs() as lines, limit():
        blocked(connection, "frame")
        connection.ioloop.expire()
        assert not connection.ended and len(connection.ioloop.timers) == 1
        unblocked(connection, "frame")
        connection.ioloop.expire()
        assert len(connection.ended) == 1
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("broker_blocks_publishers", "warning"),
        ("broker_takes_messages_again", "info"),
    ]


def test_a_timer_that_was_set_again_is_removed_with_the_request(
    connection: Connection, limit: AnswerLimit
) -> None:
    with limit():
        connection.tell_blocked[0](connection, "frame")
        connection.ioloop.expire()
    assert not connection.ioloop.timers


def test_a_connection_that_has_ended_by_itself_is_not_touched(
    connection: Connection, limit: AnswerLimit
) -> None:
    with limit():
        connection.is_closed = True
        connection.ioloop.expire()
    with limit():
        assert not connection.ioloop.timers
    assert not connection.ended
