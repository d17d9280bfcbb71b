"""Tools of the publishing tests: styles, runs, and stops between two requests to S3."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from consumer.life.stop_signal import StopSignal
from consumer.publishing.model_publisher import ModelPublisher, Published
from jobs.addresses import S3Location
from jobs.hold import decode, encode, stamped
from jobs.layout import WEIGHTS, place_of, record_at
from jobs.message import Job
from jobs.record import JobRecord, JobRequest
from jobs.style import HyperParameters, StyleSpec
from services.records.job_lease import JobLease
from services.records.job_records import Claimed, JobRecords
from services.records.turns import PublishingTurn, Turns
from services.s3.s3_service import S3Service

STYLE = 7
PLACE = place_of("style", str(STYLE), "")
CONFIG = "adapter_config.json"  # the same bytes in every run
FILES = (CONFIG, "samples.png", WEIGHTS)
OLD_FILES = (CONFIG, "loss_curve.png", WEIGHTS)
EARLY, LATE = "2025-01-20T10:00:00.000Z", "2025-01-21T10:00:00.000Z"
LEASE = 60.0  # no renewal comes between two requests


class Killed(BaseException):
    """The process ends here; nothing of it runs any more."""


@dataclasses.dataclass
class Stops:
    """Acts at one request, counted from 1.

    Attributes:
        at: The request ahead of which `act` is called; 0 for none.
        forever: Also ahead of each later one.
        only: Counts only requests for which this holds.
    """

    at: int = 0
    act: Callable[[], None] = lambda: None
    forever: bool = False
    only: Callable[[str, str, str], bool] = lambda method, bucket, key: True
    count: int = 0
    dead: bool = False
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def before(self, method: str, bucket: str, key: str) -> None:
        """Called ahead of each request."""
        if self.dead:
            raise Killed
        if not self.only(method, bucket, key):
            return
        with self._lock:
            self.count += 1
            count = self.count
        if self.at and (count == self.at or (self.forever and count > self.at)):
            self.act()

    def kill(self) -> None:
        """The act of a process's end: this request and all later ones never take place."""
        self.dead = True
        raise Killed


def killed_at(
    at: int, only: Callable[[str, str, str], bool] = lambda method, bucket, key: True
) -> Stops:
    """The process ends ahead of the request with this number."""
    stops = Stops(at, only=only)
    stops.act = stops.kill
    return stops


@dataclasses.dataclass(frozen=True)
class World:
    """A style on S3.

    Attributes:
        s3: The test's own client, without faults.
        models: The bucket of models.
        state: The bucket of state.
        scratch: A local folder.
    """

    s3: S3Service
    models: str
    state: str
    scratch: Path

    def publisher(self, s3: S3Service, state: S3Service | None = None) -> ModelPublisher:
        """A worker's publisher; with `state`, model and state bucket are at two endpoints."""
        turns = Turns(state or s3, self.state, owner="worker", lease_seconds=LEASE)
        return ModelPublisher(
            s3,
            state or s3,
            model_bucket=self.models,
            state_bucket=self.state,
            url_scheme="s3",
            turns=turns,
        )

    def claim(self, task_id: str, s3: S3Service | None = None) -> JobLease:
        """A claim of the job, as when an earlier one's lease has run out."""
        where = record_at(self.state, task_id)
        if self.s3.exists(where):
            found = self.s3.read(where)
            record = decode(JobRecord, found.body, where.key)
            record = dataclasses.replace(record, hold=record.hold.dropped())
            self.s3.replace(where, encode(stamped(record)), found.etag)
        job = job_of(task_id)
        claim = JobRecords(s3 or self.s3, self.state, owner="worker", lease_seconds=LEASE).claim(
            JobRequest(task_id, job.kind, job.subject, job.identity, job.understood())
        )
        assert isinstance(claim, Claimed), claim
        return claim.lease

    def let_the_turn_run_out(self) -> None:
        """Time passes, and the turn's holder is judged to be dead. Its note stays."""
        where = S3Location(self.state, f"jobs/style_{STYLE}.turn")
        if self.s3.exists(where):
            found = self.s3.read(where)
            turn = decode(PublishingTurn, found.body, where.key)
            turn = dataclasses.replace(turn, hold=turn.hold.dropped())
            self.s3.replace(where, encode(stamped(turn)), found.etag)

    def has_note(self) -> bool:
        """Whether the turn's note records an unfinished publication."""
        return self._note().get("done") is False

    def waits_for_its_ending(self) -> bool:
        """Whether the turn's note records that all files are written and the job may still fail."""
        return self._note().get("done") is True

    def _note(self) -> dict[str, Any]:
        where = S3Location(self.state, f"jobs/style_{STYLE}.turn")
        if not self.s3.exists(where):
            return {}
        return json.loads(self.s3.read(where).body).get("replacement") or {}

    def publish(
        self,
        task_id: str,
        lease: JobLease,
        s3: S3Service | None = None,
        *,
        ordered_at: str = LATE,
        stop: StopSignal | None = None,
        state: S3Service | None = None,
        files: tuple[str, ...] = FILES,
    ) -> Published:
        """Publish a run whose files name it."""
        folder = self.scratch / task_id
        folder.mkdir(exist_ok=True)
        for name in files:
            (folder / name).write_text(content(name, task_id))
        return self.publisher(s3 or self.s3, state).publish(
            folder,
            files,
            PLACE,
            lease,
            stop or StopSignal(),
            ordered_at=ordered_at,
        )

    def has_model_of(
        self, task_id: str, ordered_at: str = EARLY, files: tuple[str, ...] = OLD_FILES
    ) -> None:
        """A complete model, as an earlier run has left it."""
        for name in files:
            path = self.scratch / "old"
            path.write_text(content(name, task_id))
            mark = {"task_id": task_id, "claim": "1", "ordered-at": ordered_at}
            self.s3.upload_file(
                path, S3Location(self.models, f"models/style_{STYLE}/{name}"), metadata=mark
            )

    def folder(self) -> dict[str, tuple[str, str]]:
        """The style's files: name to content and the job that each names."""
        return self._files(self.models, f"models/style_{STYLE}/")

    def archive(self, task_id: str) -> dict[str, tuple[str, str]]:
        """A run's files in the archive."""
        return self._files(self.state, f"archive/style_{STYLE}/{task_id}/")

    def _files(self, bucket: str, prefix: str) -> dict[str, tuple[str, str]]:
        found = {}
        for info in self.s3.list_objects(bucket, prefix):
            where = S3Location(bucket, info.key)
            body = self.s3.read(where).body.decode()
            found[info.key.removeprefix(prefix)] = (
                body,
                self.s3.head(where).metadata.get("task_id", ""),
            )
        return found


def job_of(task_id: str) -> Job:
    """A job that trains the style."""
    return Job("style", task_id, StyleSpec(STYLE, (), (), (), {}, HyperParameters()))


def content(name: str, task_id: str) -> str:
    """A file's content names file and run, but for the configuration."""
    return "{}" if name == CONFIG else f"{name} of {task_id}"


def whole(task_id: str, files: tuple[str, ...] = FILES) -> dict[str, tuple[str, str]]:
    """The folder of a complete run."""
    return {name: (content(name, task_id), task_id) for name in files}
