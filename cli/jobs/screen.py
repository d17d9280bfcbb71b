"""What ops see of the dead queue, of what was sent back, and of sentences; JSON for scripts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from cli.jobs.given_up import Redriven, Waiting
from cli.jobs.job_table import printable
from cli.jobs.task_ids import short_ids
from utils.wording import counted


def print_json(value: Any) -> None:
    """JSON on standard output, and nothing else there."""
    print(json.dumps(value, indent=2))


def say(sentence: str, style: str = "") -> None:
    """A sentence on standard error; in one line where no person looks on."""
    words = printable(sentence)
    words.stylize(style)
    console = Console(stderr=True)
    console.print(words, soft_wrap=not console.is_terminal, highlight=False)


def warn(sentences: Iterable[str]) -> None:
    """Sentences that somebody should read before something is done; each once."""
    for sentence in dict.fromkeys(filter(None, sentences)):
        say(sentence, "yellow")


def waiting(found: Sequence[Waiting], more: int, known: Iterable[str], *, as_json: bool) -> None:
    """What can be sent back: the dead queue, then the jobs of which it has no copy."""
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
    """What was sent back, and what was not and why."""
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
        console.print("Nothing was sent back: there is no such message or job.")
    if more:
        console.print(f"{counted(more, 'message')} of the dead queue were not looked at.")


def _print_waiting(found: Sequence[Waiting], short: dict[str, str], console: Console) -> None:
    """A line for each, and what is wrong with it below."""
    for each in found:
        line = Text.assemble(
            "  ",
            (short.get(each.task_id, "–"), "bold"),
            "  ",
            "" if each.style_id is None else f"style {each.style_id}  ",
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
