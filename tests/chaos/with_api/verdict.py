"""Compares the API with the records, and checks the invariants of its clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg

from tests.chaos.fleet import wait_for
from tests.chaos.jobs import Job
from tests.chaos.reference import Destiny
from tests.chaos.with_api.clients import Follower, events_of
from tests.chaos.with_api.ground import DATABASE, ENDED, ORGANIZATIONS, ApiGround, Row

_STREAM_SECONDS = 20.0
_REDRIVEN = (Destiny.GIVEN_UP_REDRIVEN,)


def status_of(record: dict[str, Any] | None) -> str:
    """The status of a job by its record; empty for one that has not ended."""
    ending = record and record.get("ending")
    if not ending:
        return ""
    if ending["kind"] == "complete":
        return "succeeded"
    return "cancelled" if ending["code"] == "CANCELLED" else "failed"


class ApiVerdict:
    """Compares the API's database with the records.

    Args:
        ground: The API.
        jobs: The jobs of the run.
        records: All records, by task id.
    """

    def __init__(
        self, ground: ApiGround, jobs: list[Job], records: dict[str, dict[str, Any]]
    ) -> None:
        self._ground, self._jobs, self._records = ground, jobs, records
        self._rows = {row.job_id: row for row in ground.rows()}

    def findings(self, followers: tuple[Follower, ...]) -> list[str]:
        """All findings, as sentences."""
        broken = [*self._statuses(), *self._orders(), *self._adopted(), *self._histories()]
        broken += [*self._outbox(), *self._foreign_ids(), *self._secrets()]
        for follower in followers:
            broken += self._followed(follower)
        return broken

    def _statuses(self) -> Iterator[str]:
        damaged = {job.task_id for job in self._jobs if job.destiny is Destiny.RECORD_DAMAGED}
        for job_id, row in self._rows.items():
            record = self._records.get(job_id)
            wanted = status_of(record)
            if job_id in damaged:
                continue  # an operator has to look
            if record is None and row.status == "cancelled":
                continue  # before any worker took it
            if row.status != wanted:
                shown = wanted or "nothing"
                yield f"{job_id}: the API says {row.status}, its record says {shown}"

    def _orders(self) -> Iterator[str]:
        """Each order has made one job."""
        made: dict[str, list[str]] = {}
        for row in self._rows.values():
            if row.order is not None:
                made.setdefault(row.order, []).append(row.job_id)
        for order, ids in made.items():
            if len(ids) > 1:
                yield f"duplicated: the order {order} has made {ids}"
        for job in self._jobs:
            if job.over_api and job.task_id not in self._rows:
                yield f"lost: the API does not know {job.task_id}, which it has made"

    def _adopted(self) -> Iterator[str]:
        """Jobs of which the API has heard are in the database, without an organisation."""
        for job in self._jobs:
            if job.over_api or not job.valid or job.destiny is Destiny.RECORD_DAMAGED:
                continue
            row = self._rows.get(job.task_id)
            if row is None and job.task_id in self._ground.recorder.heard:
                yield f"{job.task_id}: the API has heard of it, and has not adopted it"
            elif row is not None and row.org_id is not None:
                yield f"{job.task_id}: is nobody's, and the API gave it to {row.org_id}"

    def _histories(self) -> Iterator[str]:
        """One ending for each job, and no state after it, unless it was sent back."""
        again = {job.task_id for job in self._jobs if job.destiny in _REDRIVEN}
        for job_id, events in events_of(self._ground).items():
            states = [event["status"] for event in events]
            ended = [index for index, state in enumerate(states) if state in ENDED]
            most = 2 if job_id in again else 1
            if len(ended) > most:
                yield f"duplicated: {job_id} has ended {len(ended)} times: {states}"
            elif ended and ended[-1] != len(states) - 1:
                yield f"{job_id}: has a state after its ending: {states}"

    def _outbox(self) -> Iterator[str]:
        waiting = self._ground.unpublished()
        if waiting:
            yield f"lost: {waiting} messages wait in the outbox"

    def _foreign_ids(self) -> Iterator[str]:
        """No organisation sees a job of another."""
        first, second = ORGANIZATIONS
        for reader, owner in ((first, second), (second, first)):
            headers = {"Authorization": f"Bearer {self._ground.keys[reader]}"}
            with httpx.Client(
                base_url=self._ground.targets()[0], headers=headers, timeout=30
            ) as client:
                for row in [r for r in self._rows.values() if r.org_id in (owner, None)][:10]:
                    for path in (f"/v1/jobs/{row.job_id}", f"/v1/jobs/{row.job_id}/events"):
                        if client.get(path).status_code != 404:
                            yield f"{reader} sees {path} of {row.org_id}"
                shown = client.get("/v1/jobs", params={"limit": 100}).json()["data"]
            yield from (
                f"{reader} sees {each['id']} of {each['organization_id']} in its list"
                for each in shown
                if each["organization_id"] != reader
            )

    def _secrets(self) -> Iterator[str]:
        """No key is in the database or in a log."""
        folder: Path = self._ground.slots[0].log.parent
        dump = self._ground.node.dump(DATABASE)
        for path in (dump, *folder.glob("api-*.log")):
            text = path.read_text(encoding="utf-8", errors="replace")
            if any(key in text for key in self._ground.keys.values()):
                yield f"{path.name} has an API key"
            if "Traceback" in text:
                yield f"{path.name} says Traceback"

    def _followed(self, follower: Follower) -> list[str]:
        """A client that reconnects misses nothing and sees nothing twice."""

        def is_whole() -> bool:
            try:
                return follower.expected() == follower.seen
            except psycopg.Error:
                return False

        if wait_for(is_whole, _STREAM_SECONDS, every=0.5):
            return []
        wanted, seen = follower.expected(), follower.seen
        missed = sorted(set(wanted) - set(seen))
        doubled = sorted({each for each in seen if seen.count(each) > 1})
        return [
            f"the stream of {follower.org} missed {missed[:5]} ({len(missed)}), has {doubled[:5]} "
            f"twice, of {len(wanted)} events"
        ]


def open_rows(ground: ApiGround, jobs: list[Job]) -> list[Row]:
    """The jobs that the API does not consider ended, without those that cannot end."""
    damaged = {job.task_id for job in jobs if job.destiny is Destiny.RECORD_DAMAGED}
    return [r for r in ground.rows() if r.status not in ENDED and r.job_id not in damaged]
