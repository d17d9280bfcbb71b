"""The jobs of a run. Each is ordered for a destiny; a third of them not to complete."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import random
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jobs.layout import INVALID_PREFIX
from jobs.message import derive_task_id
from jobs.record import derived_task_id
from tests.chaos.fates import SEEDS
from tests.chaos.journal import Journal
from tests.chaos.reference import OVER_API, Destiny
from tests.chaos.timing import LLM, LLM_BASE, MAX_JOB_BYTES, MEDIA, STYLE
from tests.chaos.with_api.clients import Orders, Steering
from tests.chaos.with_api.ground import CONVERSATION
from tests.chaos.world import World

_FIRST_ORDER = datetime.datetime(2026, 1, 20, 10, tzinfo=datetime.UTC)
_IMAGE = b"not looked at by the stand-in"
_WITHOUT_ID = {Destiny.NO_ID, Destiny.ORDERED_TWICE}
_ONE_IN = 3
_REFUSED_CREATIONS = 4
_WITH_LARGE_HEADERS = {Destiny.GIVEN_UP, Destiny.GIVEN_UP_REDRIVEN}
"""Jobs that are put off for sure: their copies must not carry what fills a frame."""
_LARGE_HEADERS = {"x-junk": "j" * 130_950}
_DIRECTLY = (
    *(Destiny.NO_ID, Destiny.ORDERED_TWICE, Destiny.INVALID, Destiny.TOO_LARGE),
    *(Destiny.CANCEL_PUBLISHING, Destiny.GIVEN_UP),
)
"""Jobs whose messages the API does not write: another backend publishes them."""
_ANSWERED = (
    *(Destiny.CANCEL_FILE, Destiny.CANCEL_ANSWER, Destiny.CANCEL_GONE, Destiny.REFUSED),
    *(Destiny.REFUSED_REDRIVEN, Destiny.NOT_FOUND, Destiny.RECORD_DAMAGED),
)
"""Destinies that the suite brings about while the job runs."""
_ONLY_STYLES = (
    *(Destiny.NO_ID, Destiny.ORDERED_TWICE, Destiny.INVALID, Destiny.TOO_LARGE),
    *(Destiny.CANCEL_PUBLISHING, Destiny.GIVEN_UP),
)
"""Destinies that need the message of a style."""
_CONVERSATIONS = "training/conversations.jsonl"
LONG_EPOCHS = 50
"""Of a job that is to be cancelled: it must not complete before anybody can cancel it."""
HUGE = "training/huge.jpg"
HUGE_BYTES = 3_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """One order.

    Attributes:
        task_id: Its id; of an invalid one too; where the message has none, what is derived.
        destiny: The outcome that it is ordered for.
        body: The message.
        again: It is the second order of the same message.
        over_api: It was ordered over the API.
        kind: The kind of job.
        subject: The name of the language model that it makes; empty for a style.
    """

    task_id: str
    style_id: int
    epochs: int
    body: bytes
    destiny: Destiny = Destiny.PLAIN
    again: bool = False
    over_api: bool = False
    kind: str = STYLE
    subject: str = ""

    @property
    def valid(self) -> bool:
        """Whether the message can become a job."""
        return self.destiny is not Destiny.INVALID

    @property
    def record_id(self) -> str:
        """The id of its record."""
        return self.task_id if self.valid else INVALID_PREFIX + _sha256(self.body)


class Jobs:
    """Makes jobs and publishes them.

    Args:
        world: The servers.
        journal: Gets an entry for each.
        epochs: Fewest and most epochs of a job.
        dice: Shuffles the destinies.
        destinies: Those to choose from.
        plain_first: The number of jobs ordered to complete before the first other destiny.
        images: Addresses; None for two images without content.
        one_style: All are of one style.

    Attributes:
        orders: Orders jobs over the API; None without one.
        steering: Leads jobs to their destiny over the API.
    """

    orders: Orders | None = None
    steering: Steering | None = None

    def __init__(
        self,
        world: World,
        journal: Journal,
        *,
        epochs: tuple[int, int],
        dice: random.Random,
        destinies: Collection[Destiny],
        plain_first: int,
        images: list[str] | None = None,
        one_style: bool = False,
    ) -> None:
        self._one_style = one_style
        self.journal = journal
        self.published: list[Job] = []
        self._numbers = 0
        self._world = world
        self._epochs = epochs
        self._dice = dice
        never = (Destiny.PLAIN, *(() if world.api else OVER_API))
        self._destinies = tuple(one for one in destinies if one not in never)
        self._deck: list[Destiny] = []
        self._plain_first = plain_first
        self._images = images or self._upload_blanks()
        self._lock = threading.Lock()

    def publish(self, times: int = 1, destiny: Destiny | None = None) -> Job:
        """Make the next job and publish it, once or more often.

        Args:
            times: How often the same message is published.
            destiny: The outcome that it is ordered for; None for the next of the deck.
        """
        with self._lock:
            self._numbers += 1
            number = self._numbers
            destiny = destiny or self._next_destiny(number)
            job = self._job(number, destiny)
        if self.orders and times == 1 and destiny not in _DIRECTLY:
            return self._order(self.orders, number, job)
        with self._lock:
            self.published.append(job)
        self._world.mood.destinies[job.task_id] = job.destiny
        if job.destiny is Destiny.CANCEL_PUBLISHING:
            self._world.destined.cancel_while_publishing[job.task_id] = job.style_id
        if times > 1:
            self._world.destined.read_late[job.task_id] = times
        headers = _LARGE_HEADERS if job.destiny in _WITH_LARGE_HEADERS else None
        self._world.publish(job.body, times, headers, kind=job.kind)
        self.journal.note("published", task=job.task_id, destiny=job.destiny, times=times)
        return job

    def _order(self, orders: Orders, number: int, job: Job) -> Job:
        """Order a job over the API. One whose order took long is to complete."""
        parameters = json.loads(job.body)["data"]["parameters"]
        row, was_soon = orders.order(job.kind, parameters, f"order-{number:04d}")
        destiny = job.destiny
        if not was_soon and destiny in _ANSWERED:
            destiny = Destiny.PLAIN
        self._world.mood.destinies[row.job_id] = destiny
        job = dataclasses.replace(
            job,
            task_id=row.job_id,
            style_id=row.number or 0,
            subject=row.subject if job.kind == LLM else "",
            body=row.message,
            destiny=destiny,
            over_api=True,
        )
        with self._lock:
            self.published.append(job)
        if self.steering:
            self.steering.lead(row, destiny, number)
        self.journal.note("published", task=job.task_id, destiny=destiny, times=1)
        return job

    def order_again(self, first: Job) -> Job:
        """Order the same message again, after the window: a separate job."""
        second = dataclasses.replace(first, task_id=derived_task_id(first.task_id, 1), again=True)
        with self._lock:
            self.published.append(second)
        # Its record cannot be made at first: the order is put off before it was ever claimed.
        self._world.destined.creation_refused[second.task_id] = _REFUSED_CREATIONS
        self._world.publish(first.body)
        self.journal.note("published", task=second.task_id, destiny=second.destiny, times=1)
        return second

    def undrawn(self) -> list[Destiny]:
        """Destinies that no job has been ordered for yet."""
        drawn = {job.destiny for job in self.published}
        return [destiny for destiny in self._destinies if destiny not in drawn]

    def unended(self) -> int:
        """How many there are whose record has no ending, or that have no record yet."""
        records = self._world.records()
        ended = {name for name, one in records.items() if one["state"] in ("ended", "damaged")}
        ended |= self._world.never_claimed() - set(records)
        return sum(job.record_id not in ended for job in tuple(self.published))

    def unsettled(self) -> set[str]:
        """The record ids of jobs that still have something to do."""
        records = self._world.records()
        settled = {name for name, one in records.items() if is_settled(one)}
        settled |= self._world.never_claimed() - set(records)
        return {job.record_id for job in tuple(self.published)} - settled

    def damaged(self) -> set[str]:
        """The record ids of jobs whose record is to be damaged, or has been."""
        jobs = tuple(self.published)
        return {job.record_id for job in jobs if job.destiny is Destiny.RECORD_DAMAGED}

    def publish_again(self, which: int) -> Job | None:
        """Publish the same message again, like a platform that is not sure of the first.

        Only a message with its publisher's id: without an id it may be a new order.
        """
        records = self._world.records()
        with self._lock:
            named = [
                job
                for job in self.published
                if job.valid and job.destiny not in _WITHOUT_ID
                # The API decides when one of its jobs goes to the workers.
                and (not job.over_api or job.record_id in records)
            ]
            if not named:
                return None
            job = named[which % len(named)]
        self._world.publish(job.body, kind=job.kind)
        self.journal.note("published", task=job.task_id, destiny=job.destiny, times=1)
        return job

    def publish_unclaimed(self, held: Collection[bytes] | None) -> list[str]:
        """Publish the messages of a deleted queue again, except those with a record.

        Args:
            held: The bodies that it held; None if unknown: then it may have been any.

        Returns:
            The ids of the published messages.
        """
        records = self._world.records()
        with self._lock:
            jobs = tuple(self.published)
        lost = [job for job in jobs if job.record_id not in records]
        lost = [job for job in lost if held is None or job.body in held]
        waits = self._world.with_the_api()
        lost = [job for job in lost if job.task_id not in waits]
        if held is None:  # only the queue of styles is deleted with unknown messages
            lost = [job for job in lost if job.kind == STYLE]
        for job in lost:
            self._world.publish(job.body, kind=job.kind)
        return [job.task_id for job in lost]

    def _next_destiny(self, number: int) -> Destiny:
        if not self._destinies or number <= self._plain_first or number % _ONE_IN:
            return Destiny.PLAIN
        if not self._deck:
            self._deck = self._dice.sample(self._destinies, len(self._destinies))
        return self._deck.pop()

    def _job(self, number: int, destiny: Destiny) -> Job:
        fewest, most = self._epochs
        epochs = fewest + number * 7 % (most - fewest + 1)
        # Every fourth is of the style before it: two runs of one style must not mix.
        style_id = 101 if self._one_style else 100 + number - (number % 4 == 0)
        parameters: dict[str, Any] = {}
        images = self._images
        match destiny:
            case Destiny.INVALID:
                style_id, epochs = 50_000 + number, 0
            case (
                Destiny.CANCEL_FILE
                | Destiny.CANCEL_ANSWER
                | Destiny.CANCEL_GONE
                | Destiny.RECORD_DAMAGED
                | Destiny.API_CANCELLED
                | Destiny.API_PAUSED
                | Destiny.API_PAUSED_CANCELLED
            ):
                epochs = LONG_EPOCHS
            case Destiny.CANCEL_PUBLISHING:
                # Of a style that has a model, so that a mixture would be seen.
                styles = [job.style_id for job in self.published if job.kind == STYLE]
                style_id, epochs = (styles or [101])[0], 2
            case Destiny.TOO_LARGE:
                images = [f"s3://{MEDIA}/{HUGE}"] * (MAX_JOB_BYTES // HUGE_BYTES + 2)
        if destiny in SEEDS:
            parameters["seed"] = SEEDS[destiny]
        if LLM in self._world.kinds and number % 2 and destiny not in _ONLY_STYLES:
            return self._language_job(number, destiny, parameters | {"epochs": epochs})
        name = None if destiny in _WITHOUT_ID else f"job-{number:04d}"
        body = self._message(number, name, style_id, parameters | {"epochs": epochs}, images)
        return Job(name or derive_task_id(body), style_id, epochs, body, destiny)

    def _language_job(self, number: int, destiny: Destiny, parameters: dict[str, Any]) -> Job:
        subject, name = f"model-{number}", f"job-{number:04d}"
        data = {
            "subject": subject,
            "base_model": LLM_BASE,
            "training_file": f"s3://{MEDIA}/{_CONVERSATIONS}",
            "parameters": parameters,
        }
        message = {
            "task_id": name,
            "type": "llm_training",
            "data": data,
            "webhook_url": f"{self._world.backend_url}/api/webhooks/training/complete",
            "created_at": (_FIRST_ORDER + datetime.timedelta(seconds=number)).isoformat(),
        }
        epochs = int(parameters["epochs"])
        body = json.dumps(message).encode()
        return Job(name, 0, epochs, body, destiny, kind=LLM, subject=subject)

    def _message(
        self,
        number: int,
        task_id: str | None,
        style_id: int,
        parameters: dict[str, Any],
        images: list[str],
    ) -> bytes:
        data = {
            "style_id": style_id,
            "images": images,
            "captions": ["a harbour"] * len(images),
            "parameters": parameters,
        }
        message = {
            "type": "model_training",
            "data": data,
            "webhook_url": f"{self._world.backend_url}/api/webhooks/training/{style_id}/status",
            "created_at": (_FIRST_ORDER + datetime.timedelta(seconds=number)).isoformat(),
        }
        return json.dumps(({"task_id": task_id} if task_id else {}) | message).encode()

    def _upload_blanks(self) -> list[str]:
        keys = [f"training/{number}.jpg" for number in range(2)]
        for key in keys:
            self._world.s3.put_object(Bucket=MEDIA, Key=key, Body=_IMAGE)
        self._world.s3.put_object(Bucket=MEDIA, Key=_CONVERSATIONS, Body=CONVERSATION)
        self._world.s3.put_object(Bucket=MEDIA, Key=HUGE, Body=b"x" * HUGE_BYTES)
        return [f"s3://{MEDIA}/{key}" for key in keys]


def is_settled(record: dict[str, Any]) -> bool:
    """Whether nothing is left to do for a record, by its own values."""
    if record["state"] == "damaged":
        return True
    return record["delivery"] in ("delivered", "set_aside") and not record.get("owed")


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def journal_of(folder: Path) -> Path:
    """The journal's file."""
    return folder / "journal.jsonl"
