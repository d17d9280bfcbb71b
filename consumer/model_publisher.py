"""Puts a finished model in its place: staged first, then file by file under `models/`, the weights
last.

Runs of one style take turns (`services.style_turn`). A claim that slept through its lease may still
have one write in flight, so each write is made only over the version that the publisher saw when it
began; and the publisher looks again at the end, because only a folder whose files are all of one
run counts as published.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from consumer.training_job import TrainingJob
from consumer.stop_signal import StopSignal
from services.job_lease import JobLease
from services.s3_service import ObjectInfo, S3Location, S3Service
from services.style_turn import StyleTurns
from utils.errors import ObjectNotFound, PreconditionFailed, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

WEIGHTS = "lora_weights.safetensors"
_ROUNDS = 5
_PAUSE_SECONDS = 0.5


class ModelPublisher:
    """Publishes models of styles.

    Args:
        s3: The storage.
        model_bucket: Bucket of `models/`.
        state_bucket: Bucket of `staging/` and `archive/`.
        url_scheme: `s3` or `gs`: how the model's address is spelt to the backend.
        turns: Keeps the runs of one style apart.
    """

    def __init__(
        self,
        s3: S3Service,
        *,
        model_bucket: str,
        state_bucket: str,
        url_scheme: str,
        turns: StyleTurns,
    ) -> None:
        self._s3 = s3
        self._turns = turns
        self._model_bucket = model_bucket
        self._state_bucket = state_bucket
        self._url_scheme = url_scheme

    def publish(
        self,
        folder: Path,
        files: Sequence[str],
        job: TrainingJob,
        lease: JobLease,
        stop: StopSignal,
    ) -> str:
        """Upload a run's files and make them the style's model.

        Args:
            folder: Local folder of the files.
            files: Their names; `lora_weights.safetensors` last.
            job: Whose model it is.
            lease: Checked before every write.
            stop: Checked between two files.

        Returns:
            The model's address, `model_url` on the wire.

        Raises:
            LeaseLost: The job is another worker's now; nothing more was written.
            Stopped: The worker shuts down; the next one publishes anew.
            StorageError: S3 failed, or other runs of the style kept getting in between.
        """
        assert files[-1] == WEIGHTS, "whoever sees the weights must find everything else in place"
        mark = {"task_id": job.task_id, "claim": str(lease.claim_number)}

        def check() -> None:
            stop.check()
            lease.check()

        check()
        staging = f"staging/{job.task_id}/{lease.claim_number}/"
        self._s3.upload_folder(
            folder, self._state_bucket, staging, last=WEIGHTS, metadata=mark, check=check
        )
        target = f"models/style_{job.style_id}/"
        with self._turns.take(job.style_id, job.task_id, check) as turn:

            def check_turn() -> None:
                check()
                if turn.lost.is_set():
                    raise StorageError("the turn to publish was lost; S3 answers too slowly")

            self._replace(folder, files, target, mark, job, check_turn)
        self._s3.delete(self._state_bucket, [staging + name for name in files])
        return S3Location(self._model_bucket, target + WEIGHTS).uri(self._url_scheme)

    def _replace(
        self,
        folder: Path,
        files: Sequence[str],
        target: str,
        mark: dict[str, str],
        job: TrainingJob,
        check: Callable[[], None],
    ) -> None:
        for round_number in range(1, _ROUNDS + 1):
            check()
            try:
                present = self._present(target)
                self._archive(present, job)
                self._put(folder, files, target, present, mark, check)
                if self._is_all_ours(target, files, mark):
                    log.info("model_published", files=len(files))
                    return
            except (PreconditionFailed, ObjectNotFound):
                log.info("publishing_again", round=round_number, reason="a stale write came late")
            time.sleep(_PAUSE_SECONDS)
        raise StorageError("somebody else keeps writing into the style's folder")

    def _present(self, target: str) -> dict[str, ObjectInfo]:
        """What lies in the style's folder, by key, with metadata."""
        found: dict[str, ObjectInfo] = {}
        for listed in self._s3.list_objects(self._model_bucket, target):
            try:
                found[listed.key] = self._s3.head(S3Location(self._model_bucket, listed.key))
            except ObjectNotFound:
                continue
        return found

    def _archive(self, present: dict[str, ObjectInfo], job: TrainingJob) -> None:
        """Keep the files of the run that is about to be replaced."""
        for key, info in present.items():
            owner = info.metadata.get("task_id")
            if owner is None or owner == job.task_id:
                continue  # our own earlier try, or nobody's
            archived = f"archive/style_{job.style_id}/{owner}/{key.rsplit('/', 1)[1]}"
            self._s3.copy(
                S3Location(self._model_bucket, key), S3Location(self._state_bucket, archived)
            )

    def _put(
        self,
        folder: Path,
        files: Sequence[str],
        target: str,
        present: dict[str, ObjectInfo],
        mark: dict[str, str],
        check: Callable[[], None],
    ) -> None:
        stale = [key for key in present if key.removeprefix(target) not in files]
        for name in files:
            check()
            before = present.get(target + name)
            self._s3.upload_file(
                folder / name,
                S3Location(self._model_bucket, target + name),
                metadata=mark,
                only_over=before.etag if before else "",
            )
        self._s3.delete(self._model_bucket, stale)

    def _is_all_ours(self, target: str, files: Sequence[str], mark: dict[str, str]) -> bool:
        present = self._present(target)
        return all(
            (info := present.get(target + name)) is not None
            and {key: info.metadata.get(key) for key in mark} == mark
            for name in files
        )
