"""Sends the webhooks of organisations, with retries over two days."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from api.duties.leases import hold_lease
from api.gate.keys import new_id
from api.services import Services
from api.store import endpoints
from api.store.database import DatabaseAway, Writing, now
from api.store.tables import EndpointRow, WebhookRow
from services.webhooks.answers import Reply, retry_after_of
from utils.logger import get_logger

log = get_logger(__name__)

COURIER_SECONDS = 1.0
AT_ONCE, PER_ENDPOINT = 8, 2
DELAYS = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 21_600.0, 43_200.0, 86_400.0)
"""Seconds after the first attempt, after the second, …; then the webhook is given up."""
GONE = 410
_MAX_PROBLEM = 500


class Courier:
    """Sends what is due. One process at a time does it.

    Args:
        services: The services.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._owner = new_id("courier_")
        self._stop = threading.Event()

    def run(self) -> None:
        """Do the duty until `stop`."""
        while not self._stop.wait(COURIER_SECONDS):
            try:
                if hold_lease(self._services, "courier", self._owner):
                    while self.turn() == AT_ONCE and not self._stop.is_set():
                        hold_lease(self._services, "courier", self._owner)
            except DatabaseAway as error:
                log.warning("courier_without_database", reason=str(error))

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    def turn(self) -> int:
        """Send what is due, once. Returns the number of attempts."""
        with self._services.database.reading() as session:
            found = endpoints.due(session, AT_ONCE, PER_ENDPOINT)
        if found:
            with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="courier") as pool:
                replies = list(pool.map(self._send, found))
            for (row, endpoint), reply in zip(found, replies, strict=True):
                self._settle(row, endpoint, reply)
        return len(found)

    def _send(self, item: tuple[WebhookRow, EndpointRow]) -> Reply:
        row, endpoint = item
        keys, versions = self._services.keys, [endpoint.secret_version]
        if (endpoint.old_secret_until or 0.0) > now():
            versions.append(endpoint.secret_version - 1)
        secrets = [keys.webhook_secret(endpoint.id, version) for version in versions]
        return self._services.customers.send(endpoint.url, row.id, row.body, secrets)

    def _settle(self, row: WebhookRow, endpoint: EndpointRow, reply: Reply) -> None:
        is_delivered = reply.status is not None and 200 <= reply.status < 300
        outcome = f"{reply.status // 100}xx" if reply.status else "no_answer"
        self._services.metrics.webhooks_sent.labels(outcome).inc()
        is_over = is_delivered or row.attempts >= len(DELAYS)

        def act(session: Writing) -> None:
            known = session.get(WebhookRow, row.id, with_for_update=True)
            if known is None or known.settled_at is not None:
                return
            known.attempts += 1
            known.status, known.problem = reply.status, reply.problem[:_MAX_PROBLEM] or None
            known.is_delivered = int(is_delivered)
            if is_over:
                known.settled_at = now()
            else:
                wait = max(DELAYS[row.attempts], retry_after_of(reply.headers) or 0.0)
                known.due_at = now() + wait
            if reply.status == GONE:
                session.get_one(EndpointRow, endpoint.id).disabled_at = now()
                session.flush()
                endpoints.drop(session, endpoint.id)

        self._services.database.write(act)
        if reply.status == GONE:
            log.warning("webhook_endpoint_gone", endpoint=endpoint.id, org_id=endpoint.org_id)
        elif is_over and not is_delivered:
            log.warning(
                "webhook_given_up",
                webhook=row.id,
                endpoint=endpoint.id,
                task_id=row.job_id,
                status=reply.status,
                reason=reply.problem[:_MAX_PROBLEM],
            )
