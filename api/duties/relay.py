"""Admits waiting jobs, and publishes the messages of the outbox.

A publication is marked after the broker has
confirmed it; a relay that dies in between publishes again, which the job's record makes harmless.
"""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future, wait
from typing import Any

from sqlalchemy import select, update

from api.duties.leases import hold_lease
from api.gate.keys import new_id
from api.gate.limits import limit_of
from api.gate.once import forget_old
from api.services import Services
from api.store import jobs as store
from api.store.database import DatabaseAway, Writing, now
from api.store.endpoints import forget_settled
from api.store.tables import LeaseRow, OutboxRow
from services.broker.client import Link
from services.broker.connection import BrokerLoop
from services.broker.settlement import Publication, Queue
from services.telemetry.tracing import trace_id_of
from utils.errors import BrokerError, Refusal
from utils.logger import get_logger
from utils.settings.groups import BrokerSettings

log = get_logger(__name__)

RELAY_SECONDS = 0.5
BATCH = 100
CONFIRM_SECONDS = 20.0
RESTART_SECONDS = 5.0
STOP_SECONDS = 5.0


class BrokerPart:
    """A connection that only publishes, kept up by a thread.

    Args:
        settings: The broker.
        queues: The training queues that are declared.

    Attributes:
        consumers: Consumers per queue at the last look.
    """

    def __init__(self, settings: BrokerSettings, queues: tuple[Queue, ...]) -> None:
        self.consumers: dict[str, int] = {}
        self._settings = settings
        self._queues = queues
        self._stop = threading.Event()
        self._problem = "the connection is not up yet"
        self._loop = self._new_loop()
        self._thread = threading.Thread(target=self._run, name="relay-broker", daemon=True)

    def start(self) -> None:
        """Connect, and stay connected."""
        self._thread.start()

    def stop(self) -> None:
        """Close the connection."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_SECONDS)

    def publish(self, publication: Publication) -> Future[None]:
        """Publish; the future is done when the broker has confirmed the message."""
        return self._loop.publish(publication)

    def problem(self) -> str:
        """Why the broker cannot be used; empty if it can."""
        return "" if self._loop.connected else self._problem

    def _new_loop(self) -> BrokerLoop:
        return BrokerLoop(
            lambda: Link(self._settings, training_queues=self._queues),
            (),
            stop=self._stop,
            stop_seconds=STOP_SECONDS,
            events=self,
        )

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._loop.run()
            except BrokerError as error:
                self._problem = str(error)
                log.error("broker_refused", reason=str(error))
            if not self._stop.wait(RESTART_SECONDS):
                self._loop = self._new_loop()

    # The events of the connection; see `services.broker.connection.BrokerEvents`.

    def connected(self, *, again: bool) -> None:
        """The connection is up."""
        log.info("relay_connected", again=again)

    def disconnected(self) -> None:
        """The connection is lost."""
        self._problem = "the connection is lost"

    def took(self, delivery: Any) -> None:
        """Nothing is consumed here."""

    def looked(self, queue: Queue, messages: int, consumers: int) -> None:
        """The broker has counted a queue's consumers."""
        del messages
        self.consumers[str(queue)] = consumers

    def publication_refused(self, refusal: Refusal) -> None:
        """A publication is tried again; the log has it."""

    def publication_stuck(self) -> None:
        """A publication is tried again; the log has it."""


