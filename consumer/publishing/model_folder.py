"""A folder under `models/`, and the archive of the models that it had.

Every pass looks at the folder, proves by a write that the job and the folder's turn are still this
publisher's, and then writes only over the versions that it has seen (`If-Match`, `If-None-Match`).
A successor takes the turn before it writes, so a publisher that was suspended at any point changes
nothing that a later one has made. Its clock does not matter.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from jobs.addresses import S3Location
from jobs.layout import Place
from services.records.job_lease import JobLease
from services.records.lease import Lease
from services.records.turns import PublishingTurn, ReplacedFile
from services.s3.s3_service import FILES_AT_ONCE, ObjectInfo, S3Service
from utils.errors import (
    AccessDenied,
    LeaseLost,
    ObjectNotFound,
    ObjectTooLarge,
    PreconditionFailed,
    StorageError,
)
from utils.logger import get_logger
from utils.threads import in_parallel

log = get_logger(__name__)

TASK_ID = "task_id"
CLAIM = "claim"
ORDERED_AT = "ordered-at"

UNKNOWN_RUN = "unknown.run"
"""Archive folder of files that name no job. No task id contains a dot."""

# Seconds between two tries at something that S3 or a late write of another publisher prevented.
_PAUSES: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)


@contextlib.contextmanager
def turn_errors() -> Iterator[None]:
    """Inside the block a lost turn is an error of S3's, since the job itself may be well."""
    try:
        yield
    except LeaseLost as error:
        raise StorageError(
            f"Publishing stopped, because this worker lost its turn. {error} S3 answered too "
            "slowly, or the worker was suspended. The job is retried. If this happens again, check "
            "S3's response times, or raise LEASE_TTL_SECONDS."
        ) from error


class Fence:
    """Proves before each write that the job and the folder's turn are still this publisher's.

    Args:
        lease: The hold on the job.
        turn: The hold on the folder.
    """

    def __init__(self, lease: JobLease, turn: Lease[PublishingTurn]) -> None:
        self._lease = lease
        self._turn = turn

    def check(self) -> None:
        """Prove it by the clock, before a write that is made over a known version.

        Raises:
            LeaseLost: The job is another worker's now.
            StorageError: The turn is another publisher's now.
        """
        self._lease.check()
        with turn_errors():
            self._turn.check()

    def renew(self) -> None:
        """Prove it by two writes, before something that cannot be undone.

        Raises:
            LeaseLost, StorageError: See `check`.
        """
        with turn_errors():
            self._turn.renew()
        self._lease.renew()

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than the job is this publisher's."""
        self._lease.lost.wait(seconds)


def persistently(act: Callable[[], bool], fence: Fence) -> None:
    """Repeat an act until it finds nothing left to do, or S3 refuses it for good.

    Args:
        act: Returns whether nothing was left to do.
        fence: Ends the repetition when the job or the turn is lost.

    Raises:
        LeaseLost: The job is another worker's now.
        StorageError: S3 failed too often, or a late write of another publisher came each time.
    """
    pauses = iter(_PAUSES)
    acted = False
    while True:
        fence.check()
        failure = StorageError(
            "Publishing did not succeed: another job wrote to the same folder each time. The job "
            "is retried; no action is needed."
        )
        try:
            if act():
                return
            if not acted:
                acted = True
                continue  # at once: this only looks at what was written
        except (AccessDenied, ObjectTooLarge):
            raise
        except StorageError as error:
            fence.check()
            failure = error
        pause = next(pauses, None)
        if pause is None:
            raise failure
        log.info("publishing_again", reason=str(failure))
        fence.wait(pause)


