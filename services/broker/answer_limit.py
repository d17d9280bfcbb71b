"""A time limit on the broker's answers.

pika's `BlockingConnection` waits for an answer (a publisher confirm, the reply to a declaration)
without a limit, in the loop that also reads heartbeats: as long as those come, it waits. The only
thing that ends such a wait is the end of the connection.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from utils.logger import get_logger

log = get_logger(__name__)


class AnswerLimit:
    """Ends a connection that leaves a request without an answer for too long.

    The timer runs in the connection's own loop and so in its owner's thread: pika handles timers
    while it waits, and ends a connection in the same way when heartbeats stay away.

    Args:
        connection: pika's blocking connection.
        seconds: The longest wait for an answer. A broker that is short of memory or disk says so
            and stops reading; the connection's own limit for that counts instead.
        overdue: Makes the error that the waiting call raises, of a sentence.
    """

    def __init__(
        self,
        connection: Any,
        seconds: float,
        overdue: Callable[[str], Exception],
    ) -> None:
        # The blocking connection calls nobody back while it waits. The one below it does.
        self._impl = connection._impl  # pylint: disable=protected-access
        self._seconds = seconds
        self._overdue = overdue
        self._blocked = False
        self._impl.add_on_connection_blocked_callback(lambda *_: self._set_blocked(True))
        self._impl.add_on_connection_unblocked_callback(lambda *_: self._set_blocked(False))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """While the block runs, the limit counts from its beginning."""
        timer: list[Any] = []

        def start() -> None:
            timer[:] = [self._impl.ioloop.call_later(self._seconds, expire)]

        def expire() -> None:
            if self._impl.is_closed:
                return  # it has just ended by itself
            if self._blocked:
                start()
                return
            error = self._overdue(f"no answer within {self._seconds:g} seconds")
            self._impl._terminate_stream(error)  # pylint: disable=protected-access

        if not self._impl.is_closed:
            start()
        try:
            yield
        finally:
            for each in timer:
                self._impl.ioloop.remove_timeout(each)

    def _set_blocked(self, blocked: bool) -> None:
        self._blocked = blocked
        if blocked:
            log.warning("broker_blocks_publishers", why="it is short of memory or disk")
        else:
            log.info("broker_takes_messages_again")
