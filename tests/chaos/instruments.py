"""Additions to a worker of the suite: it dies at ordered points, and writes a journal.

The product's source does not change: its methods are wrapped in this process.
"""

# A journal of claims needs private parts.
# pylint: disable=protected-access

from __future__ import annotations

import errno
import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from consumer import pipeline
from consumer import worker as desk
from consumer.life import checkpoint_uploads, endings, run_events
from consumer.life.checkpoint_uploads import CheckpointUploads
from consumer.life.sweeper import Sweeper
from consumer.life.work_folder import WorkFolder
from consumer.pipeline import Pipeline
from consumer.trainer.machine import Machine
from consumer.trainer.trainer_process import TrainerProcess
from jobs import hold
from services.broker import outbox
from services.broker.client import Link, Subscription
from services.broker.settlement import Action
from services.records import sweep as record_sweep
from services.records.job_lease import JobLease
from services.records.job_records import Claimed, JobRecords
from services.records.lease import Lease
from services.records.record_object import RecordObject
from services.s3.s3_service import S3Service
from services.webhooks.webhook_service import RetrySchedule, WebhookService
from tests.chaos.crash_points import CrashPoints
from tests.chaos.journal import Journal
from utils.events import CheckpointSaved, Progress, Stage, Started

_OVERRATED_SECONDS = 0.1


def _wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def _shorten(value: Any, *places: tuple[Any, str]) -> None:
    """Set a waiting time by any of its names, which differ between releases.

    Raises:
        AttributeError: It exists nowhere.
    """
    found = [(owner, name) for owner, name in places if hasattr(owner, name)]
    if not found:
        raise AttributeError(f"no waiting time is called {[name for _, name in places]}")
    for owner, name in found:
        setattr(owner, name, value)


def shorten_waits() -> None:
    """Shorten waiting times without a setting from minutes to seconds."""
    _shorten(3.0, (endings, "DELIVER_AT_ONCE_SECONDS"))
    _shorten(0.3, (checkpoint_uploads, "_RETRY_SECONDS"))
    _shorten(3.0, (outbox, "LONGEST_DELAY"))
    # Longer than a trainer process is ever stopped, and shorter than the suite waits for a worker's
    # next claim.
    stops = importlib.import_module(TrainerProcess.__module__)
    if importlib.util.find_spec("consumer.trainer.run_watch"):
        stops = importlib.import_module("consumer.trainer.run_watch")
    _shorten(17.0, (stops, "STOP_PATIENCE_SECONDS"), (stops, "_STOP_PATIENCE_SECONDS"))
    _shorten(5.0, (endings, "_CONFIRM_SECONDS"))
    _wrap(
        Link,
        "__init__",
        lambda init: lambda *given, **how: init(*given, **how | {"answer_seconds": 3.0}),
    )
    _wrap(outbox.Backoff, "__init__", lambda init: lambda self: init(self, 0.3, 3.0))

    def with_short_waits(init: Any) -> Any:
        def wrapped(self: WebhookService, **how: Any) -> None:
            init(self, timeout=2.0, schedule=RetrySchedule((0.3, 1.0), (1.0,)), **how)

        return wrapped

    _wrap(WebhookService, "__init__", with_short_waits)
    # The main S3 service's time-outs fit objects of tens of megabytes; these have a few hundred
    # bytes. The records' service sets its own time-outs.
    _wrap(
        S3Service,
        "__init__",
        lambda init: lambda self, **how: init(
            self, **({"connect_timeout": 2.0, "read_timeout": 3.0} | how)
        ),
    )


def take_any_machine() -> None:
    """The stand-in trains anywhere; the real test imports torch, which takes seconds."""

    def fit(_environment: Any, *, allow_cpu: bool) -> Machine:
        assert allow_cpu
        return Machine(cuda=False, device="cpu")

    setattr(desk, "require_fit", fit)
    setattr(pipeline, "require_fit", fit)


