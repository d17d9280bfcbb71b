"""Checkpoints go up beside training: one at a time, the newest first, each registered in the job
record when it is whole."""

from __future__ import annotations

import contextvars
import math
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Self

from consumer.life.curve_uploads import CurveUploads
from jobs.addresses import S3Location
from jobs.checkpoint_name import NOT_OURS, order
from jobs.layout import (
    CHECKPOINT_WEIGHTS,
    Place,
    pause_file_at,
    place_of,
    record_at,
    staging_of,
)
from jobs.message import Job
from jobs.record import Checkpoint, EndingKind, JobRecord
from services.records.job_lease import JobLease
from services.records.record_object import RecordObject
from services.s3.s3_service import S3Service
from utils.errors import (
    CheckpointUnusable,
    ErrorCode,
    LeaseLost,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    TrainingServerError,
)
from utils.events import CheckpointSaved
from utils.logger import get_logger
from utils.manifest import MANIFEST, verify

log = get_logger(__name__)

_RETRY_SECONDS = 2.0
_LONGEST_SETTLE_SECONDS = 600.0
_LONGEST_JOIN_SECONDS = 1.0
_KEPT_IN_FULL = 2


def place(job: Job | JobRecord) -> Place:
    """Where the files of a job are."""
    return place_of(job.kind, job.subject, job.task_id)


class CheckpointUploads:
    """Uploads a job's checkpoints in a thread of its own and prunes the old ones.

    While one goes up, newer ones replace each other in waiting: what counts is that the newest
    arrives.
    """

    def __init__(
        self,
        job: Job,
        lease: JobLease,
        s3: S3Service,
        bucket: str,
        *,
        curves: Path,
        patience: Callable[[], float],
        uploaded: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        """Args:
        job: Whose checkpoints.
        lease: Registers each; once it is lost nothing more is uploaded.
        s3: The storage.
        bucket: The state bucket.
        curves: Where the trainer writes event files, if any are wanted: they go up with each.
        patience: Seconds that may be waited for the last one, asked when it comes to that.
        uploaded: Is told of each that is registered: its name, and how long it took.
        """
        self._uploaded = uploaded
        self._job = job
        self._lease = lease
        self._s3 = s3
        self._bucket = bucket
        self._patience = patience
        self._curves = CurveUploads(curves, s3, bucket, place(job).curves, lease)
        self._prefix = place(job).checkpoints
        self._waiting: CheckpointSaved | None = None
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        context = contextvars.copy_context()  # the thread's log lines carry the job, too
        self._thread = threading.Thread(
            target=context.run, args=(self._loop,), name="checkpoint-uploads", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # After an error, too: a checkpoint that was made before it is what the next attempt needs.
        if self.settle() and math.isinf(self._patience()):  # a shutdown has no time for more
            self._curves.upload()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=_LONGEST_JOIN_SECONDS)

    def submit(self, saved: CheckpointSaved) -> None:
        """Hand over a complete local checkpoint; its folder is removed when it is not needed."""
        with self._changed:
            if self._waiting:
                shutil.rmtree(self._waiting.folder, ignore_errors=True)
            self._waiting = saved
            self._changed.notify_all()

    def settle(self) -> bool:
        """Wait until everything that was handed over is uploaded and registered.

        Returns:
            False when the lease was lost or the patience was over first.
        """
        began = time.monotonic()
        with self._changed:
            while self._waiting is not None or self._busy:
                if self._lease.lost.is_set():
                    return False
                # Asked anew each time: a shutdown may begin while we wait.
                if time.monotonic() - began > min(self._patience(), _LONGEST_SETTLE_SECONDS):
                    log.warning("last_checkpoint_not_uploaded", reason="it took too long")
                    return False
                self._changed.wait(0.1)
        return True

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting is not None)
                if self._closed:
                    return
                saved, self._waiting = self._waiting, None
                self._busy = True
            assert saved is not None
            try:
                self._upload_until_done(saved)
            except TrainingServerError as error:
                # The lease is lost or the worker's disk fails: the run learns of either by itself.
                log.warning("checkpoint_not_uploaded", checkpoint=saved.name, reason=str(error))
            finally:
                shutil.rmtree(saved.folder, ignore_errors=True)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _upload_until_done(self, saved: CheckpointSaved) -> None:
        while not self._closed:
            try:
                self._upload(saved)
                return
            except StorageError as error:
                log.warning("checkpoint_upload_failed", checkpoint=saved.name, reason=str(error))
            with self._changed:
                # A newer one makes this one pointless.
                if self._changed.wait_for(
                    lambda: self._closed or self._waiting is not None, _RETRY_SECONDS
                ):
                    return

    def _upload(self, saved: CheckpointSaved) -> None:
        self._lease.check()
        began = time.monotonic()
        prefix = f"{self._prefix}{saved.name}/"
        self._s3.upload_folder(
            Path(saved.folder),
            self._bucket,
            prefix,
            last=MANIFEST,
            metadata={"task_id": self._job.task_id, "claim": str(self._lease.claim_number)},
            # Another claim may write a checkpoint of the same name by now.
            check=self._lease.check,
        )
        self._lease.register_checkpoint(
            Checkpoint(
                name=saved.name,
                epoch=saved.epoch,
                step=saved.step,
                prefix=prefix,
                claim=self._lease.claim_number,
            )
        )
        seconds = time.monotonic() - began
        self._uploaded(saved.name, seconds)
        log.info(
            "checkpoint_uploaded",
            checkpoint=saved.name,
            epoch=saved.epoch,
            step=saved.step,
            seconds=round(seconds, 3),
        )
        self._curves.upload()
        self._prune()

    def _prune(self) -> None:
        kept = [each.name for each in self._lease.record.checkpoints[-_KEPT_IN_FULL:]]
        prune(self._s3, self._bucket, self._prefix, kept=kept, lease=self._lease)


