"""Uploads checkpoints during training: one at a time, the newest first.

A checkpoint is registered in the job record once all of its files are uploaded.
"""

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
from consumer.life.preview_uploads import PreviewUploads
from jobs.addresses import S3Location
from jobs.checkpoint_name import NOT_OURS, order
from jobs.kinds import Kinds
from jobs.layout import (
    Place,
    pause_file_at,
    place_of,
    previews_of,
    record_at,
    staging_of,
)
from jobs.message import Job
from jobs.record import EndingKind, JobRecord, StoredCheckpoint
from services.records.job_lease import JobLease
from services.records.record_object import RecordObject
from services.s3.s3_service import S3Service
from utils.errors import (
    CheckpointUnusable,
    ErrorCode,
    LeaseLost,
    NewerRecord,
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
    """The S3 addresses of a job's files."""
    return place_of(job.kind, job.subject, job.task_id)


class CheckpointUploads:
    """Uploads a job's checkpoints in a separate thread and prunes the old ones.

    During an upload only the newest finished checkpoint waits; it replaces an older one that waits.
    """

    def __init__(
        self,
        job: Job,
        lease: JobLease,
        s3: S3Service,
        bucket: str,
        *,
        kept_file: str,
        curves: Path,
        previews: PreviewUploads | None = None,
        patience: Callable[[], float],
        uploaded: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        """Prepare the uploads of one claim.

        Args:
            job: The job that the checkpoints belong to.
            lease: Registers each checkpoint; once it is lost, nothing more is uploaded.
            s3: The storage.
            bucket: The state bucket.
            kept_file: The file that stays of an old checkpoint (see `JobKind.checkpoint_file`).
            curves: Folder of the trainer's event files, which are uploaded with each checkpoint;
                it may be missing.
            previews: Uploads the samples with each checkpoint.
            patience: Returns the seconds that `settle` may wait for the last upload.
            uploaded: Called for each registered checkpoint, with its name and the seconds it took.
        """
        self._uploaded = uploaded
        self._job = job
        self._lease = lease
        self._s3 = s3
        self._bucket = bucket
        self._kept_file = kept_file
        self._patience = patience
        self._curves = CurveUploads(curves, s3, bucket, place(job).curves, lease)
        self._previews = previews
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
        # After an error, too: the next attempt resumes from the checkpoint that was made before it.
        if self.settle() and math.isinf(self._patience()):  # a shutdown has no time for more
            self._curves.upload()
            self._upload_previews()
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
        """Wait until every checkpoint that was handed over is uploaded and registered.

        Returns:
            False if the lease was lost or the time was over first.
        """
        began = time.monotonic()
        with self._changed:
            while self._waiting is not None or self._busy:
                if self._lease.lost.is_set():
                    return False
                # Read in each round: a shutdown may begin during the wait.
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
                # The lease is lost or the worker's disk fails; the run finds out about either
                # without this thread.
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
                # A newer checkpoint replaces this one.
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
            StoredCheckpoint(
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
        self._upload_previews()
        self._prune()

    def _upload_previews(self) -> None:
        if self._previews is not None:
            self._previews.upload()

    def _prune(self) -> None:
        kept = [each.name for each in self._lease.record.checkpoints[-_KEPT_IN_FULL:]]
        prune(
            self._s3,
            self._bucket,
            self._prefix,
            kept=kept,
            kept_file=self._kept_file,
            lease=self._lease,
        )


def prune(
    s3: S3Service,
    bucket: str,
    prefix: str,
    *,
    kept: Collection[str],
    kept_file: str,
    lease: JobLease,
) -> None:
    """Reduce the checkpoints that were made before all of the kept ones to one file.

    Another worker may have continued the job while this process was suspended. So a checkpoint is
    reduced only if all of its files are from this claim or an earlier one, and the lease is renewed
    directly before the deletion. Files that belong to no checkpoint stay.

    A failure is logged, and the next call tries again; the job does not fail because of it.

    Args:
        s3: The storage.
        bucket: The state bucket.
        prefix: Key prefix of the job's checkpoints.
        kept: Names of the checkpoints that stay in full; without any, nothing is removed.
        kept_file: The file that stays of the others.
        lease: The hold on the job.
    """
    oldest_kept = min(map(order, kept), default=NOT_OURS)
    try:
        folders: dict[str, list[str]] = {}
        for found in s3.list_objects(bucket, prefix):
            name = found.key.removeprefix(prefix).partition("/")[0]
            is_old = NOT_OURS < order(name) < oldest_kept
            if is_old and not found.key.endswith(f"/{kept_file}"):
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


def clear_up(s3: S3Service, bucket: str, record: JobRecord, *, kinds: Kinds) -> bool:
    """Delete the checkpoint files that an ended job no longer needs.

    A completed job keeps one file of each checkpoint (`JobKind.checkpoint_file`), and a failed one
    keeps its newest checkpoint in full, in case it is sent back. Both keep their curves. A
    cancelled job keeps nothing.

    Returns:
        Whether everything was deleted. A failure is logged, and the sweep tries again.
    """
    ending = record.ending
    assert ending is not None  # an ended record has one
    prefix = place(record).checkpoints
    staging = staging_of(record.task_id)
    try:
        there = sorted(each.key for each in s3.list_objects(bucket, prefix))
        found = [key for key in there if not key.startswith(place(record).curves)]
        if ending.kind is EndingKind.COMPLETE:
            kept_file = kinds.of(record.kind).checkpoint_file
            unneeded = [key for key in found if not key.endswith(f"/{kept_file}")]
        elif ending.code == ErrorCode.CANCELLED:
            unneeded = [*there, *_previews(s3, bucket, record)]
        else:
            newest = _newest(record, prefix, found)
            unneeded = [key for key in found if not key.startswith(newest)]
        unneeded += [each.key for each in s3.list_objects(bucket, staging)]
        if s3.exists(paused := pause_file_at(bucket, record.task_id)):
            unneeded.append(paused.key)
        _delete_of_ended(s3, bucket, record, unneeded)
    except (NewerRecord, StorageError) as error:
        log.warning("not_cleared_up", task_id=record.task_id, reason=str(error))
        return False
    return True


def _previews(s3: S3Service, bucket: str, record: JobRecord) -> list[str]:
    return [each.key for each in s3.list_objects(bucket, previews_of(record.task_id))]


def _newest(record: JobRecord, prefix: str, keys: Collection[str]) -> str:
    """Prefix of the checkpoint that the job resumes from if it is sent back."""
    if record.checkpoint:
        return record.checkpoint.prefix
    names = {key.removeprefix(prefix).partition("/")[0] for key in keys}
    return f"{prefix}{max(names, key=order, default='')}/"


def _delete_of_ended(s3: S3Service, bucket: str, record: JobRecord, keys: Collection[str]) -> None:
    """Delete files of an ended job, unless its record has another ending now, or none.

    The record is read directly before the deletion: an operator may have sent the job back while
    this process was suspended, and then its files are needed again.
    """
    if not keys:
        return
    now = RecordObject(s3, record_at(bucket, record.task_id), JobRecord).read()
    endings = (now.record.ending if now else None), record.ending
    if len({ending.webhook_id if ending else None for ending in endings}) > 1:
        raise PreconditionFailed("The job was sent back, so its files are needed again.")
    s3.delete(bucket, keys)


def delete_all_of(s3: S3Service, bucket: str, record: JobRecord) -> bool:
    """Delete everything that a job has in the state bucket, except its record.

    Returns:
        Whether everything was deleted; a failure is logged.
    """
    try:
        of_job = (staging_of(record.task_id), previews_of(record.task_id))
        for prefix in (place(record).checkpoints, *of_job):
            keys = [each.key for each in s3.list_objects(bucket, prefix)]
            _delete_of_ended(s3, bucket, record, keys)
    except StorageError as error:
        log.warning("not_deleted", task_id=record.task_id, reason=str(error))
        return False
    return True


def newest_usable_checkpoint(
    s3: S3Service, bucket: str, record: JobRecord, folder: Path
) -> str | None:
    """Download the newest registered checkpoint that is complete; damaged ones are skipped.

    Args:
        s3: The storage.
        bucket: The state bucket.
        record: Lists the checkpoints.
        folder: The job's folder.

    Returns:
        Its absolute local folder; None if there is none, and training starts from the beginning.

    Raises:
        StorageError: S3 cannot be used. The caller retries later instead of training from the
            beginning.
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
