"""`publish --wait`: polls the record of a job on S3 until it has ended, and draws a bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cli.jobs.job_view import JobView, view
from cli.jobs.screen import progress
from jobs.kinds import Kinds
from services.records.listing import look_up
from services.s3.s3_service import S3Service

LOOK_SECONDS = 2.0


def follow(
    s3: S3Service,
    bucket: str,
    kinds: Kinds,
    task_id: str,
    show: Callable[[JobView], None],
    *,
    look_seconds: float = LOOK_SECONDS,
) -> JobView:
    """Look at the record until the job has ended.

    A store that is away for a while is waited for, as is a job that no worker has claimed yet.

    Args:
        s3: The storage.
        bucket: The state bucket.
        kinds: Measure how far the job is.
        task_id: The job.
        show: Sees the job at each look.
        look_seconds: Between two looks.

    Returns:
        The job at its end.
    """
    while True:
        job = view(look_up(s3, bucket, [task_id])[0], kinds)
        show(job)
        if job.state == "ended":
            return job
        time.sleep(look_seconds)


_STATES = {
    "unknown": "waiting for a worker",
    "held": "training",
    "silent": "worker silent",
    "waiting": "waiting for its turn",
    "pausing": "pausing",
    "paused": "paused",
}


class JobBar:
    """Follows one job: its work, measurements and the time left, as its worker last reported.

    On a terminal it is a bar; elsewhere a line for each change of state or completed unit.

    Args:
        console: The console to draw on; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}"),
            console=self._console,
            transient=True,
            expand=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("images", total=None, count="")
        self._last: tuple[str, float] | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def uploaded(self, done: int, total: int) -> None:
        """So many images are up."""
        self._progress.update(self._task, completed=done, total=total, count=f"{done}/{total}")

    def saw(self, job: JobView) -> None:
        """Show the job as its record has it."""
        doing = _STATES.get(job.state, job.state)
        count = progress(job)
        self._progress.update(
            self._task,
            description=doing,
            completed=job.standing.done,
            total=job.standing.total,
            count=count,
        )
        now = (job.state, job.standing.done)
        if not self._console.is_terminal and self._last != now:
            self._last = now
            line = f"{doing}: {count}" if count else doing
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
