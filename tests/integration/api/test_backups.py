"""A dump of the database, a database restored from one, and migrations that keep data."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import MetaData, Table, func, select

from api.life.restore import reconcile
from api.store.database import Database
from api.store.migrating import check, migrate, version_of, versions
from jobs.record import PAUSED_SECONDS, Ending, EndingKind
from services.records.requests import Requests
from tests.integration.api import backups
from tests.integration.api.test_reliability import (
    complete_body,
    messages,
    record,
    same_place,
    write_record,
)
from tests.integration.api.world import Ground, World, running, until


def url_of(world: World) -> str:
    """The address of the database of an API."""
    url = world.settings.api.api_database_url
    assert url is not None
    return url.get_secret_value()


def test_a_dump_of_the_database_and_the_log_have_no_key(
    ground: Ground, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(ground, log_level="DEBUG") as world:
        # The server may have replaced the handlers and the level of its process.
        monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])
        caplog.set_level(logging.DEBUG)
        with world.client() as client:
            made = client.post("/v1/organization/api_keys", json={"name": "x"}).json()
            listed = client.get("/v1/organization/api_keys").text
        value = made["value"]
        for key in (value, f"{value}x", value[:-1]):
            world.get("/v1/files", key)
        world.get(f"/v1/files/{value}")
        assert world.order(key=value)["status"] == "queued"
        sql = backups.dump(url_of(world))
    assert made["id"] in sql
    assert "request" in caplog.text
    secret = value.removeprefix("sk-")
    for place in (sql, listed, caplog.text.replace(f"/v1/files/{value}", "")):
        assert secret not in place and world.key.removeprefix("sk-") not in place


# One variable for each job.
def test_every_job_of_a_database_of_an_hour_ago_gets_the_state_of_its_record(  # pylint: disable=too-many-locals
    ground: Ground,
) -> None:
    """The lost hour ends, cancels, pauses and resumes jobs of the backup, and adds two."""
    with running(ground, max_concurrent_trainings=50, broker_depth=50) as world:
        place = same_place(world)
        names = ("done", "failed", "runs", "stops", "rests", "returns")
        jobs = {name: world.order(name=name) for name in names}
        worker = world.worker()
        for name in ("done", "rests", "returns"):
            worker.progress(jobs[name], 1_000_001)
        _ask(world, jobs["returns"], "pause")
        worker.progress(jobs["returns"], 1_000_002, stage="paused")
        sql, url = backups.dump(url_of(world)), url_of(world)
        # The lost hour.
        jobs |= {name: world.order(name=name) for name in ("new", "newly done")}
        for name in ("done", "newly done"):
            ending = Ending(EndingKind.COMPLETE, complete_body(jobs[name], 1_000_009))
            write_record(world, record(jobs[name], ending))
        body = {"task_id": jobs["failed"]["id"], "error_code": "GPU_OOM", "sequence": 1_000_005}
        write_record(world, record(jobs["failed"], Ending(EndingKind.FAILED, body, "GPU_OOM")))
        write_record(world, record(jobs["runs"]))
        write_record(world, record(jobs["returns"]))
        _ask(world, jobs["returns"], "resume")
        _ask(world, jobs["stops"], "cancel")
        _ask(world, jobs["rests"], "pause")
        at_rest = record(jobs["rests"]).released(count_attempt=False, quiet_seconds=PAUSED_SECONDS)
        write_record(world, at_rest)
        messages(world)
    old = Ground(
        backups.restored(sql, url, ground.folder), ground.s3, ground.rabbitmq, ground.folder
    )
    with running(old, **place) as world:
        assert reconcile(world.services).restored == 2
        found = {name: world.job(job["id"]) for name, job in jobs.items()}
        stops = found.pop("stops")
        assert stops["cancel_requested"] or stops["status"] == "cancelled"
        assert {name: each["status"] for name, each in found.items()} == {
            "done": "succeeded",
            "failed": "failed",
            "runs": "running",
            "rests": "paused",
            "returns": "running",
            "new": "queued",
            "newly done": "succeeded",
        }
        assert not any(each["cancel_requested"] for each in found.values())
        assert found["newly done"]["fine_tuned_model"]
        again = reconcile(world.services)
        assert (again.restored, again.changed) == (0, 0)


def test_a_paused_job_that_was_cancelled_in_the_lost_hour_gets_its_message(ground: Ground) -> None:
    with running(ground) as world:
        place = same_place(world)
        job = world.order()
        world.worker().progress(job, 1_000_001)
        _ask(world, job, "pause")
        world.worker().progress(job, 1_000_002, stage="paused")
        sql, url = backups.dump(url_of(world)), url_of(world)
        at_rest = record(job).released(count_attempt=False, quiet_seconds=PAUSED_SECONDS)
        write_record(world, at_rest)
        Requests(world.services.state_s3, world.services.buckets.state).cancel(job["id"])
        messages(world)
    old = Ground(
        backups.restored(sql, url, ground.folder), ground.s3, ground.rabbitmq, ground.folder
    )
    with running(old, **place) as world:
        reconcile(world.services)
        world.services.wake.set()
        until(lambda: [each["task_id"] for each in messages(world)] == [job["id"]])
        assert world.job(job["id"])["cancel_requested"]


def _ask(world: World, job: dict[str, Any], what: str) -> None:
    with world.client() as client:
        answer = client.post(f"/v1/fine_tuning/jobs/{job['id']}/{what}")
    assert answer.status_code == 200, answer.text


# ---- migrations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", versions())
def test_the_tables_of_every_version_are_brought_to_the_newest_and_keep_their_rows(
    database_url: str, version: str
) -> None:
    database = Database(database_url)
    migrate(database, version)
    with database.engine.begin() as connection:
        assert version_of(connection) == version
        tables = _tables(connection)
        for table in tables.values():
            connection.execute(table.insert().values(_row(table)))
    assert migrate(database) == versions()[-1]
    check(database)
    with database.engine.connect() as connection:
        for name, table in _tables(connection).items():
            count = connection.scalar(select(func.count()).select_from(table))
            assert count == (1 if name in tables else 0), name
    database.close()


def _tables(connection: sqlalchemy.Connection) -> dict[str, Table]:
    found = MetaData()
    found.reflect(connection)
    return {name: each for name, each in found.tables.items() if name != "alembic_version"}


def _row(table: Table) -> dict[str, Any]:
    """A row with a value for each column that needs one."""
    values: dict[type, Any] = {str: "x", int: 1, float: 1.0, bytes: b"x", dict: {}, object: {}}
    return {
        each.name: values[each.type.python_type]
        for each in table.columns
        if not each.nullable and each.autoincrement is not True
    }
