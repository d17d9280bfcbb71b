"""New events for open streams: one query per tick for all of them together.

A stream holds no database connection, no thread and no transaction while it waits. It subscribes
before it reads the past, so it misses nothing; the hub's cursor follows the order of commits.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator

from sqlalchemy import func, select

from api.store.database import Database, DatabaseAway
from api.store.tables import EventRow
from utils.logger import get_logger

log = get_logger(__name__)

TICK_SECONDS = 0.5
BATCH = 1000
QUEUE_EVENTS = 2000
"""A stream whose client reads slower than this many events is ended, and reconnects."""


class Subscriber:
    """One open stream.

    Args:
        wants: Whether an event is for it.
        loop: The event loop of the stream.
    """

    def __init__(self, wants: Callable[[EventRow], bool], loop: asyncio.AbstractEventLoop) -> None:
        self.wants = wants
        self._loop = loop
        self._queue: asyncio.Queue[EventRow | None] = asyncio.Queue()

    async def next(self, seconds: float) -> EventRow | None:
        """The next event; None after this many seconds without one.

        Raises:
            EOFError: The hub has stopped, or the client is too slow.
        """
        try:
            row = await asyncio.wait_for(self._queue.get(), seconds)
        except TimeoutError:
            return None
        if row is None:
            raise EOFError
        return row

    def put(self, row: EventRow | None) -> None:
        """Hand an event over, from any thread; None ends the stream."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._put, row)

    def _put(self, row: EventRow | None) -> None:
        self._queue.put_nowait(row if self._queue.qsize() < QUEUE_EVENTS else None)


class Hub:
    """Reads new events and hands them to the streams that want them.

    Args:
        database: The database.

    Attributes:
        queries: Queries so far.
    """

    def __init__(self, database: Database, tick_seconds: float = TICK_SECONDS) -> None:
        self.queries = 0
        self._database = database
        self._tick_seconds = tick_seconds
        self._subscribers: set[Subscriber] = set()
        self._lock = threading.Lock()
        self._cursor: int | None = None
        self._stop = threading.Event()

    @property
    def streams(self) -> int:
        """Number of open streams."""
        return len(self._subscribers)

    @contextlib.contextmanager
    def subscribed(self, wants: Callable[[EventRow], bool]) -> Iterator[Subscriber]:
        """A subscription for the time of the block."""
        subscriber = Subscriber(wants, asyncio.get_running_loop())
        with self._lock:
            self._subscribers.add(subscriber)
        try:
            yield subscriber
        finally:
            with self._lock:
                self._subscribers.discard(subscriber)

    def run(self) -> None:
        """Look for events until `stop`."""
        while not self._stop.wait(self._tick_seconds):
            self._try_to_tick()
        self._end_streams()

    def begin(self) -> None:
        """Find the newest event. A stream that opens before that has to reconnect."""
        self._try_to_tick()

    def stop(self) -> None:
        """End `run` and all streams."""
        self._stop.set()

    def _try_to_tick(self) -> None:
        try:
            self.tick()
        except DatabaseAway as error:
            log.warning("hub_without_database", reason=str(error))

    def tick(self) -> None:
        """Read the events that are new, once.

        The cursor moves also without a stream, so a stream that subscribes and then reads the past
        finds every event at or below the cursor in the table, and gets every later one.
        """
        self.queries += 1
        with self._database.reading() as session:
            if self._cursor is None:
                self._cursor = session.scalar(select(func.max(EventRow.id))) or 0
                self._end_streams()  # they may have read the past before this
                return
            rows = list(
                session.scalars(
                    select(EventRow)
                    .where(EventRow.id > self._cursor)
                    .order_by(EventRow.id)
                    .limit(BATCH)
                )
            )
        with self._lock:
            subscribers = tuple(self._subscribers)
        for row in rows:
            self._cursor = row.id
            for subscriber in subscribers:
                if subscriber.wants(row):
                    subscriber.put(row)

    def _end_streams(self) -> None:
        with self._lock:
            for subscriber in self._subscribers:
                subscriber.put(None)
