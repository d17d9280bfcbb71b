"""The demo's output: a line for each event, and a bar for the training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class DemoFailed(Exception):
    """A check of the demo failed; the message names it."""


class Screen:
    """A context manager: the bar, once shown, stays below the lines until the block ends."""

    def __init__(self) -> None:
        # Users copy addresses and paths: no guessed colours, no line breaks inside them.
        self.console = Console(highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._bar = Progress(
            TextColumn("        {task.fields[stage]:9}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[unit]} {task.completed:.0f} of {task.total:.0f}"),
            TextColumn("{task.fields[loss]}"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        )
        self._task: TaskID | None = None
        self._told_epoch = 0

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.finish_bar()

    def say(self, text: str, *, good: bool = False) -> None:
        """Print one line, after the seconds since the start."""
        mark = "[green]✔[/]" if good else "[blue]•[/]"
        seconds = time.monotonic() - self._began
        self.console.print(f"[dim]{seconds:5.1f} s[/] {mark} {escape(text)}")

    def show_progress(self, progress: dict[str, Any]) -> None:
        """Move the bar to the state in a progress webhook.

        Args:
            progress: The webhook's `progress` object.
        """
        if self._task is None:
            self._task = self._bar.add_task("", total=1, unit="", stage="", loss="", left="")
            if self.console.is_terminal:
                self._bar.start()
        loss, left = progress.get("loss"), progress.get("estimated_seconds")
        unit = "step" if "step" in progress else "epoch"
        epoch = progress["step" if unit == "step" else "current_epoch"]
        total = progress[f"total_{unit}s"]
        loss_text = "" if loss is None else f"loss {loss:.4f}"
        left_text = f"{left} s left" if left and epoch else ""  # unknown before that
        self._bar.update(
            self._task,
            completed=epoch,
            total=total,
            unit=unit,
            stage=progress.get("stage", ""),
            loss=loss_text,
            left=left_text,
        )
        # In a file or a pipe, a line per fifth of the training replaces the bar.
        if not self.console.is_terminal and total and epoch >= self._told_epoch + total / 5:
            self._told_epoch = epoch
            facts = (f"{unit} {epoch} of {total}", loss_text, left_text)
            self.say(", ".join(fact for fact in facts if fact))

    def finish_bar(self) -> None:
        """Leave the bar as it is, and draw it no more."""
        if self._bar.live.is_started:
            self._bar.stop()

    def conclude(self, rows: dict[str, str]) -> None:
        """Print the last lines, each a name and its text."""
        self.console.print()
        for name, text in rows.items():
            self.console.print(f"[bold]{name:14}[/]{escape(text)}")

    def fail(self, reason: str, log: Path) -> None:
        """Print the reason for a failure, and the address of the worker's log."""
        self.console.print(f"\n[bold red]The demo failed:[/] {escape(reason)}")
        if log.exists():
            self.console.print(f"The worker's log: {log}")
