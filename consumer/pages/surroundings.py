"""Polls S3, the disks and an idle trainer process every few seconds."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

from consumer.pages.condition import Condition
from services.s3.s3_service import S3Service
from utils.errors import TrainingServerError
from utils.metrics import Metrics
from utils.threads import Every

LOOK_SECONDS = 3.0
PATIENCE_SECONDS = 3.0
"""Together with the interval, this keeps `/ready` at most ten seconds out of date."""


class Surroundings:
    """The polling thread; a context manager.

    Args:
        buckets: The buckets to test, each with its store, whose requests fail fast.
        folders: Folders whose disks are measured, by the metric's label.
        condition: Receives the result for S3, and replaces a trainer that died.
        metrics: Receive the sizes of the disks.
    """

    def __init__(
        self,
        buckets: Iterable[tuple[str, S3Service]],
        folders: Mapping[str, Path],
        condition: Condition,
        metrics: Metrics,
    ) -> None:
        # A bucket that is listed twice is tested once.
        self._buckets = sorted(set(buckets), key=lambda each: each[0])
        self._folders = dict(folders)
        self._condition = condition
        self._metrics = metrics
        self._every = Every(LOOK_SECONDS, self._look, name="surroundings")

    def __enter__(self) -> Self:
        self._every.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._every.stop(join_seconds=0)  # a request that hangs in the network is not waited for

    def _look(self) -> None:
        self._look_at_disks()
        self._condition.storage_tested(self._storage_problem())
        self._condition.revive_trainer()

    def _storage_problem(self) -> str | None:
        for bucket, s3 in self._buckets:
            try:
                s3.reach(bucket)
            except TrainingServerError as error:
                return str(error)
        return None

    def _look_at_disks(self) -> None:
        for label, folder in self._folders.items():
            with contextlib.suppress(OSError):  # not made yet, or its disk is gone
                usage = shutil.disk_usage(folder)
                self._metrics.disk_free_bytes.labels(label).set(usage.free)
                self._metrics.disk_size_bytes.labels(label).set(usage.total)
