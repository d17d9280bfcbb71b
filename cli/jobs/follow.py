"""Waiting for a job's ending by its record on S3, which needs neither broker nor worker."""

from __future__ import annotations

import time
from collections.abc import Callable

from cli.jobs.job_view import JobView, view
from services.records.listing import look_up
from services.s3.s3_service import S3Service

LOOK_SECONDS = 2.0


def follow(
    s3: S3Service,
    bucket: str,
    task_id: str,
    show: Callable[[JobView], None],
    *,
    look_seconds: float = LOOK_SECONDS,
) -> JobView:
    """Look at the record until the job has ended.

    A store that is away for a while is waited for, as is a job that nobody has claimed yet.

    Args:
        s3: The storage.
        bucket: The state bucket.
        task_id: The job.
        show: Sees the job at each look.
        look_seconds: Between two looks.

    Returns:
        The job at its end.
    """
    while True:
        job = view(look_up(s3, bucket, [task_id])[0])
        show(job)
        if job.state == "ended":
            return job
        time.sleep(look_seconds)
