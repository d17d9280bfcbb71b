"""Puts a finished model in its place: staged first, then file by file, the weights last.

Jobs that publish into one folder take turns (`services.records.turns`). The steps:

1. The files are staged. The turn is taken, and an unfinished publication of a dead publisher is
   rolled back.
2. If the folder has a model of a later order, the files go to the archive and the folder stays.
   Otherwise the archive gets a copy of the model that is about to be replaced.
3. The turn notes that the folder is being replaced, and what it had before. Until here a cancel, a
   time limit or a shutdown stops the publication; from here on it is finished.
4. The files are written, and the note records it.
5. Once the job's ending is durable, the note is removed (`ModelPublisher.confirm`). A job that is
   cancelled or fails before that leaves the folder as it was.

So a folder without a note is of one run. If S3 fails for good, the folder is rolled back from the
archive; if the worker dies, the next claim of the job (`ModelPublisher.repair`) or the next
publisher of the folder does that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from consumer.life.stop_signal import StopSignal
from consumer.publishing.model_folder import (
    CLAIM,
    ORDERED_AT,
    TASK_ID,
    Fence,
    ModelFolder,
    persistently,
    turn_errors,
    whole_run,
)
from consumer.publishing.order_time import instant, order_time
from jobs.layout import Place, staging_of
from services.records.job_lease import JobLease
from services.records.lease import Lease
from services.records.turns import PublishingTurn, ReplacedFile, Replacement, Turns
from services.s3.s3_service import ObjectInfo, S3Service
from utils.errors import MachineError, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

_LOOKS = 5


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """The addresses of a run's model.

    Attributes:
        model_url: The folder's model, `model_url` on the wire.
        superseded_by: The job with a later order whose model the folder keeps; None if the folder's
            model is this run's.
        archived_url: This run's model if the folder keeps another one; otherwise None.
    """

    model_url: str
    superseded_by: str | None = None
    archived_url: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """A run's files on their way; `mark` is the metadata of each."""

    folder: Path
    files: tuple[str, ...]
    task_id: str
    claim: int
    mark: Mapping[str, str]


class ModelPublisher:
    """Publishes models.

    Args:
        models: Storage of `models/`.
        state: Storage of `staging/` and `archive/`; the same object if both buckets are at the same
            endpoint.
        model_bucket: Bucket of `models/`.
        state_bucket: Bucket of `staging/` and `archive/`.
        url_scheme: `s3` or `gs`: how the model's address is spelt to the backend.
        turns: Keep the publishers of one folder apart.
    """

    def __init__(
        self,
        models: S3Service,
        state: S3Service,
        *,
        model_bucket: str,
        state_bucket: str,
        url_scheme: str,
        turns: Turns,
    ) -> None:
        self._models = models
        self._state = state
        self._turns = turns
        self._model_bucket = model_bucket
        self._state_bucket = state_bucket
        self._url_scheme = url_scheme

    def publish(
        self,
        folder: Path,
        files: Sequence[str],
        place: Place,
        lease: JobLease,
        stop: StopSignal,
        *,
        ordered_at: str,
    ) -> Published:
        """Upload a run's files and make them the folder's model, unless it has a later order's.

        Args:
            folder: Local folder of the files.
            files: Their names. The last one is written when all others are in place.
            place: The keys of the job's results.
            lease: Checked before every write.
            stop: Checked until the first file is written; from then on the publication is finished.
            ordered_at: ISO time of the order. The later order wins. A time that cannot be read, or
                that is later than the record's creation, counts as the record's creation.

        Raises:
            LeaseLost: The job is another worker's now; nothing more was written.
            Stopped, Cancelled, TimeLimit: `stop` asked for it; the folder is unchanged.
            StorageError, MachineError: S3 or the disk failed. The folder is as it was, or the
                turn's note records that it has to be repaired.
        """
        task_id = lease.record.task_id
        mark = {
            TASK_ID: task_id,
            CLAIM: str(lease.claim_number),
            ORDERED_AT: order_time(ordered_at, lease.record.created_at).isoformat(),
        }
        run = _Run(folder, tuple(files), task_id, lease.claim_number, mark)

        def check() -> None:
            stop.check()
            lease.check()

        check()
        staging = staging_of(task_id, lease.claim_number)
        self._state.upload_folder(
            folder, self._state_bucket, staging, last=files[-1], metadata=mark, check=check
        )
        target = self._folder(place, files[-1])
        with self._turns.take(place.turn, task_id, check) as turn:
            published = self._put_in_place(target, run, turn, Fence(lease, turn), check)
        self._clear_staging([staging + name for name in files])
        return published

    def _put_in_place(
        self,
        target: ModelFolder,
        run: _Run,
        turn: Lease[PublishingTurn],
        fence: Fence,
        check: Callable[[], None],
    ) -> Published:
        url = target.place(run.files[-1]).uri(self._url_scheme)
        before = self._repaired(target, turn, fence, run.task_id)
        if before is None:
            before, later = _archived(target, run.mark, fence)
            if later is not None:
                log.warning("older_order_archived", superseded_by=later)
                archived = self._keep_in_archive(target, run, fence)
                return Published(url, superseded_by=later, archived_url=archived)
        check()
        note = Replacement(run.task_id, run.claim, run.files, before)
        _write_note(turn, note)
        try:
            persistently(lambda: target.put(run.folder, run.files, run.mark, fence), fence)
        except (StorageError, MachineError) as error:
            log.error("publication_failed", reason=str(error))
            if not turn.lost.is_set():
                self._repaired(target, turn, fence, run.task_id)
            raise
        _write_note(turn, dataclasses.replace(note, done=True))
        log.info("model_published", files=len(run.files))
        return Published(url)

    def confirm(self, place: Place, task_id: str, lease: JobLease) -> None:
        """The ending of a job whose model is in place is durable: keep nothing to roll back to.

        If S3 fails, or another run has the turn, the next publisher of the folder does it.

        Args:
            place: The keys of the job's results.
            task_id: The job.
            lease: The hold on the job.

        Raises:
            LeaseLost: The job is another worker's now.
        """
        try:
            seen = self._turns.read(place.turn)
            if seen is None or not _is_done(seen, task_id) or not seen.hold.released:
                return
            with self._turns.take(place.turn, task_id, lease.check) as turn:
                if _is_done(turn.record, task_id):
                    _write_note(turn, None)
        except StorageError as error:
            log.warning("publication_not_confirmed", reason=str(error))

    def repair(self, place: Place, task_id: str, lease: JobLease) -> bool:
        """Roll the folder back if a publication of this job was begun.

        To be called when a job is claimed, and before it ends as failed or cancelled. It costs one
        read if there is nothing to do. The note of another job is acted on only if its publisher
        has given up the turn without writing all files.

        Args:
            place: The keys of the job's results.
            task_id: The job.
            lease: The hold on the job; checked before every write.

        Returns:
            Whether a publication was rolled back.

        Raises:
            LeaseLost: The job is another worker's now.
            StorageError, MachineError: It could not be rolled back. The turn's note stays, so it
                can be tried again.
        """
        seen = self._turns.read(place.turn)
        if seen is None or seen.replacement is None:
            return False
        if not _is_to_be_repaired(seen, task_id):
            return False
        if seen.replacement.task_id != task_id and not seen.hold.released:
            return False
        with self._turns.take(place.turn, task_id, lease.check) as turn:
            if not _is_to_be_repaired(turn.record, task_id):
                return False  # another worker was faster
            last = seen.replacement.files[-1]
            _roll_back(self._folder(place, last), turn, Fence(lease, turn))
        return True

    def _folder(self, place: Place, last_file: str) -> ModelFolder:
        return ModelFolder(
            self._models,
            self._state,
            model_bucket=self._model_bucket,
            state_bucket=self._state_bucket,
            place=place,
            last_file=last_file,
        )

    def _repaired(
        self, target: ModelFolder, turn: Lease[PublishingTurn], fence: Fence, task_id: str
    ) -> tuple[ReplacedFile, ...] | None:
        """Roll back the publication that a dead publisher left unfinished.

        Returns:
            None if the folder is of one run; otherwise the last complete model, which the archive
            has, and which the new run of job `task_id` replaces as a whole.
        """
        left = turn.record.replacement
        if left is None or (left.done and left.task_id != task_id):
            return None
        try:
            _roll_back(target, turn, fence)
        except (StorageError, MachineError) as error:
            fence.check()
            log.error("publication_not_rolled_back", task_id_left=left.task_id, reason=str(error))
            return left.before
        return None

    def _keep_in_archive(self, target: ModelFolder, run: _Run, fence: Fence) -> str:
        self._state.upload_folder(
            run.folder,
            self._state_bucket,
            target.archived(run.task_id, "").key,
            last=run.files[-1],
            metadata=run.mark,
            check=fence.check,
        )
        return target.archived(run.task_id, run.files[-1]).uri(self._url_scheme)

    def _clear_staging(self, keys: Sequence[str]) -> None:
        try:
            self._state.delete(self._state_bucket, keys)
        except StorageError as error:
            # The model is in place; what is left goes after the job's ending.
            log.warning("staging_not_cleared", reason=str(error))