class ModelFolder:
    """One folder and its archive.

    Args:
        models: Storage of the model bucket.
        state: Storage of the state bucket. If it is the same object, archiving copies inside the
            storage; otherwise files pass through this machine.
        model_bucket: Bucket of `models/`.
        state_bucket: Bucket of `archive/`.
        place: Its keys.
        last_file: The file that is written last and deleted first.
    """

    def __init__(
        self,
        models: S3Service,
        state: S3Service,
        *,
        model_bucket: str,
        state_bucket: str,
        place: Place,
        last_file: str,
    ) -> None:
        self._models = models
        self._state = state
        self._model_bucket = model_bucket
        self._state_bucket = state_bucket
        self._prefix = place.models
        self._archive_prefix = place.archive
        self.last_file = last_file
        self._restored: dict[str, str] = {}

    def place(self, name: str) -> S3Location:
        """Location of one of its files."""
        return S3Location(self._model_bucket, self._prefix + name)

    def archived(self, run: str, name: str) -> S3Location:
        """Location of a run's file in the archive."""
        return S3Location(self._state_bucket, f"{self._archive_prefix}{run}/{name}")

    def look(self) -> dict[str, ObjectInfo]:
        """The folder's files by name, with their metadata.

        Raises:
            StorageError: S3 cannot be used.
        """
        found: dict[str, ObjectInfo] = {}
        for listed in self._models.list_objects(self._model_bucket, self._prefix):
            if listed.key.endswith("/"):
                continue  # an empty object that some tools make to show a folder
            with contextlib.suppress(ObjectNotFound):
                found[listed.key.removeprefix(self._prefix)] = self._models.head(
                    S3Location(self._model_bucket, listed.key)
                )
        return found

    # --- archive

    def archive(
        self, present: Mapping[str, ObjectInfo], fence: Fence
    ) -> tuple[ReplacedFile, ...] | None:
        """Copy the folder's files into the archive, each under the run that published it.

        Returns:
            The folder's files, for `restore`; None if a file changed meanwhile, so that the caller
            has to look at the folder again.

        Raises:
            LeaseLost, StorageError: The job, the turn or S3 is lost.
        """
        before = []
        for name, info in sorted(present.items()):
            run = info.metadata.get(TASK_ID)
            target = self.archived(run or UNKNOWN_RUN, name)
            if not self._is_archived(info, target):
                # A publisher that slept here must not copy a later run's file over this one.
                fence.renew()
                try:
                    self._copy_to_archive(self.place(name), info, target)
                except (PreconditionFailed, ObjectNotFound):
                    return None
            before.append(ReplacedFile(name, target.key, info.etag, run, info.metadata.get(CLAIM)))
        return tuple(before)

    def _is_archived(self, info: ObjectInfo, target: S3Location) -> bool:
        """Whether the archive has the file already: a run's claim publishes a name only once."""
        if info.metadata.get(TASK_ID) is None:
            return False
        try:
            there = self._state.head(target)
        except (ObjectNotFound, AccessDenied):  # an older policy does not allow reading the archive
            return False
        return there.size == info.size and is_of(there, info.metadata)

    def _copy_to_archive(self, source: S3Location, info: ObjectInfo, target: S3Location) -> None:
        if self._models is self._state:
            self._state.copy(source, target, metadata=info.metadata, etag=info.etag)
            return
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "file"
            self._models.download(source, path, etag=info.etag)
            try:
                over = self._state.head(target).etag
            except ObjectNotFound:
                over = ""
            self._state.upload_file(path, target, metadata=info.metadata, only_over=over)

    # --- publish

    def put(
        self,
        folder: Path,
        files: Sequence[str],
        mark: Mapping[str, str],
        fence: Fence,
    ) -> bool:
        """Make the folder that of one run: write what it lacks, delete what it must not have.

        Args:
            folder: Local folder of the files.
            files: Their names. The last one is written when all others are in place.
            mark: Every file's metadata.
            fence: Asked before each write.

        Returns:
            Whether nothing was left to do, so that the folder is published.

        Raises:
            PreconditionFailed, ObjectNotFound: A late write of another publisher; look again.
            LeaseLost, StorageError: The job, the turn or S3 is lost.
        """
        present = self.look()
        missing = [name for name in files if not _is_there(present.get(name), mark)]
        surplus = sorted(present.keys() - set(files))
        if not missing and not surplus:
            return True
        # Only a write proves that all versions seen above are older than a successor's.
        fence.renew()

        def put_one(name: str) -> None:
            fence.check()
            before = present.get(name)
            self._models.upload_file(
                folder / name,
                self.place(name),
                metadata=mark,
                only_over=before.etag if before else "",
            )

        last = files[-1]
        first = [name for name in missing if name != last]
        in_parallel(put_one, first, at_once=FILES_AT_ONCE, name="s3-folder")
        for name in surplus:
            fence.renew()
            self._models.delete_version(self.place(name), present[name].etag)
        if last in missing:
            put_one(last)
        return False

    # --- restore

    def restore(self, before: Sequence[ReplacedFile], fence: Fence) -> bool:
        """Bring the folder back to what it was before a publication, from the archive.

        Files that no worker published are not deleted.

        Args:
            before: The files that it had.
            fence: Asked before each write.

        Returns:
            Whether nothing was left to do, so that the folder is as it was.

        Raises:
            PreconditionFailed, ObjectNotFound: A late write of another publisher; look again.
            LeaseLost, StorageError: The job, the turn or S3 is lost, or the archive has not the
                files.
        """
        present = self.look()
        wanted = {file.name for file in before}
        strays = [
            name
            for name, info in present.items()
            if name not in wanted and TASK_ID in info.metadata
        ]
        wrong = [file for file in before if not self._is_as_it_was(present.get(file.name), file)]
        if not strays and not wrong:
            return True
        fence.renew()
        # Readers that see the weights must find everything else, so these go first and come last.
        for name in sorted(strays, key=lambda name: name != self.last_file):
            fence.renew()
            self._models.delete_version(self.place(name), present[name].etag)
        for file in sorted(wrong, key=lambda file: file.name == self.last_file):
            self._bring_back(file, present.get(file.name), fence)
        return False

    def _is_as_it_was(self, info: ObjectInfo | None, file: ReplacedFile) -> bool:
        if info is None or info.etag not in (file.etag, self._restored.get(file.name)):
            return False
        return is_of(info, {TASK_ID: file.task_id, CLAIM: file.claim})

    def _bring_back(self, file: ReplacedFile, over: ObjectInfo | None, fence: Fence) -> None:
        source = S3Location(self._state_bucket, file.archived)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "file"
            try:
                kept = self._state.head(source)
                if not is_of(kept, {TASK_ID: file.task_id, CLAIM: file.claim}):
                    raise ObjectNotFound
                self._state.download(source, path, etag=kept.etag)
            except ObjectNotFound as error:
                raise StorageError(
                    f"{source.uri()} is missing or of another run, so "
                    f"{self.place(file.name).uri()} cannot be restored. Train again."
                ) from error
            fence.check()
            self._restored[file.name] = self._models.upload_file(
                path,
                self.place(file.name),
                metadata=kept.metadata,
                only_over=over.etag if over else "",
            )


def is_of(info: ObjectInfo, mark: Mapping[str, str | None]) -> bool:
    """Whether a file is of the run and claim that `mark` names."""
    return all(info.metadata.get(key) == mark.get(key) for key in (TASK_ID, CLAIM))


def _is_there(info: ObjectInfo | None, mark: Mapping[str, str]) -> bool:
    return info is not None and is_of(info, mark)


def whole_run(present: Mapping[str, ObjectInfo], last_file: str) -> Mapping[str, str] | None:
    """The metadata that a complete model's files share; None if the folder has no complete model.

    Files that no worker published do not count.
    """
    weights = present.get(last_file)
    if weights is None or TASK_ID not in weights.metadata:
        return None
    published = [info for info in present.values() if TASK_ID in info.metadata]
    if not all(is_of(info, weights.metadata) for info in published):
        return None
    return weights.metadata