def add_crash_points(points: CrashPoints) -> None:
    """Before and after each write to S3, each webhook, each publication, each acknowledgement."""

    def around(name_of: Callable[..., str]) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            def wrapped(self: Any, *arguments: Any, **how: Any) -> Any:
                act = name_of(*arguments, **how)
                points.reached(f"before {act}")
                result = original(self, *arguments, **how)
                points.reached(f"after {act}")
                return result

            return wrapped

        return make

    _wrap(S3Service, "_put", around(lambda place, *_, **__: f"write {place.key.split('/')[0]}"))
    _wrap(S3Service, "copy", around(lambda *_, **__: "copy"))
    _wrap(S3Service, "delete", _delete_by_folder(points))
    _wrap(S3Service, "list_objects", _list_by_folder(points))
    _wrap(WebhookService, "_exchange", around(lambda _m, _o, kind, *_, **__: f"webhook {kind}"))
    _wrap(Link, "publish", around(lambda *_, **__: "publish"))
    _wrap(Subscription, "answer", around(lambda _tag, action: str(action)))
    assert {str(action) for action in Action} >= {"ack", "requeue"}

    def start(original: Any) -> Any:
        def wrapped(self: TrainerProcess) -> None:
            original(self)
            points.child = self.pid

        return wrapped

    _wrap(TrainerProcess, "start", start)


def _delete_by_folder(points: CrashPoints) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def wrapped(self: Any, bucket: str, keys: Any) -> Any:
            keys = list(keys)
            act = f"delete {keys[0].split('/')[0]}" if keys else "delete nothing"
            points.reached(f"before {act}")
            result = original(self, bucket, keys)
            points.reached(f"after {act}")
            return result

        return wrapped

    return make


def _list_by_folder(points: CrashPoints) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def wrapped(self: Any, bucket: str, prefix: str) -> Any:
            act = f"list {prefix.split('/')[0]}"
            points.reached(f"before {act}")
            found = list(original(self, bucket, prefix))
            points.reached(f"after {act}")
            return iter(found)

        return wrapped

    return make


def withhold_sweeps(path: Path, journal: Journal) -> None:
    """Let the sweep publish only what the suite allows it to.

    A job that needs the sweep without a reason is a finding, and the sweep would hide it. The file
    names the records that may be swept; `*` allows all.
    """

    def may_be_swept(original: Any) -> Any:
        def wrapped(*given: Any) -> bool:
            version = given[-1]
            allowed = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
            named = "*" in allowed or version.record.task_id in allowed
            return named and bool(original(*given))

        return wrapped

    def publish(original: Any) -> Any:
        def wrapped(self: Sweeper, record: Any) -> Any:
            journal.note("swept", task=record.task_id, state=record.state)
            return original(self, record)

        return wrapped

    # In the last release the sweep knows no paused jobs.
    if hasattr(record_sweep.RecordSweep, "_is_to_be_published"):
        _wrap(record_sweep.RecordSweep, "_is_to_be_published", may_be_swept)
    else:
        _wrap(record_sweep, "is_abandoned", may_be_swept)
    _wrap(Sweeper, "_publish_again", publish)