def _archived(
    target: ModelFolder, mark: Mapping[str, str], fence: Fence
) -> tuple[tuple[ReplacedFile, ...], str | None]:
    """Keep the model that is about to be replaced; nothing under `models/` changes.

    Returns:
        The files that the folder has; and the job whose model stays, if it is of a later order than
        `mark`. Then nothing was archived.
    """
    for _ in range(_LOOKS):
        present = target.look()
        if later := _later_order(present, mark, target.last_file):
            return (), later
        before = target.archive(present, fence)
        if before is not None:
            return before, None
        log.info("publishing_again", reason="a file changed while it was archived")
    raise StorageError(
        f"The model was not published: each of {_LOOKS} times, another job changed a file in "
        f"{target.place('').uri()} while it was archived. The job is retried; no action is needed."
    )


def _later_order(
    present: Mapping[str, ObjectInfo], mark: Mapping[str, str], last_file: str
) -> str | None:
    """The job with a later order than `mark` names, if the folder has its complete model."""
    there = whole_run(present, last_file)
    if there is None or there[TASK_ID] == mark[TASK_ID]:
        return None
    theirs, ours = instant(there.get(ORDERED_AT)), instant(mark[ORDERED_AT])
    return there[TASK_ID] if theirs and ours and theirs > ours else None


def _roll_back(target: ModelFolder, turn: Lease[PublishingTurn], fence: Fence) -> None:
    note = turn.record.replacement
    assert note is not None  # the caller has seen it
    persistently(lambda: target.restore(note.before, fence), fence)
    _write_note(turn, None)
    log.warning("publication_rolled_back", task_id_left=note.task_id, files=len(note.before))


def _write_note(turn: Lease[PublishingTurn], note: Replacement | None) -> None:
    with turn_errors():
        turn.update(lambda record: dataclasses.replace(record, replacement=note))


def _is_done(turn: PublishingTurn, task_id: str) -> bool:
    left = turn.replacement
    return left is not None and left.done and left.task_id == task_id


def _is_to_be_repaired(turn: PublishingTurn, task_id: str) -> bool:
    left = turn.replacement
    return left is not None and (left.task_id == task_id or not left.done)
