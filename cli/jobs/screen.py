"""Terminal output of the commands about jobs: tables, details, sentences, and JSON for scripts."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.jobs.job_view import JobView
from cli.jobs.redrive import Redriven, Waiting
from cli.jobs.task_ids import short_ids
from jobs.kinds import FIRST_KIND, Standing
from jobs.layout import INVALID_PREFIX
from jobs.record import DeliveryState
from utils.wording import counted


def print_json(value: Any) -> None:
    """JSON on standard output, and nothing else there."""
    print(json.dumps(value, indent=2))


def say(sentence: str, style: str = "") -> None:
    """Print a sentence on standard error; in one line if that is no terminal."""
    words = printable(sentence)
    words.stylize(style)
    console = Console(stderr=True)
    console.print(words, soft_wrap=not console.is_terminal, highlight=False)


def warn(sentences: Iterable[str]) -> None:
    """Print sentences that a person should read before the action; each once."""
    for sentence in dict.fromkeys(filter(None, sentences)):
        say(sentence, "yellow")


def waiting(found: Sequence[Waiting], more: int, known: Iterable[str], *, as_json: bool) -> None:
    """Print the dead queue, then the jobs without a message in it."""
    if as_json:
        messages = [dataclasses.asdict(each) for each in found if each.in_dead_queue]
        records = [dataclasses.asdict(each) for each in found if not each.in_dead_queue]
        print_json({"messages": messages, "more": more, "records": records})
        return
    console = Console(highlight=False)
    letters = [each for each in found if each.in_dead_queue]
    others = [each for each in found if not each.in_dead_queue]
    short = short_ids((each.task_id for each in found if each.task_id), known)
    if letters:
        console.print(f"{counted(len(letters) + more, 'message')} in the dead queue:")
        _print_waiting(letters, short, console)
        if more:
            console.print(f"and {counted(more, 'more message', 'more messages')}")
    else:
        console.print("The dead queue is empty.")
    if others:
        console.print(
            f"{counted(len(others), 'job')} without a copy in the dead queue "
            "(sent back only by task id):"
        )
        _print_waiting(others, short, console)


def redriven(done: Sequence[Redriven], more: int, known: Iterable[str], *, as_json: bool) -> None:
    """Print the result of `redrive` for each message or job."""
    if as_json:
        print_json({"messages": [dataclasses.asdict(one) for one in done], "more": more})
        return
    console = Console(highlight=False)
    short = short_ids((each.task_id for each in done if each.task_id), known)
    for one in done:
        mark = Text("sent back", "green") if one.sent_back else Text("not sent back", "yellow")
        if one.left_out:
            mark = Text("left out", "yellow")
        line = printable(short.get(one.task_id, one.task_id or "–")).copy()
        line.append("  ").append_text(mark).append(": ").append_text(printable(one.outcome))
        console.print(line)
    if not done:
        console.print("Nothing was sent back: no such message or job exists.")
    if more:
        console.print(f"{counted(more, 'message')} of the dead queue were not looked at.")


def _print_waiting(found: Sequence[Waiting], short: dict[str, str], console: Console) -> None:
    """A line for each, and what is wrong with it below."""
    for each in found:
        line = Text.assemble(
            "  ",
            (short.get(each.task_id, "–"), "bold"),
            "  ",
            printable(f"{each.kind} {each.subject}  " if each.subject else ""),
            (each.code or "moved by the broker", "red"),
            f"  {counted(each.attempts, 'attempt')}" if each.attempts else "",
            "" if each.trains else "  (only its ending is sent again)",
        )
        console.print(line)
        if each.reason:
            _print_indented(printable(each.reason), console)
        if each.superseded:
            _print_indented(Text(f"superseded: {each.superseded}", "yellow"), console)


def _print_indented(words: Text, console: Console) -> None:
    for line in words.wrap(console, max(20, console.width - 6)):
        console.print(Text("    ").append_text(line))


WIDE = 110
"""Columns from which a line also shows the start of the job's error."""

_STATES = {
    "held": "green",
    "pausing": "yellow",
    "silent": "bold red",
    "waiting": "yellow",
    "paused": "yellow",
    "unknown": "bold red",
}
_STATES_IN_WORDS = {
    "held": "held: a worker has the job",
    "silent": "silent: the lease of its worker has run out; another worker takes it over",
    "pausing": "pausing: its worker saves it and releases it",
    "waiting": "waiting for its message to be taken again",
    "paused": "paused; `resume` continues it",
    "ended": "ended",
    "dead": "in the dead queue, without a record",
}
# delivery -> whether the backend received the ending, in a word; and in a sentence.
_TOLD = {
    "": "",
    str(DeliveryState.NONE): "",
    str(DeliveryState.PENDING): "not yet",
    str(DeliveryState.DELIVERED): "yes",
    str(DeliveryState.SET_ASIDE): "refused",
}
_TOLD_IN_WORDS = {
    str(DeliveryState.PENDING): "not notified yet; workers keep trying",
    str(DeliveryState.DELIVERED): "was notified (delivered)",
    str(DeliveryState.SET_ASIDE): "refused the ending (set_aside); `redrive` sends it again",
}


