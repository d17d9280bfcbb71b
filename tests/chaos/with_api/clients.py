"""Clients of the API: they order, steer and follow jobs, and repeat what got no answer."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import httpx
import psycopg

from tests.chaos.reference import Destiny
from tests.chaos.timing import LLM_BASE, STYLE
from tests.chaos.with_api.ground import ENDED, ORGANIZATIONS, ApiGround, Row

ORDER_SECONDS = 90.0
SLOW_SECONDS = 2.0
"""An order that took longer may have begun before its destiny was known: it is to complete."""
_PAUSE_SECONDS = 0.3
_ANSWER_SECONDS = 8.0


class Orders:
    """Orders jobs with idempotency keys.

    Args:
        ground: The API.
        seed: Draws the orders that are sent twice at once, or again later.

    Attributes:
        broken: Findings, as sentences.
        sent: Orders so far.
    """

    def __init__(self, ground: ApiGround, seed: int) -> None:
        self.broken: list[str] = []
        self.sent = 0
        self.twice = 0
        self._ground = ground
        self._dice = random.Random(seed)
        self._turns = itertools.count()
        self._repeatable: list[tuple[str, dict[str, Any], str, str]] = []
        self._pool = ThreadPoolExecutor(2)

    def order(self, kind: str, parameters: dict[str, Any], name: str) -> tuple[Row, bool]:
        """Order a job, until the order is answered.

        Args:
            kind: The kind of job.
            parameters: The parameters of the kind.
            name: Marks the order, and is its idempotency key.

        Returns:
            The job, and whether the first request was answered soon.
        """
        org = ORGANIZATIONS[self.sent % len(ORGANIZATIONS)]
        self.sent += 1
        files = self._ground.files[org]
        body = {
            "kind": kind,
            "model": "sd15" if kind == STYLE else LLM_BASE,
            "training_files": files[:2] if kind == STYLE else files[2:],
            "parameters": parameters,
            "metadata": {"order": name},
        }
        began = time.monotonic()
        at_once = 2 if self._dice.random() < 0.3 else 1
        self.twice += at_once - 1
        with self._ground.turn.shared():
            sent = [(org, body, name)] * at_once
            ids = set(self._pool.map(lambda each: self._until_answered(*each), sent))
        if len(ids) > 1:
            self.broken.append(f"{name}: two requests with one key made {sorted(ids)}")
        job_id = ids.pop()
        was_soon = time.monotonic() - began < SLOW_SECONDS
        self._repeatable.append((org, body, name, job_id))
        return self._row(job_id), was_soon

    def repeat(self) -> int:
        """Send an earlier order again. Returns the number of requests."""
        with self._ground.turn.shared():
            if not self._repeatable:
                return 0
            org, body, name, known = self._dice.choice(self._repeatable)
            again = self._until_answered(org, body, name)
        if again != known:
            self.broken.append(f"{name}: a repeated order made {again}, the first was {known}")
        return 1

    def forget(self) -> None:
        """The database has lost its idempotency keys: no order is repeated any more."""
        self._repeatable.clear()

    def _until_answered(self, org: str, body: dict[str, Any], name: str) -> str:
        deadline = time.monotonic() + ORDER_SECONDS
        headers = {"Authorization": f"Bearer {self._ground.keys[org]}", "Idempotency-Key": name}
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = httpx.post(
                    f"{_target(self._ground, next(self._turns))}/v1/fine_tuning/jobs",
                    json=body,
                    headers=headers,
                    timeout=_ANSWER_SECONDS,
                )
                if answer.status_code == 200:
                    return str(answer.json()["id"])
                if answer.status_code < 500 and answer.status_code not in (409, 429):
                    raise AssertionError(f"{name}: {answer.status_code} {answer.text}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name}: the order was not answered")
            time.sleep(_PAUSE_SECONDS)

    def _row(self, job_id: str) -> Row:
        deadline = time.monotonic() + ORDER_SECONDS
        while time.monotonic() < deadline:
            if row := self._ground.row(job_id):
                return row
            time.sleep(_PAUSE_SECONDS)
        raise AssertionError(f"{job_id}: the API has answered the order, and has no such job")


class Steering:
    """Pauses, resumes and cancels jobs that are destined for it; a context manager.

    Attributes:
        errors: Errors of its thread.
        acts: Acts that the API has accepted.
    """

    def __init__(self, ground: ApiGround) -> None:
        self.errors: list[BaseException] = []
        self.acts = 0
        self._ground = ground
        self._turns = itertools.count()
        self._steered: dict[str, Iterator[None]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="steering", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def lead(self, row: Row, destiny: Destiny, number: int) -> None:
        """Lead a job to its destiny, if that is reached over the API."""
        paths: dict[Destiny, Callable[[Row, int], Iterator[None]]] = {
            Destiny.API_CANCELLED: self._cancel,
            Destiny.API_PAUSED: self._pause_and_resume,
            Destiny.API_PAUSED_CANCELLED: self._pause_and_cancel,
        }
        if destiny in paths:
            self._steered[row.job_id] = paths[destiny](row, number)

    def _loop(self) -> None:
        while not self._stopping.wait(_PAUSE_SECONDS):
            for job_id, path in tuple(self._steered.items()):
                try:
                    next(path)
                except StopIteration:
                    del self._steered[job_id]
                except BaseException as error:  # pylint: disable=broad-exception-caught
                    del self._steered[job_id]
                    self.errors.append(error)  # the suite raises it

    def _cancel(self, row: Row, number: int) -> Iterator[None]:
        if number % 2:
            yield from self._until(row, "running")
        yield from self._act(row, "cancel")

    def _pause_and_resume(self, row: Row, number: int) -> Iterator[None]:
        if number % 4:
            yield from self._until(row, "running")
        yield from self._act(row, "pause")
        if number % 3:
            yield from self._until(row, "paused")
        yield from self._act(row, "resume")
        # The database may have been restored from a time before that.
        yield from self._until(row, "running", "queued")

    def _pause_and_cancel(self, row: Row, _number: int) -> Iterator[None]:
        yield from self._until(row, "running")
        yield from self._act(row, "pause")
        yield from self._until(row, "paused")
        yield from self._act(row, "cancel")

    def _until(self, row: Row, *statuses: str) -> Iterator[None]:
        while (now := self._ground.row(row.job_id)) is None or (
            now.status not in statuses and now.status not in ENDED
        ):
            yield

    def _act(self, row: Row, act: str) -> Iterator[None]:
        """Ask until it is done, or cannot be done any more."""
        while True:
            with self._ground.turn.shared(), contextlib.suppress(httpx.HTTPError):
                answer = httpx.post(
                    f"{_target(self._ground, next(self._turns))}/v1/jobs/{row.job_id}/{act}",
                    headers={"Authorization": f"Bearer {self._ground.keys[row.org_id or '']}"},
                    timeout=_ANSWER_SECONDS,
                )
                if answer.status_code == 200:
                    self.acts += 1
                    return
                if answer.status_code == 409:
                    return
                if answer.status_code < 500 and answer.status_code != 429:
                    raise AssertionError(f"{act} {row.job_id}: {answer.text}")
            yield


class Follower:
    """Follows all events of an organisation, and reconnects; a context manager.

    Attributes:
        seen: Ids of events, as they came.
        begin: The newest event before the first one.
        reconnects: How often the stream was opened again.
    """

    def __init__(self, ground: ApiGround, org: str) -> None:
        self.seen: list[int] = []
        self.begin = 0
        self.reconnects = -1
        self.org = org
        self._ground = ground
        self._stopping = threading.Event()
        self._restart = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=f"follower-{org}", daemon=True)

    def __enter__(self) -> Self:
        self.begin = max(1, self._newest())  # 0 stands for all that is new
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()

    def begin_again(self) -> None:
        """The database is another one: its ids cannot be compared with those that were seen."""
        self._restart.set()

    def expected(self) -> list[int]:
        """The ids of the events in the table."""
        found = self._ground.query(
            "SELECT id FROM job_events WHERE org_id = %s AND id > %s ORDER BY id",
            *(self.org, self.begin),
        )
        return [int(row[0]) for row in found]

    def _newest(self) -> int:
        return int(self._ground.query("SELECT coalesce(max(id), 0) FROM job_events")[0][0])

    def _loop(self) -> None:
        for turn in itertools.count():
            if self._stopping.wait(_PAUSE_SECONDS):
                return
            self.reconnects += 1
            with contextlib.suppress(httpx.HTTPError, psycopg.Error):
                self._read(_target(self._ground, turn))

    def _read(self, target: str) -> None:
        if self._restart.is_set():
            with self._ground.turn.alone():
                self.begin = max(1, self._newest())
                self.seen.clear()
                self._restart.clear()
        headers = {
            "Authorization": f"Bearer {self._ground.keys[self.org]}",
            "Accept": "text/event-stream",
            "Last-Event-ID": str(self.seen[-1] if self.seen else self.begin),
        }
        with (
            httpx.Client(timeout=httpx.Timeout(5.0, read=20.0)) as client,
            client.stream("GET", f"{target}/v1/events", headers=headers) as answer,
        ):
            if answer.status_code != 200:
                return
            for line in answer.iter_lines():
                if self._stopping.is_set() or self._restart.is_set():
                    return
                if line.startswith("id: "):
                    self.seen.append(int(line.removeprefix("id: ")))


def _target(ground: ApiGround, turn: int) -> str:
    targets = ground.targets()
    return targets[turn % len(targets)]


def events_of(ground: ApiGround) -> dict[str, list[dict[str, Any]]]:
    """The state events of each job, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    rows = ground.query("SELECT job_id, data FROM job_events WHERE type = 'state' ORDER BY id")
    for job_id, data in rows:
        found.setdefault(job_id, []).append(data if isinstance(data, dict) else json.loads(data))
    return found
