"""What ops see: tables and a bar for people, JSON for scripts; strangers' texts made harmless."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from consumer.ops.dead_queue import DeadLetter
from consumer.ops.job_view import JobView
from consumer.ops.redrive import Redriven

_STYLES = {"held": "green", "silent": "bold red", "waiting": "yellow", "unknown": "bold red"}
_READABLE = 24


def print_json(value: Any) -> None:
    """JSON on standard output, and nothing else there."""
    print(json.dumps(value, indent=2))


def jobs(found: Sequence[JobView], more: int, *, as_json: bool) -> None:
    """The jobs, newest first."""
    if as_json:
        print_json({"jobs": [dataclasses.asdict(job) for job in found], "more": more})
        return
    table = _table("task", "style", "state", "owner", "attempts", "epochs", "ending", "delivery")
    table.add_column("written")
    table.add_column("detail", overflow="fold")
    for job in found:
        table.add_row(
            _text(job.task_id),
            "" if job.style_id is None else str(job.style_id),
            Text(job.state, _STYLES.get(job.state, "")),
            _text(job.owner),
            str(job.attempts),
            f"{job.epoch}/{'?' if job.epochs is None else job.epochs}",
            _text(job.ending),
            job.delivery,
            _ago(job.seconds_since_written),
            _text(job.detail),
        )
    _print(table, "no job has a record yet" if not found else "", more)


def dead(letters: Sequence[DeadLetter], more: int, *, as_json: bool) -> None:
    """The dead queue."""
    if as_json:
        shown = [
            {
                "task_id": letter.task_id,
                "code": letter.code,
                "reason": letter.reason,
                "attempts": letter.attempts,
                "body": letter.body.decode(errors="replace"),
            }
            for letter in letters
        ]
        print_json({"messages": shown, "more": more})
        return
    table = _table("", "task", "code", "attempts")
    table.add_column("why it is there", overflow="fold")
    for letter in letters:
        table.add_row(
            str(letter.number),
            _text(letter.task_id or "–"),
            _text(letter.code or "moved by the broker"),
            str(letter.attempts),
            _text(letter.reason),
        )
    _print(table, "the dead queue is empty" if not letters else "", more)


def redriven(done: Sequence[Redriven], more: int, *, as_json: bool) -> None:
    """What was sent back, and what was not and why."""
    if as_json:
        print_json({"messages": [dataclasses.asdict(one) for one in done], "more": more})
        return
    table = _table("task", "code", "sent back")
    table.add_column("outcome", overflow="fold")
    for one in done:
        mark = Text("yes", "green") if one.sent_back else Text("no", "yellow")
        table.add_row(_text(one.task_id or "–"), _text(one.code), mark, _text(one.outcome))
    _print(table, "no such message is in the dead queue" if not done else "", more)


class JobBar:
    """A bar on standard error that follows one job: its pictures going up, then its epochs."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description:24}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("pictures", total=None, count="")

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
        """So many pictures are up."""
        self._progress.update(self._task, completed=done, total=total, count=f"{done}/{total}")

    def saw(self, job: JobView) -> None:
        """The job as its record has it; its epochs are those of the newest checkpoint."""
        words = {"unknown": "waiting for a worker", "held": "training", "silent": "worker silent"}
        self._progress.update(
            self._task,
            description=words.get(job.state, job.state),
            completed=job.epoch,
            total=job.epochs,
            count=f"epoch {job.epoch}/{job.epochs}" if job.epochs else "",
        )


def say(sentence: str, style: str = "") -> None:
    """A sentence on standard error, whole."""
    Console(stderr=True).print(Text(_printable(sentence), style), soft_wrap=True, highlight=False)


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, no_wrap=title not in ("owner",), overflow="fold")
    return table


def _print(table: Table, instead: str, more: int) -> None:
    console = Console(highlight=False)
    if instead:
        console.print(instead)
    elif _needs(table) <= console.width:
        console.print(table)
    else:
        _print_narrow(table, console)
    if more:
        console.print(f"and {more} more")


def _needs(table: Table) -> int:
    """The width below which words would be cut short, or stand a few letters a line."""
    longest = (
        max(cell_len(str(words)) for words in (column.header, *column.cells))
        for column in table.columns
    )
    widths = (
        size if column.no_wrap else min(size, _READABLE)
        for column, size in zip(table.columns, longest, strict=True)
    )
    return sum(widths) + 2 * len(table.columns)


def _print_narrow(table: Table, console: Console) -> None:
    """A paragraph for each row, where the table would have to cut its words short."""
    titles = [str(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        indent = ""
        for title, cell in zip(titles, row, strict=True):
            if str(cell):
                words = cell if isinstance(cell, Text) else Text(str(cell))
                console.print(Text(f"{indent}{title} ") + words, soft_wrap=True)
                indent = "  "


def _ago(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _text(words: str) -> Text:
    return Text(_printable(words))


def _printable(text: str) -> str:
    """Fit for a terminal: no escape sequences."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)
