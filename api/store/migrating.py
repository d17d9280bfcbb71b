"""Brings the database's tables to this version, one process at a time.

Two servers that start together would both create the first table. On PostgreSQL a lock of the
session keeps the second waiting, on SQLite a lock file next to the database.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from api.store.database import Database

_MIGRATIONS_LOCK = 7_264_000


def migrate(database: Database, to: str = "head") -> str:
    """Run the migrations that are missing.

    Args:
        database: The database.
        to: The version of the tables; the newest by default.

    Returns:
        The version of the tables.
    """
    with _alone(database) as connection:
        configuration = _configuration()
        configuration.attributes["connection"] = connection
        command.upgrade(configuration, to)
        connection.commit()
        return version_of(connection) or ""


def versions() -> list[str]:
    """All versions of the tables, the first one first."""
    scripts = ScriptDirectory.from_config(_configuration()).walk_revisions()
    return [each.revision for each in scripts][::-1]


def state_of(database: Database) -> tuple[str | None, str | None]:
    """The version of the tables, None for an empty database, and the version of this program.

    Raises:
        DatabaseAway: The database cannot be used.
    """
    head = ScriptDirectory.from_config(_configuration()).get_current_head()
    with database.reading() as session:
        return version_of(session.connection()), head


def check(database: Database) -> None:
    """Compare the tables of the database with those of the program.

    Raises:
        alembic.util.CommandError: They differ.
    """
    configuration = _configuration()
    with database.engine.connect() as connection:
        configuration.attributes["connection"] = connection
        command.check(configuration)


def version_of(connection: Connection) -> str | None:
    """The version of the tables of a database; None for an empty one."""
    return MigrationContext.configure(connection).get_current_revision()


def _configuration() -> Config:
    configuration = Config()
    folder = Path(__file__).parent / "migrations"
    configuration.set_main_option("script_location", str(folder).replace("%", "%%"))
    configuration.set_main_option("path_separator", "os")
    return configuration


@contextlib.contextmanager
def _alone(database: Database) -> Iterator[Connection]:
    with contextlib.ExitStack() as held:
        if database.is_sqlite:
            path = database.engine.url.database
            if path and path != ":memory:":
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(Path(f"{path}.lock").open("w", encoding="ascii"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield held.enter_context(database.engine.connect())
            return
        guard = held.enter_context(database.engine.connect())
        key = {"key": _MIGRATIONS_LOCK}
        guard.execute(sqlalchemy.text("SELECT pg_advisory_lock(:key)"), key)
        guard.commit()
        try:
            yield held.enter_context(database.engine.connect())
        finally:
            guard.execute(sqlalchemy.text("SELECT pg_advisory_unlock(:key)"), key)
            guard.commit()
