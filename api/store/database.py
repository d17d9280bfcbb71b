"""Transactions on PostgreSQL and SQLite.

A transaction that writes begins with `BEGIN IMMEDIATE` on SQLite: a plain one is refused as soon as
another commits between its read and its write. On PostgreSQL, events are inserted under a lock that
is held to the end of the transaction, so their ids follow the order of the commits, and a reader
that remembers the last id misses none.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import sqlalchemy
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Dialect, Engine
from sqlalchemy.orm import Session

from api.store.tables import EventRow

POOL_SIZE, OVERFLOW = 10, 10
POOL_SECONDS = 10.0
BUSY_SECONDS = 15.0
_EVENTS_LOCK = 7_264_001
_WRITES = "writes"
_TRIES = 5
PING_AFTER_SECONDS = 1.0
_USED_AT = "used_at"

T = TypeVar("T")


class DatabaseAway(Exception):
    """The database cannot be used now. The same request may be made again."""


class Writing(Session):
    """A transaction that writes. Its events are inserted last, so that their lock is held briefly.

    Rows are locked before the events' lock in every transaction, so no two of them wait for each
    other.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._events: list[EventRow] = []

    def note(self, row: EventRow) -> None:
        """Insert an event at the end of the transaction."""
        self._events.append(row)

    def finish(self) -> None:
        """Insert the events and commit."""
        if self._events:
            self.flush()
            if self.get_bind().dialect.name == "postgresql":
                self.execute(
                    sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _EVENTS_LOCK}
                )
            for row in self._events:
                self.add(row)
                self.flush()
        self.commit()


class Database:
    """Engines, sessions and the repetition of transactions that another one has pushed aside.

    Args:
        url: A SQLAlchemy address.
    """

    def __init__(self, url: str) -> None:
        self.engine = _engine(url)

    @property
    def is_sqlite(self) -> bool:
        """Whether only one process may use the database."""
        return self.engine.dialect.name == "sqlite"

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads.

        Raises:
            DatabaseAway: The database cannot be used now.
        """
        with _translated(), Session(self.engine, expire_on_commit=False) as session:
            yield session

    def write(self, act: Callable[[Writing], T]) -> T:
        """Run an act in a transaction that writes, and commit it.

        The act is repeated if the database has refused it in favour of another transaction, so it
        must do nothing else than use the session.

        Raises:
            DatabaseAway: The database cannot be used now.
        """
        with _translated():
            for left in reversed(range(_TRIES)):
                bind = self.engine.execution_options(**{_WRITES: True})
                with Writing(bind, expire_on_commit=False) as session:
                    try:
                        result = act(session)
                        session.finish()
                        return result
                    except (exc.IntegrityError, exc.OperationalError) as error:
                        session.rollback()
                        if not left or not _is_worth_repeating(error):
                            raise
                time.sleep(random.uniform(0.005, 0.05))
        raise AssertionError("the last turn returns or raises")


def now() -> float:
    """The time in seconds since 1970."""
    return time.time()


def _is_worth_repeating(error: exc.DBAPIError) -> bool:
    """Another transaction was first: a unique row, a deadlock, a lock that was not free in time."""
    if isinstance(error, exc.IntegrityError):
        return True
    code = getattr(error.orig, "sqlstate", None)
    return code in ("40001", "40P01") or "locked" in str(error.orig)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (exc.OperationalError, exc.TimeoutError, exc.InterfaceError) as error:
        raise DatabaseAway(f"The database cannot be used now ({type(error).__name__}).") from error


def _engine(url: str) -> Engine:
    address = sqlalchemy.make_url(url)
    if address.get_backend_name() != "sqlite":
        engine = sqlalchemy.create_engine(
            address,
            pool_size=POOL_SIZE,
            max_overflow=OVERFLOW,
            pool_timeout=POOL_SECONDS,
            connect_args={"connect_timeout": 5},
        )
        event.listen(engine, "checkout", functools.partial(_ping_if_idle, engine.dialect))
        event.listen(engine, "checkin", _note_use)
        return engine
    engine = sqlalchemy.create_engine(
        address,
        pool_size=POOL_SIZE,
        max_overflow=OVERFLOW,
        pool_timeout=POOL_SECONDS,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _ping_if_idle(dialect: Dialect, connection: Any, record: Any, _proxy: object) -> None:
    """Replace a connection that broke while it was idle. A ping each time costs a round trip."""
    idle = time.monotonic() - record.info.get(_USED_AT, -math.inf)
    if idle < PING_AFTER_SECONDS:
        return
    try:
        dialect.do_ping(connection)
    except Exception as error:
        raise exc.DisconnectionError("The connection to the database is lost.") from error


def _note_use(_connection: object, record: Any) -> None:
    record.info[_USED_AT] = time.monotonic()


def _prepare_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver would begin its own transactions
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
