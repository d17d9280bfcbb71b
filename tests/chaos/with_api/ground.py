"""Two API processes on one PostgreSQL, and their ways to it, to the broker and to S3."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psycopg

from config import setting_names
from local.processes import free_ports
from sandbox.postgres_node import PostgresNode
from tests.chaos.fleet import ROOT, Slot, wait_for
from tests.chaos.tcp_proxy import TcpProxy
from tests.chaos.with_api.recorder import Recorder

PROCESSES = 2
CONVERSATION = (
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
)
DATABASE = "api"
ORGANIZATIONS = ("org_one", "org_two")
START_SECONDS = 60.0
SILENT_SECONDS = 4.0
ENDED = ("succeeded", "failed", "cancelled")
_MOST_WITH_WORKERS = 4


class Turn:
    """Any number of clients at once, or one operator and no client."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._clients = 0

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """A client's request."""
        with self._changed:
            self._clients += 1
        try:
            yield
        finally:
            with self._changed:
                self._clients -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No client has a request under way, and none begins one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._clients)
            yield


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A job as the API's database has it."""

    job_id: str
    org_id: str | None
    status: str
    number: int | None
    message: bytes
    order: str | None
    admitted: bool
    subject: str


class ApiGround:
    """The API with all that it stands on; made by `running`.

    Attributes:
        slots: Its processes, each started again when it ends.
        database_way: The proxy to the database.
        recorder: Passes webhooks on.
        keys: An admin key of each organisation.
        turn: Taken by clients for an order, and by the operator who replaces the database.
        files: Ids of uploaded files, by organisation.
    """

    def __init__(
        self,
        node: PostgresNode,
        database_way: TcpProxy,
        recorder: Recorder,
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        self.node, self.database_way, self.recorder = node, database_way, recorder
        self.turn = Turn()
        self.keys: dict[str, str] = {}
        self.files: dict[str, list[str]] = {}
        self.slots: list[Slot] = []
        self._folder = folder
        self._environment = dict(environment)
        self._rows: list[Row] = []

    @classmethod
    @contextlib.contextmanager
    def running(  # pylint: disable=too-many-locals  # one for each part
        cls,
        recorder: Recorder,
        folder: Path,
        environment: Mapping[str, str],
        extra: tuple[str, ...],
    ) -> Iterator[ApiGround]:
        """Start the database and the processes, and wait until they answer."""
        with PostgresNode() as node, TcpProxy("127.0.0.1", node.port) as way:
            node.create_database(DATABASE)
            more = {
                "API_DATABASE_URL": node.url(DATABASE).replace(f":{node.port}/", f":{way.port}/"),
                "API_HOST": "127.0.0.1",
                "API_SILENT_SECONDS": str(SILENT_SECONDS),
                "API_REQUESTS_PER_MINUTE": "100000",
                "API_CREATES_PER_MINUTE": "100000",
                "MAX_CONCURRENT_TRAININGS": str(_MOST_WITH_WORKERS),
                "BROKER_DEPTH": str(_MOST_WITH_WORKERS),
            }
            ground = cls(node, way, recorder, folder, dict(environment) | more)
            for org in ORGANIZATIONS:
                made = ground.command("keys", "create", "--org", org, "--scope", "admin")
                ground.keys[org] = made.strip().splitlines()[-1]
            ports = free_ports(PROCESSES)
            recorder.targets[:] = [f"http://127.0.0.1:{port}" for port in ports]
            for number, port in enumerate(ports):
                settings = ground.settings | {"API_PORT": str(port)}
                ground.slots.append(Slot(number, folder, settings, extra, role="api"))
            for slot in ground.slots:
                slot.start()
            try:
                if not wait_for(ground.is_ready, START_SECONDS, every=0.3):
                    raise RuntimeError(f"the API did not start: {ground.slots[0].log}")
                ground.upload()
                yield ground
            finally:
                for slot in ground.slots:
                    slot.held.clear()
                    slot.signal(signal.SIGCONT)
                for slot in ground.slots:
                    slot.close(0.0)

    @property
    def settings(self) -> dict[str, str]:
        """The environment of the processes, but for their port."""
        return self._environment

    def targets(self) -> list[str]:
        """The addresses of the processes."""
        return list(self.recorder.targets)

    def is_ready(self) -> bool:
        """Whether every process can do its duties."""
        for target in self.targets():
            try:
                if httpx.get(f"{target}/ready", timeout=5).status_code != 200:
                    return False
            except httpx.HTTPError:
                return False
        return True

    def upload(self) -> None:
        """Two images and a file of conversations for each organisation."""
        for org, key in self.keys.items():
            parts = [("file", (f"{number}.png", b"not looked at")) for number in range(2)]
            parts.append(("file", ("conversations.jsonl", CONVERSATION)))
            answer = httpx.post(
                f"{self.targets()[0]}/v1/files",
                files=parts,
                data={"purpose": "fine-tune"},
                headers={"Authorization": f"Bearer {key}"},
                timeout=30,
            )
            answer.raise_for_status()
            self.files[org] = [each["id"] for each in answer.json()["data"]]

    def command(self, *words: str) -> str:
        """The output of `main.py api WORDS`, as an operator runs it.

        Raises:
            RuntimeError: It failed.
        """
        kept = {k: v for k, v in os.environ.items() if k.upper() not in setting_names()}
        done = subprocess.run(
            [sys.executable, "-m", "main", "api", *words],
            cwd=self._folder,  # without a `.env` in it
            env=kept | self._environment | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        if done.returncode:
            raise RuntimeError(f"api {' '.join(words)}: {done.stdout}{done.stderr}")
        return done.stdout

    def query(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows of the database, past the proxy.

        Raises:
            psycopg.Error: It is away.
        """
        address = self.node.url(DATABASE).replace("+psycopg", "")
        with psycopg.connect(address, connect_timeout=5, autocommit=True) as connection:
            return connection.execute(text.encode(), values or None).fetchall()

    def rows(self) -> list[Row]:
        """All jobs of the database; the last known ones while it is away."""
        with contextlib.suppress(psycopg.Error):
            self._rows = [
                Row(*row)
                for row in self.query(
                    "SELECT id, org_id, status, subject_number, message, metadata->>'order',"
                    " admitted_at IS NOT NULL, subject FROM jobs ORDER BY created_at"
                )
            ]
        return self._rows

    def row(self, job_id: str) -> Row | None:
        """One job of the database."""
        return next((row for row in self.rows() if row.job_id == job_id), None)

    def never_claimed(self) -> set[str]:
        """Jobs that were cancelled before a worker took them."""
        return {row.job_id for row in self.rows() if row.status == "cancelled"}

    def unpublished(self) -> int:
        """Messages in the outbox that are due."""
        try:
            found = self.query("SELECT count(*) FROM outbox WHERE published_at IS NULL")
        except psycopg.Error:
            return 1
        return int(found[0][0])

    def restore(self, backup: Path) -> None:
        """Replace the database by a backup, as an operator does: stop, restore, compare, start."""
        for slot in self.slots:
            slot.held.set()
            slot.signal(signal.SIGKILL)
        time.sleep(0.5)
        try:
            self.node.restore(DATABASE, backup)
            self.command("reconcile")
        finally:
            for slot in self.slots:
                slot.held.clear()
        wait_for(self.is_ready, START_SECONDS, every=0.3)
