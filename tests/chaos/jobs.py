"""The jobs of a run: what is published, again where it must be, and what became of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tests.chaos.journal import Journal
from tests.chaos.timing import MEDIA
from tests.chaos.world import World

_PICTURE = b"not looked at by the stand-in"


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One published message.

    Attributes:
        task_id: Its id; of an invalid one too.
        valid: Whether it can become a job; one that cannot ends in `failed`.
    """

    task_id: str
    style_id: int
    epochs: int
    body: bytes
    valid: bool = True


class Jobs:
    """Makes jobs and publishes them.

    Args:
        world: Where.
        journal: Told of each.
        epochs: Fewest and most epochs of a job.
        pictures: Addresses; None for two that nobody can see anything on.
    """

    def __init__(
        self,
        world: World,
        journal: Journal,
        *,
        epochs: tuple[int, int],
        pictures: list[str] | None = None,
    ) -> None:
        self.journal = journal
        self.published: list[Job] = []
        self._world = world
        self._epochs = epochs
        self._pictures = pictures or self._upload_blanks()
        self._lock = threading.Lock()

    def publish(self, times: int = 1) -> Job:
        """Make the next job and publish it, once or more often."""
        with self._lock:
            number = len(self.published) + 1
            job = self._invalid(number) if number % 6 == 0 else self._valid(number)
            self.published.append(job)
        self._world.publish(job.body, times)
        self.journal.note("published", task=job.task_id)
        return job

    def unended(self) -> int:
        """How many there are whose record has no ending, or that have no record yet."""
        ended = [one for one in self._world.records().values() if one["state"] == "ended"]
        return len(self.published) - len(ended)

    def publish_again(self, which: int) -> None:
        """The same message once more, as a platform does that is not sure of the first."""
        with self._lock:
            job = self.published[which % len(self.published)]
        self._world.publish(job.body)
        self.journal.note("published", task=job.task_id)

    def publish_unclaimed(self, held: Collection[bytes] | None) -> list[str]:
        """Publish again what a deleted queue held, and nobody has made a record of.

        Args:
            held: The bodies that it held; None where nobody knows: then it may have been any.

        Returns:
            The ids of what was published.
        """
        records = self._world.records()
        with self._lock:
            jobs = tuple(self.published)
        lost = [job for job in jobs if job.valid and job.task_id not in records]
        # An invalid message's record is named after its body.
        told = {record["identity"] for record in records.values()}
        lost += [job for job in jobs if not job.valid and _sha256(job.body) not in told]
        lost = [job for job in lost if held is None or job.body in held]
        for job in lost:
            self._world.publish(job.body)
        return [job.task_id for job in lost]

    def _valid(self, number: int) -> Job:
        fewest, most = self._epochs
        epochs = fewest + number * 7 % (most - fewest + 1)
        # Every fourth is of the style before it: two runs of one style must not mix.
        style_id = 100 + number - (number % 4 == 0)
        message = self._message(f"job-{number:04d}", style_id, {"epochs": epochs})
        return Job(f"job-{number:04d}", style_id, epochs, message)

    def _invalid(self, number: int) -> Job:
        style_id = 50_000 + number
        message = self._message(f"job-{number:04d}", style_id, {"epochs": 0})
        return Job(f"job-{number:04d}", style_id, 0, message, valid=False)

    def _message(self, task_id: str, style_id: int, parameters: dict[str, Any]) -> bytes:
        data = {
            "style_id": style_id,
            "images": self._pictures,
            "captions": ["a harbour"] * len(self._pictures),
            "parameters": parameters,
        }
        message = {
            "task_id": task_id,
            "type": "model_training",
            "data": data,
            "webhook_url": f"{self._world.backend_url}/api/webhooks/training/{style_id}/status",
            "created_at": "2026-01-20T10:00:00.000Z",
        }
        return json.dumps(message).encode()

    def _upload_blanks(self) -> list[str]:
        keys = [f"training/{number}.jpg" for number in range(2)]
        for key in keys:
            self._world.s3.put_object(Bucket=MEDIA, Key=key, Body=_PICTURE)
        return [f"s3://{MEDIA}/{key}" for key in keys]


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def journal_of(folder: Path) -> Path:
    """The journal's file."""
    return folder / "journal.jsonl"
