"""Repairs what was missed: endings of silent jobs, and orders that could not be kept on S3."""

from __future__ import annotations

import threading

from sqlalchemy import select, update

from api.duties.leases import hold_lease
from api.gate.keys import new_id
from api.life import erasure, ledger, news
from api.services import Services
from api.store import jobs as store
from api.store.database import DatabaseAway, now
from api.store.tables import JobRow
from utils.errors import StorageError
from utils.logger import get_logger

log = get_logger(__name__)

BATCH = 100


def order_keeper(services: Services) -> int:
    """Write the orders to S3 that could not be written when their jobs were made."""
    with services.database.reading() as session:
        rows = list(
            session.scalars(
                select(JobRow)
                .where(JobRow.order_kept_at.is_(None), JobRow.deleted_at.is_(None))
                .limit(BATCH)
            )
        )
    kept = [row.id for row in rows if ledger.keep_order(services, row)]
    if kept:
        marked = update(JobRow).where(JobRow.id.in_(kept)).values(order_kept_at=now())
        services.database.write(lambda session: session.execute(marked))
    return len(kept)


class Reconciler:
    """Reads the records of jobs that have been silent.

    Args:
        services: The services.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._owner = new_id("reconciler_")
        self._stop = threading.Event()

    def run(self) -> None:
        """Do the duty until `stop`."""
        pause = min(30.0, self._services.settings.api_silent_seconds / 2)
        while not self._stop.wait(pause):
            try:
                if hold_lease(self._services, "reconciler", self._owner):
                    order_keeper(self._services)
                    self.turn()
                    erasure.erase(self._services)
            except (DatabaseAway, StorageError) as error:
                log.warning("reconciler_waits", reason=str(error))

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    def turn(self) -> int:
        """Look at the jobs that have been silent, once. Returns the number of endings found."""
        before = now() - self._services.settings.api_silent_seconds
        with self._services.database.reading() as session:
            rows = store.silent(session, before, BATCH)
        return sum(self._look(row) for row in rows)

    def _look(self, row: JobRow) -> bool:
        record = ledger.record_of(self._services, row.id)
        if record is None:
            # Its message waits in a queue.
            heard = update(JobRow).where(JobRow.id == row.id).values(heard_at=now())
            self._services.database.write(lambda session: session.execute(heard))
            return False
        found = news.follow_record(self._services, row.id, record)
        if found:
            log.warning("job_reconciled", task_id=row.id)
        return found