class Relay:
    """Admits waiting jobs and publishes what is due.

    Args:
        services: The services.
        broker: Publishes.
    """

    def __init__(self, services: Services, broker: BrokerPart) -> None:
        self._ran_at = math.nan
        self._services = services
        self._broker = broker
        self._owner = new_id("relay_")
        self._stop = threading.Event()
        self._forgot_at = 0.0
        self._unconfirmed: dict[int, Future[None]] = {}

    def run(self) -> None:
        """Do the duty until `stop`."""
        while not self._stop.is_set():
            self._services.wake.wait(RELAY_SECONDS)
            self._services.wake.clear()
            try:
                if hold_lease(self._services, "relay", self._owner):
                    self.turn()
                    self._ran_at = time.monotonic()
            except DatabaseAway as error:
                log.warning("relay_without_database", reason=str(error))
                self._stop.wait(RELAY_SECONDS)

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()
        self._services.wake.set()

    def age_seconds(self) -> float:
        """Seconds since the last turn; not a number before the first."""
        return time.monotonic() - self._ran_at

    def turn(self) -> None:
        """Admit, publish and tidy up, once."""
        self.admit()
        self.publish()
        if now() - self._forgot_at > 600:
            self._forgot_at = now()
            self._services.database.write(forget_old)
            self._services.database.write(forget_settled)

    def admit(self) -> int:
        """Admit the jobs whose turn it is. Returns their number."""
        with self._services.database.reading() as session:
            if sum(store.with_workers(session).values()) >= self._depth():
                return 0
            if all(each.is_admitted for each in store.waiting(session)):
                return 0
        return self._services.database.write(self._admit)

    def _depth(self) -> int:
        """Jobs that may be with the workers at once: more, if more workers are connected."""
        consumers = sum(
            self._broker.consumers.get(str(each), 0) for each in self._training_queues()
        )
        return max(self._services.settings.broker_depth, consumers + 1)

    def _admit(self, session: Writing) -> int:
        """Under the lock of the lease's row, so two processes never admit at once."""
        session.scalar(select(LeaseRow).where(LeaseRow.name == "relay").with_for_update())
        settings = self._services.settings
        held = store.with_workers(session)
        total, depth = sum(held.values()), self._depth()
        chosen: list[str] = []
        for each in store.waiting(session):
            if each.is_admitted:
                continue
            if total >= depth:
                break
            most = settings.max_concurrent_trainings
            if each.org_id is not None:
                most = limit_of(session, each.org_id, "max_concurrent_trainings", most)
            if held.get(each.org_id, 0) < most:
                held[each.org_id] = held.get(each.org_id, 0) + 1
                total += 1
                chosen.append(each.job_id)
        return store.admit(session, chosen) if chosen else 0

    def _training_queues(self) -> list[Queue]:
        return [Queue.of_kind(name) for name in self._services.kinds.served]

    def publish(self) -> int:
        """Publish the messages that are due, and mark those that the broker confirms."""
        with self._services.database.reading() as session:
            rows = list(
                session.scalars(
                    select(OutboxRow)
                    .where(OutboxRow.published_at.is_(None), OutboxRow.due_at <= now())
                    .order_by(OutboxRow.id)
                    .limit(BATCH)
                )
            )
        if not rows:
            return 0
        for row in rows:
            # A message that waits for its confirm is not put out twice.
            known = self._unconfirmed.get(row.id)
            if known is None or known.cancelled():
                self._unconfirmed[row.id] = self._broker.publish(_publication(row))
        futures = {row.id: self._unconfirmed[row.id] for row in rows}
        wait(futures.values(), CONFIRM_SECONDS)
        confirmed = [id_ for id_, each in futures.items() if each.done() and not each.cancelled()]
        for id_ in confirmed:
            del self._unconfirmed[id_]
        if confirmed:
            marked = (
                update(OutboxRow)
                .where(OutboxRow.id.in_(confirmed))
                .values(published_at=now(), attempts=OutboxRow.attempts + 1)
            )
            self._services.database.write(lambda session: session.execute(marked))
            for row in rows:
                if row.id in confirmed:
                    trace_id = trace_id_of(row.headers, row.job_id)
                    log.info("message_published", task_id=row.job_id, trace_id=trace_id)
        return len(confirmed)


def _publication(row: OutboxRow) -> Publication:
    return Publication(Queue.of_kind(row.kind), row.body, row.job_id, row.headers)
