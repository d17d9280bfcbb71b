"""The intake of a file of conversations: every row is used, or named with the reason why not."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from conversations.cleaning import Conversation, LeftOut, conversations_of
from conversations.reading import Row, rows_of
from utils.wording import counted

FEW = 100
"""Fewer conversations than this are warned of."""
MOST_ROWS = 20
"""Rows that a report names for one reason; the others are counted."""


@dataclasses.dataclass
class Reasons:
    """Rows by the reason that applies to them: how many, and the numbers of the first."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rows: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def add(self, number: int, reason: str) -> None:
        """Note a reason for a row."""
        self.counts[reason] += 1
        first = self.rows.setdefault(reason, [])
        if len(first) < MOST_ROWS:
            first.append(number)

    def listed(self) -> list[dict[str, Any]]:
        """For the report, the most frequent reason first."""
        return [
            {"reason": reason, "count": count, "rows": self.rows[reason]}
            for reason, count in self.counts.most_common()
        ]

    @property
    def total(self) -> int:
        """How many rows have a reason."""
        return self.counts.total()


@dataclasses.dataclass
class Intake:
    """The content of a file of conversations.

    Attributes:
        training, held_out: The conversations of the two parts.
        left_out: Conversations that are not used.
        changed: Conversations that the cleaning changed.
        warnings: Sentences about the whole.
        rows: Rows of the file.
    """

    training: list[Conversation] = dataclasses.field(default_factory=list)
    held_out: list[Conversation] = dataclasses.field(default_factory=list)
    left_out: Reasons = dataclasses.field(default_factory=Reasons)
    changed: Reasons = dataclasses.field(default_factory=Reasons)
    warnings: list[str] = dataclasses.field(default_factory=list)
    rows: int = 0

    @property
    def used(self) -> int:
        """Conversations that are used."""
        return len(self.training) + len(self.held_out)

    def report(self) -> dict[str, Any]:
        """The intake as JSON values."""
        return {
            "rows": self.rows,
            "used": self.used,
            "training": len(self.training),
            "held_out": len(self.held_out),
            "left_out": self.left_out.listed(),
            "changed": self.changed.listed(),
            "warnings": list(self.warnings),
        }


def take_in(
    path: Path,
    *,
    validation: Path | None,
    train_on: str,
    system_prompt: str,
    redact: bool,
    validation_split: float,
    seed: int,
) -> Intake:
    """Read, clean and split a file of conversations.

    Args:
        path: The file.
        validation: Held-out conversations; None to hold out a part of `path`.
        train_on, system_prompt, redact: See `conversations_of`.
        validation_split: The part to hold out without a validation file.
        seed: Seed of the split.

    Raises:
        UnreadableFile: A file holds no rows.
    """
    intake = Intake()
    how = {"train_on": train_on, "system_prompt": system_prompt, "redact": redact}
    found = _distinct(_read(path, intake, how), intake, "is a duplicate of another row")
    if validation:
        held_out = _distinct(_read(validation, intake, how), intake, "is a duplicate")
        known = {_digest(each.key) for each in found}
        for each in held_out:
            if _digest(each.key) in known:
                intake.left_out.add(each.number, "is held out and also in the training file")
            else:
                intake.held_out.append(each)
        intake.training = found
    else:
        intake.training, intake.held_out = split(found, validation_split, seed)
    _warn(intake)
    return intake


def _read(path: Path, intake: Intake, how: dict[str, Any]) -> Iterable[Conversation]:
    for row in rows_of(path):
        intake.rows += 1
        if not isinstance(row, Row):
            intake.left_out.add(row.number, row.reason)
            continue
        for found in conversations_of(row.number, row.values, **how):
            if isinstance(found, LeftOut):
                intake.left_out.add(row.number, str(found))
                continue
            for note in found.notes:
                intake.changed.add(row.number, note)
            yield found


def _distinct(found: Iterable[Conversation], intake: Intake, reason: str) -> list[Conversation]:
    seen: set[bytes] = set()
    kept = []
    for each in found:
        if (digest := _digest(each.key)) in seen:
            intake.left_out.add(each.number, reason)
        else:
            seen.add(digest)
            kept.append(each)
    return kept


def split(
    found: Sequence[Conversation], part: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Hold out a part, by group: no group is on both sides. Both keep the order of the file.

    Questions that are asked word for word in several conversations stay together, too.
    """
    groups: dict[str, list[int]] = {}
    for index, each in enumerate(found):
        groups.setdefault(each.group or each.key.rpartition("\x1e")[0], []).append(index)
    wanted = round(part * len(found)) if part else 0
    if part and len(groups) > 1:
        wanted = max(wanted, 1)
    order = sorted(groups, key=lambda name: _digest(f"{seed}\x1e{name}"))
    held: set[int] = set()
    for name in order[: len(order) - 1]:
        if len(held) >= wanted:
            break
        held.update(groups[name])
    training = [each for index, each in enumerate(found) if index not in held]
    return training, [each for index, each in enumerate(found) if index in held]


def _warn(intake: Intake) -> None:
    answers = {
        turn.text for each in intake.training for turn in each.turns if turn.role == "assistant"
    }
    if 0 < intake.used < FEW:
        intake.warnings.append(
            f"There are only {counted(intake.used, 'usable conversation')}; {FEW} or more are "
            "recommended."
        )
    if len(answers) == 1 and len(intake.training) > 1:
        intake.warnings.append("All answers are alike: the model learns only one sentence.")
    if intake.training and not intake.held_out:
        intake.warnings.append(
            "No conversation is held out, so that the effect on new questions is not measured."
        )


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]
