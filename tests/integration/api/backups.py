"""Dumps of the API's database, and databases restored from them, of either sort."""

from __future__ import annotations

import secrets
import sqlite3
import subprocess
from pathlib import Path

import sqlalchemy

_POSTGRES = "postgresql+psycopg://"


def dump(url: str) -> str:
    """A whole database as SQL."""
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"))
        try:
            return "\n".join(connection.iterdump())
        finally:
            connection.close()
    return _run("pg_dump", "--dbname", _plain(url))


def restored(sql: str, url: str, folder: Path) -> str:
    """A new database with the content of a dump. Returns its address.

    Args:
        sql: The dump.
        url: The address of the database that was dumped.
        folder: Receives the file of SQLite.
    """
    name = f"restored_{secrets.token_hex(6)}"
    if url.startswith("sqlite"):
        path = folder / f"{name}.db"
        connection = sqlite3.connect(path)
        connection.executescript(sql)
        connection.close()
        return f"sqlite:///{path}"
    server = sqlalchemy.make_url(url).set(database="postgres")
    address = server.render_as_string(hide_password=False)
    _run("psql", "--dbname", _plain(address), "-q", "-c", f'CREATE DATABASE "{name}"')
    new = sqlalchemy.make_url(url).set(database=name).render_as_string(hide_password=False)
    _run("psql", "--dbname", _plain(new), "-q", "-v", "ON_ERROR_STOP=1", "-f", "-", given=sql)
    return new


def _plain(url: str) -> str:
    return url.replace(_POSTGRES, "postgresql://")


def _run(*command: str, given: str | None = None) -> str:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
