"""Event streams miss nothing, repeat nothing, and cost no connection while they wait."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import sqlalchemy
from sqlalchemy import select

from api.store import jobs as store
from api.store.database import OVERFLOW, POOL_SIZE, Writing
from api.store.tables import EventRow
from tests.integration.api.world import Ground, World, running, until

STREAM = {"Accept": "text/event-stream"}


class Reader:
    """Reads a stream in a thread.

    Attributes:
        seen: Id, type and data of each event.
        ended: The stream has sent its end.
    """

    def __init__(self, world: World, path: str, last: str | None = None) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self.ended = False
        self._client = world.client(headers_more={"Last-Event-ID": last} if last else {})
        self._path = path
        self._stop = threading.Event()
        # It ends with the next line of the stream, or with the server.
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    @property
    def is_connected(self) -> bool:
        """Whether the stream is open."""
        return self._thread.is_alive()

    def _read(self) -> None:
        with contextlib.suppress(httpx.HTTPError, RuntimeError), self._client as client:
            with client.stream("GET", self._path, headers=STREAM) as answer:
                fields: dict[str, str] = {}
                for line in answer.iter_lines():
                    if self._stop.is_set():
                        return
                    if line:
                        name, _, value = line.partition(": ")
                        fields[name] = value
                        continue
                    if fields.get("event") == "end":
                        self.ended = True
                    elif "id" in fields:
                        self.seen.append((fields["id"], fields["event"], fields["data"]))
                    fields = {}


def all_ids(world: World, job_id: str) -> list[str]:
    """The ids of all events of a job."""
    with world.services.database.reading() as session:
        rows = session.scalars(
            select(EventRow.id).where(EventRow.job_id == job_id).order_by(EventRow.id)
        )
        return [str(each) for each in rows]


def test_a_stream_begins_with_the_past_follows_and_ends_with_the_job(world: World) -> None:
    job, worker = world.order(), world.worker()
    worker.progress(job, 1_000_001, loss=0.5)
    with Reader(world, f"/v1/fine_tuning/jobs/{job['id']}/events") as reader:
        until(lambda: len(reader.seen) >= 3)
        for step in range(2, 6):
            worker.progress(job, 1_000_000 + step, current_epoch=step, loss=0.5 / step)
        worker.complete(job, 1_000_010)
        until(lambda: reader.ended)
    assert [each[0] for each in reader.seen] == all_ids(world, job["id"])
    assert [kind for _, kind, _ in reader.seen].count("metrics") == 5


def test_a_client_that_reconnects_misses_nothing_and_sees_nothing_twice(world: World) -> None:
    job, worker = world.order(), world.worker()
    seen: list[str] = []
    stop = threading.Event()

    def work() -> None:
        for step in range(1, 25):
            worker.progress(job, 1_000_000 + step, current_epoch=step, loss=1.0 / step)
            time.sleep(0.02)
        worker.complete(job, 1_000_100)
        stop.set()

    thread = threading.Thread(target=work)
    thread.start()
    ended = False
    while not ended:
        last = seen[-1] if seen else None
        with Reader(world, f"/v1/jobs/{job['id']}/events", last) as reader:
            until(lambda r=reader: len(r.seen) >= 3 or r.ended)  # type: ignore[misc]
            ended = reader.ended
        seen += [each[0] for each in reader.seen]
    thread.join()
    assert seen == all_ids(world, job["id"])


def test_events_follow_the_order_of_commits(world: World) -> None:
    """A transaction that inserts first and commits last hides no event from any reader."""
    one, other = world.order(), world.order()
    database = world.services.database
    inserted, commit = threading.Event(), threading.Event()

    def slowly() -> None:
        bind = database.engine.execution_options(writes=True)
        with Writing(bind, expire_on_commit=False) as session:
            session.note(store.event(one["id"], "org_one", "slow"))
            original = session.commit

            def wait_and_commit() -> None:
                inserted.set()
                commit.wait(20)
                original()

            setattr(session, "commit", wait_and_commit)
            session.finish()

    def quickly() -> None:
        row = store.event(other["id"], "org_one", "quick")
        database.write(lambda session: session.note(row))

    with Reader(world, "/v1/events") as live:
        until(lambda: world.services.hub.streams == 1)
        threads = [threading.Thread(target=slowly)]
        threads[0].start()
        assert inserted.wait(20)
        threads.append(threading.Thread(target=quickly))
        threads[1].start()
        time.sleep(1.5)  # the hub looks in between
        with database.reading() as session:
            visible = session.scalar(
                select(sqlalchemy.func.max(EventRow.id)).where(EventRow.message != "slow")
            )
        commit.set()
        for thread in threads:
            thread.join(20)
        until(lambda: _said(live) == ["slow", "quick"], seconds=10)
    with Reader(world, "/v1/events", str(visible)) as again:
        until(lambda: sorted(_said(again)) == ["quick", "slow"], seconds=10)


def _said(reader: Reader) -> list[str]:
    texts = ("slow", "quick")
    return [text for _, _, data in reader.seen for text in texts if f'"message": "{text}"' in data]


@pytest.fixture(name="streams")
def _streams(ground: Ground) -> Iterator[tuple[World, list[Reader]]]:
    with running(ground) as world, contextlib.ExitStack() as open_streams:
        job = world.order()
        path = f"/v1/fine_tuning/jobs/{job['id']}/events"
        readers = [
            open_streams.enter_context(Reader(world, path)) for _ in range(POOL_SIZE + OVERFLOW + 5)
        ]
        until(lambda: all(each.seen for each in readers))
        yield world, readers


def test_open_streams_hold_no_connection_of_the_database(
    streams: tuple[World, list[Reader]],
) -> None:
    world, readers = streams
    begun = time.monotonic()
    assert world.get("/v1/fine_tuning/jobs").status_code == 200
    assert time.monotonic() - begun < 5.0  # a pool without a free connection waits for 10 s
    assert world.services.hub.streams == len(readers)
    engine: Any = world.services.database.engine
    assert engine.pool.checkedout() <= 2
    if not world.services.database.is_sqlite:
        with world.services.database.reading() as session:
            idle = session.scalar(
                sqlalchemy.text(
                    "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction' "
                    "AND datname = current_database()"
                )
            )
        assert idle == 0


def test_all_streams_together_cost_one_query_per_tick(streams: tuple[World, list[Reader]]) -> None:
    world, readers = streams
    hub = world.services.hub
    before, begun = hub.queries, time.monotonic()
    time.sleep(3)
    most = (time.monotonic() - begun) / 0.5 + 2
    assert len(readers) >= 25
    assert hub.queries - before <= most


def test_a_server_that_stops_ends_its_streams_and_logs_no_error(
    ground: Ground, caplog: pytest.LogCaptureFixture
) -> None:
    with running(ground) as world:
        job = world.order()
        with Reader(world, f"/v1/jobs/{job['id']}/events") as reader:
            until(lambda: reader.seen)
            world.stop()
            until(lambda: not reader.is_connected, 5)
        assert not reader.ended, "the client comes back with the id of its last event"
    assert not [each for each in caplog.records if each.levelname == "ERROR"]


@pytest.mark.parametrize("last", ["99999999999999999999", "x", "-1", "1.5"])
def test_a_wrong_cursor_is_refused(world: World, last: str) -> None:
    with world.client(headers_more={"Last-Event-ID": last}) as client:
        answer = client.get("/v1/events", headers=STREAM)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "last-event-id"