def keep_journal(journal: Journal) -> None:
    """Note deliveries in hand, claims, endings, uploads of checkpoints, and each child."""

    def start(original: Any) -> Any:
        def wrapped(self: TrainerProcess) -> None:
            before = self.pid
            original(self)
            if self.pid != before:
                journal.note("child", pid=self.pid)

        return wrapped

    def claim(original: Any) -> Any:
        def wrapped(self: JobRecords, *arguments: Any, **how: Any) -> Any:
            outcome = original(self, *arguments, **how)
            if isinstance(outcome, Claimed):
                record = outcome.lease.record
                journal.note(
                    "claimed",
                    task=record.task_id,
                    claim=record.claim,
                    attempts=record.attempts,
                    state=record.state,
                )
            return outcome

        return wrapped

    def end(original: Any) -> Any:
        def wrapped(self: JobLease, ending: Any, *more: Any) -> Any:
            kept = original(self, ending, *more)
            journal.note(
                "ended",
                task=self.record.task_id,
                claim=self.claim_number,
                ending=kept.kind,
                code=kept.code,
                webhook_id=kept.webhook_id,
            )
            return kept

        return wrapped

    def upload(original: Any) -> Any:
        def wrapped(self: CheckpointUploads, saved: CheckpointSaved) -> None:
            facts = {"task": saved.task_id, "claim": self._lease.claim_number, "name": saved.name}
            journal.note("upload", **facts)
            try:
                original(self, saved)
            finally:
                journal.note("upload_over", **facts)

        return wrapped

    def handle(original: Any) -> Any:
        def wrapped(self: Pipeline, delivery: Any) -> Any:
            journal.note("handling")
            try:
                return original(self, delivery)
            finally:
                journal.note("handled")

        return wrapped

    def register(original: Any) -> Any:
        def wrapped(self: JobLease, checkpoint: Any) -> Any:
            result = original(self, checkpoint)
            facts = {"task": self.record.task_id, "claim": self.claim_number}
            journal.note("registered", name=checkpoint.name, **facts)
            return result

        return wrapped

    def release(original: Any) -> Any:
        def wrapped(self: JobLease, **how: Any) -> Any:
            result = original(self, **how)
            journal.note(
                "released", task=self.record.task_id, rejected=bool(how.get("rejected", False))
            )
            return result

        return wrapped

    _wrap(Pipeline, "handle", handle)
    _wrap(JobLease, "release", release)
    _wrap(JobLease, "register_checkpoint", register)
    _wrap(TrainerProcess, "start", start)
    _wrap(JobRecords, "claim", claim)
    _wrap(JobRecords, "adopt_ending", claim)
    _wrap(JobLease, "end", end)
    _wrap(CheckpointUploads, "_upload_until_done", upload)


def keep_journal_of_epochs(journal: Journal) -> None:
    """Note the events of the real trainer; the stand-in notes its epochs itself."""
    seen: dict[str, int] = {}

    def dispatch(original: Any) -> Any:
        def wrapped(event: Any, observer: Any, reporter: Any, uploads: CheckpointUploads) -> None:
            facts = {"task": event.task_id, "claim": uploads._lease.claim_number}
            match event:
                case Started():
                    journal.note("run", resumed_epoch=event.facts["epoch"], **facts)
                    seen[event.task_id] = event.facts["epoch"]
                case CheckpointSaved():
                    journal.note(
                        "checkpoint", name=event.name, epoch=event.epoch, step=event.step, **facts
                    )
                case Progress(stage=Stage.TRAINING):
                    reached = event.facts["epoch"]
                    for epoch in range(seen.get(event.task_id, 0) + 1, reached + 1):
                        journal.note("epoch", epoch=epoch, **facts)
                    seen[event.task_id] = reached
                case _:
                    pass
            original(event, observer, reporter, uploads)

        return wrapped

    _wrap(run_events, "dispatch", dispatch)


def watch_leases(journal: Journal) -> None:
    """Note each lease that is believed to have begun later than the write that began it."""
    if not hasattr(hold, "VERSION"):
        return  # the last release does not keep this promise
    first_tries: dict[str, float] = {}

    def write_object(original: Any) -> Any:
        def wrapped(self: RecordObject[Any], record: Any, etag: Any) -> Any:
            first_tries.setdefault(record.hold.nonce, time.monotonic())
            return original(self, record, etag)

        return wrapped

    def write(original: Any) -> Any:
        def wrapped(self: Lease[Any], record: Any, deadline: float) -> Any:
            result = original(self, record, deadline)
            late = self._began_at - first_tries.pop(record.hold.nonce, self._began_at)
            if late > _OVERRATED_SECONDS:
                journal.note("lease_overrated", task=record.task_id, seconds=late)
            return result

        return wrapped

    _wrap(RecordObject, "write", write_object)
    _wrap(Lease, "_write", write)


def fill_disk(marker: Path, journal: Journal) -> None:
    """While the file exists, the worker can make no folder and write no file for a job."""

    def refuse(original: Any) -> Any:
        def wrapped(*arguments: Any, **how: Any) -> Any:
            if marker.exists():
                journal.note("disk_full")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **how)

        return wrapped

    _wrap(WorkFolder, "job", refuse)
