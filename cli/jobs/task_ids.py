"""Task ids as users type them: in full, or only the beginning."""

from __future__ import annotations

import re
import sys
import uuid
from collections.abc import Collection, Iterable
from typing import TypeVar

import typer

from jobs.layout import INVALID_PREFIX, record_at
from services.records.listing import MOST_MATCHES, beginning_with
from services.s3.s3_service import S3Service
from utils.errors import ConfigurationError

LEAST = 4
"""Characters that the beginning of an id must have."""
SHOWN = 8
"""Characters of an id that a table shows, unless it takes more to name one job only."""

_TASK_ID = re.compile(rf"(?:{INVALID_PREFIX})?[A-Za-z0-9_-]{{1,128}}")
_NAMED_AT_MOST = 5

T = TypeVar("T")


def resolve(s3: S3Service, bucket: str, given: str, *, others: Collection[str] = ()) -> str:
    """The task id for an id, or for the beginning of one.

    Args:
        s3: The storage.
        bucket: The state bucket.
        given: The id as it was typed.
        others: More ids that may be meant, such as those in the dead queue.

    Returns:
        The whole id; `given` unchanged if no known id begins with it.

    Raises:
        ConfigurationError: No id looks like this, or several ids begin with it.
        StorageError: The records cannot be listed.
    """
    if not _TASK_ID.fullmatch(given):
        raise ConfigurationError(
            f"{given!r} is not a task id: 1 to 128 of A-Z, a-z, 0-9, _ and - are allowed."
        )
    if given in others or s3.exists(record_at(bucket, given)):
        return given
    if len(given) < LEAST:
        return given
    found = {each for each in others if each.startswith((given, INVALID_PREFIX + given))}
    found.update(beginning_with(s3, bucket, given))
    if len(found) > 1:
        raise ConfigurationError(
            f"{given} is the beginning of {_several(found)}. Type more of the id."
        )
    return found.pop() if found else given


def is_clear(given: str, task_id: str) -> bool:
    """Whether `given` can only mean `task_id`: it is the id, or the beginning of a random one.

    The beginning of an id that a person chose may be another job's whole id, of which no record
    exists yet: `order-1` and `order-10`.
    """
    if given == task_id:
        return True
    name = task_id.removeprefix(INVALID_PREFIX)
    if name != task_id:
        return True  # named after a hash
    try:
        return str(uuid.UUID(name)) == name
    except ValueError:
        return False


def confirm(question: str, *, yes: bool) -> None:
    """Ask the user to confirm an action that may not be intended.

    Args:
        question: A question that `yes` answers.
        yes: `--yes` was given: the answer is known.

    Raises:
        ConfigurationError: The question cannot be asked, since this is no terminal.
        typer.Exit: The answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigurationError(
            f"{question} This is no terminal, so it cannot be answered here. Add --yes for yes."
        )
    if not typer.confirm(question, err=True):
        raise typer.Exit(1)


def short_ids(shown: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """The beginnings of ids by which a table names jobs: no other known id begins with them.

    Args:
        shown: The ids that the table shows.
        known: All ids that there are.
    """
    shown = list(shown)
    everything = sorted({*shown, *known})
    place = {task_id: index for index, task_id in enumerate(everything)}
    found = {}
    for task_id in shown:
        index = place[task_id]
        neighbours = everything[max(0, index - 1) : index] + everything[index + 1 : index + 2]
        length = max((_in_common(task_id, each) + 1 for each in neighbours), default=0)
        length = max(length, SHOWN)
        # A few extra characters are easier than an id that has to be completed by hand.
        found[task_id] = task_id if len(task_id) <= length + 4 else task_id[:length]
    return found


def _in_common(one: str, other: str) -> int:
    length = 0
    for first, second in zip(one, other, strict=False):
        if first != second:
            break
        length += 1
    return length


def _several(found: Collection[str]) -> str:
    names = ", ".join(sorted(found)[:_NAMED_AT_MOST])
    count = f"{len(found)} ids" if len(found) < MOST_MATCHES else "many ids"
    return f"{count} ({names}{', …' if len(found) > _NAMED_AT_MOST else ''})"