def prune(
    s3: S3Service, bucket: str, prefix: str, *, kept: Collection[str], lease: JobLease
) -> None:
    """Reduce the checkpoints that were made before all of the kept ones to the LoRA's weights.

    A worker that slept here may find that the job went on without it. So only checkpoints are
    touched whose files are all of this claim or an earlier one, and the lease is renewed directly
    before the deletion. Files beside the checkpoints stay.

    What cannot be removed now is logged and removed another time: a job never fails of it.

    Args:
        s3: The storage.
        bucket: The state bucket.
        prefix: Where the job's checkpoints are.
        kept: Names of the checkpoints that stay in full; without any, nothing is removed.
        lease: The hold on the job.
    """
    oldest_kept = min(map(order, kept), default=NOT_OURS)
    try:
        folders: dict[str, list[str]] = {}
        for found in s3.list_objects(bucket, prefix):
            name = found.key.removeprefix(prefix).partition("/")[0]
            if NOT_OURS < order(name) < oldest_kept and not found.key.endswith(
                "/" + CHECKPOINT_WEIGHTS
            ):
                folders.setdefault(name, []).append(found.key)
        unneeded = [
            key
            for keys in folders.values()
            if max(_claim_of(s3, bucket, key) for key in keys) <= lease.claim_number
            for key in keys
        ]
        if unneeded:
            lease.renew()
            s3.delete(bucket, unneeded)
    except (LeaseLost, StorageError) as error:
        log.warning("checkpoints_not_pruned", reason=str(error))


def _claim_of(s3: S3Service, bucket: str, key: str) -> int:
    """The claim that wrote a file; 0 if it names none, or was deleted meanwhile."""
    try:
        claim = s3.head(S3Location(bucket, key)).metadata.get("claim", "0")
    except ObjectNotFound:
        return 0
    return int(claim) if claim.isdecimal() else 0


