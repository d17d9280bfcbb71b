"""A bar on standard error that follows one job: its images going up, then its epochs."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cli.jobs.job_table import progress
from cli.jobs.job_view import JobView

_STATES = {
    "unknown": "waiting for a worker",
    "held": "training",
    "silent": "worker silent",
    "waiting": "waiting for its turn",
}


class JobBar:
    """Follows one job: epochs, loss and the time that is left, as its worker last said.

    On a terminal it is a bar; elsewhere a line for each change of state or epoch.

    Args:
        console: Where to draw; standard error by default.
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
        self._task = self._progress.add_task("pictures", total=None, count="")
        self._last: tuple[str, int] | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
            completed=job.epoch,
            total=job.epochs,
            count=count,
        )
        if not self._console.is_terminal and self._last != (job.state, job.epoch):
            self._last = (job.state, job.epoch)
            line = f"{doing}: {count}" if count else doing
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