def print_jobs(jobs: Sequence[JobView], known: Iterable[str], console: Console) -> None:
    """One line for each job, under short ids that the commands accept.

    Args:
        jobs: The jobs, in the order in which they are shown.
        known: All ids that there are: a short id names one job only.
        console: The console to print to.
    """
    names = {job.task_id: _name(job) for job in jobs}
    short = short_ids(names.values(), {each.removeprefix(INVALID_PREFIX) for each in known})
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("TASK", no_wrap=True, min_width=8)
    table.add_column("SUBJECT", no_wrap=True, justify="right")
    table.add_column("STATE")
    table.add_column("DONE", no_wrap=True, justify="right")
    table.add_column("TOLD", no_wrap=True)
    table.add_column("AGE", no_wrap=True, justify="right")
    wide = console.width >= WIDE
    if wide:
        table.add_column("ERROR")
    for job in jobs:
        cells: list[Text | str] = [
            printable(short[names[job.task_id]]),
            _one_line(printable(_subject(job))),
            _one_line(_state(job)),
            "" if job.standing.total is None else _done(job.standing),
            Text(_TOLD.get(job.delivery, job.delivery), "red" if _refused(job) else ""),
            age(job.seconds_since_written),
        ]
        table.add_row(*cells, *([_one_line(printable(job.detail))] if wide else []))
    console.print(table)


def print_details(jobs: Sequence[JobView], console: Console) -> None:
    """Every detail of each job."""
    for number, job in enumerate(jobs):
        if number:
            console.print()
        console.print(printable(job.task_id).copy(), style="bold", soft_wrap=True)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in _details(job):
            if str(value):
                grid.add_row(f"  {name}", value)
        console.print(grid)


def age(seconds: float | None) -> str:
    """A time in a few characters: `59 min`."""
    if seconds is None:
        return ""
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def progress(job: JobView) -> str:
    """How far a job is, in a few words: `step 24/200, 0:12:05 left`."""
    parts = []
    if job.standing.total:
        parts.append(f"{job.standing.unit} {_done(job.standing)}")
    for name, value in job.standing.measured.items():
        if value is not None:
            parts.append(f"{name} {value:.4f}")
    if job.seconds_left is not None:
        parts.append(f"{datetime.timedelta(seconds=round(job.seconds_left))} left")
    return ", ".join(parts)


def printable(text: str) -> Text:
    """A stranger's text, fit for a terminal: no escape sequences."""
    return Text("".join(letter if letter.isprintable() else "�" for letter in text))


def _details(job: JobView) -> Collection[tuple[str, Text]]:
    if job.state == "unknown":
        return (("state", Text("unknown", "bold red")), ("reason", printable(job.detail)))
    state = Text(_STATES_IN_WORDS[job.state], _STATES.get(job.state, ""))
    if job.ending:
        state.append_text(Text(": ")).append_text(_state(job))
    worker = f"{job.owner}, claim {job.claim}" if job.claim else job.owner
    tries = counted(job.attempts, "attempt") + " in a row without a new checkpoint"
    written = f"{age(job.seconds_since_written)} ago, by the clock of S3"
    return (
        (job.kind, printable(job.subject)),
        ("task id in the message", printable(job.message_task_id)),
        ("state", state),
        ("progress", Text(progress(job))),
        ("backend", Text(_TOLD_IN_WORDS.get(job.delivery, ""), "red" if _refused(job) else "")),
        ("error" if job.ending != "complete" else "detail", printable(job.detail)),
        ("model", printable(job.model_url)),
        ("worker", printable(worker)),
        ("attempts", Text(tries if job.attempts else "")),
        ("ordered", printable(job.ordered_at)),
        ("first claimed", printable(job.created_at)),
        ("ended", printable(job.ended_at or "")),
        ("last written", Text(written if job.seconds_since_written is not None else "")),
    )


def _name(job: JobView) -> str:
    return job.message_task_id or job.task_id.removeprefix(INVALID_PREFIX)


def _subject(job: JobView) -> str:
    return job.subject if job.kind == FIRST_KIND else f"{job.kind} {job.subject}".strip()


def _state(job: JobView) -> Text:
    if not job.ending:
        return Text(job.state, _STATES.get(job.state, ""))
    return printable(job.ending).copy() if job.ending == "complete" else _red(job.ending)


def _red(text: str) -> Text:
    words = printable(text)
    words.stylize("red")
    return words


def _refused(job: JobView) -> bool:
    return job.delivery == DeliveryState.SET_ASIDE


def _done(standing: Standing) -> str:
    return f"{standing.done:g}/{standing.total:g}"


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