def clear_up(s3: S3Service, bucket: str, record: JobRecord) -> bool:
    """After the ending: of a completed job the LoRA's weights of each checkpoint stay, of a failed
    one the newest in full, in case it is sent back, of both the curves; of a cancelled one nothing.

    Returns:
        Whether all is gone that should be; what is not is logged, and left for the sweep.
    """
    ending = record.ending
    assert ending is not None  # an ended record has one
    prefix = place(record).checkpoints
    staging = staging_of(record.task_id)
    try:
        there = sorted(each.key for each in s3.list_objects(bucket, prefix))
        found = [key for key in there if not key.startswith(place(record).curves)]
        if ending.kind is EndingKind.COMPLETE:
            unneeded = [key for key in found if not key.endswith("/" + CHECKPOINT_WEIGHTS)]
        elif ending.code == ErrorCode.CANCELLED:
            unneeded = there
        else:
            newest = _newest(record, prefix, found)
            unneeded = [key for key in found if not key.startswith(newest)]
        unneeded += [each.key for each in s3.list_objects(bucket, staging)]
        if s3.exists(paused := pause_file_at(bucket, record.task_id)):
            unneeded.append(paused.key)
        _delete_of_ended(s3, bucket, record, unneeded)
    except StorageError as error:
        log.warning("not_cleared_up", task_id=record.task_id, reason=str(error))
        return False
    return True


def _newest(record: JobRecord, prefix: str, keys: Collection[str]) -> str:
    """Prefix of the checkpoint from which the job goes on if it is sent back."""
    if record.checkpoint:
        return record.checkpoint.prefix
    names = {key.removeprefix(prefix).partition("/")[0] for key in keys}
    return f"{prefix}{max(names, key=order, default='')}/"


def _delete_of_ended(s3: S3Service, bucket: str, record: JobRecord, keys: Collection[str]) -> None:
    """Delete files of an ended job unless its record has another ending by now, or none.

    The record is read directly before: a person may have sent the job back while this worker slept,
    and then its files are needed again.
    """
    if not keys:
        return
    now = RecordObject(s3, record_at(bucket, record.task_id), JobRecord).read()
    endings = (now.record.ending if now else None), record.ending
    if len({ending.webhook_id if ending else None for ending in endings}) > 1:
        raise PreconditionFailed("The job was sent back, so its files are needed again.")
    s3.delete(bucket, keys)


def delete_all_of(s3: S3Service, bucket: str, record: JobRecord) -> bool:
    """Delete everything that a job has in the state bucket beside its record.

    Returns:
        Whether all is gone; what is not is logged.
    """
    try:
        for prefix in (place(record).checkpoints, staging_of(record.task_id)):
            keys = [each.key for each in s3.list_objects(bucket, prefix)]
            _delete_of_ended(s3, bucket, record, keys)
    except StorageError as error:
        log.warning("not_deleted", task_id=record.task_id, reason=str(error))
        return False
    return True


def newest_usable_checkpoint(
    s3: S3Service, bucket: str, record: JobRecord, folder: Path
) -> str | None:
    """Download the newest registered checkpoint that is whole, going back where one is damaged.

    Args:
        s3: The storage.
        bucket: The state bucket.
        record: Says which checkpoints there are.
        folder: The job's folder.

    Returns:
        Its absolute local folder; None where training starts from the beginning.

    Raises:
        StorageError: S3 cannot be used: better to try again later than to train from the beginning.
    """
    for checkpoint in reversed(record.checkpoints):
        target = folder / "resume" / checkpoint.name
        target.mkdir(parents=True)
        try:
            s3.download_folder(bucket, checkpoint.prefix, target)
            verify(target)
        except (CheckpointUnusable, ObjectNotFound) as error:
            log.warning("checkpoint_damaged", checkpoint=checkpoint.name, reason=str(error))
            continue
        log.info("resuming", checkpoint=checkpoint.name, epoch=checkpoint.epoch)
        return str(target.resolve())
    return None
