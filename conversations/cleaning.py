"""Turns a row of any known form into conversations that a language model can learn from.

The forms, found by their content: OpenAI's chat (`messages`), an export of chats
(`conversations[].messages`), ShareGPT (`conversations[{from, value}]`), `prompt`/`completion`, and
Alpaca (`instruction`, `input`, `output`).
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conversations.reading import Literal

ROLES = {
    **dict.fromkeys(("user", "human", "person", "customer", "prompter", "player"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "ai", "chatgpt", "agent"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SECRETS = (
    ("e-mail", re.compile(r"[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+")),
    ("key", re.compile(r"\b(?:sk|pk|ghp|gho|hf|xox[abp])[-_][A-Za-z0-9_-]{16,}\b")),
    ("telephone", re.compile(r"(?<![\w.])\+?\d[\d ()/-]{7,16}\d(?![\w.])")),
)


class LeftOut(ValueError):
    """A row is not used; the text is the reason."""


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One turn: `system`, `user`, `assistant` or `tool`, its text, and whether it is trained."""

    role: str
    text: str
    trained: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """A cleaned conversation.

    Attributes:
        number: Number of its row in the file.
        turns: Ends with an answer.
        group: Conversations of one group are trained on or held out together.
        notes: Changes that the cleaning made.
    """

    number: int
    turns: tuple[Turn, ...]
    group: str = ""
    notes: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Equal for conversations that differ in case and blanks only."""
        said = ((turn.role, " ".join(turn.text.split()).casefold()) for turn in self.turns)
        return "\x1e".join(f"{role}\x1f{text}" for role, text in said)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as a chat template reads them."""
        return [{"role": turn.role, "content": turn.text} for turn in self.turns]


def conversations_of(
    number: int, values: Mapping[str, Any], *, train_on: str, system_prompt: str, redact: bool
) -> Iterator[Conversation | LeftOut]:
    """The conversations of one row, cleaned.

    Args:
        number: The row's number.
        values: The row.
        train_on: `answers`, `last_answer` or `all`.
        system_prompt: Added to conversations that have none.
        redact: Replace e-mail addresses, keys and telephone numbers.
    """
    group = values.get("group")
    try:
        found = list(_messages_of(values))
    except LeftOut as reason:
        yield reason
        return
    for messages in found:
        try:
            turns = [_turn(message) for message in messages]
            yield _cleaned(
                number,
                turns,
                group=str(group) if group is not None else "",
                train_on=train_on,
                system_prompt=system_prompt,
                redact=redact,
            )
        except LeftOut as reason:
            yield reason


# ---- forms ---------------------------------------------------------------------------------------


def _messages_of(values: Mapping[str, Any]) -> Iterator[Sequence[Any]]:
    if isinstance(messages := values.get("messages"), list):
        yield messages
    elif isinstance(several := values.get("conversations"), list):
        if several and all(isinstance(each, dict) and "messages" in each for each in several):
            for each in several:
                yield each["messages"] if isinstance(each["messages"], list) else []
        else:
            yield several
    elif isinstance(several := values.get("conversation"), list):
        yield several
    elif "prompt" in values and ("completion" in values or "response" in values):
        answer = values["completion"] if "completion" in values else values["response"]
        if isinstance(values["prompt"], list) and isinstance(answer, list):
            yield [*values["prompt"], *answer]
        else:
            yield _pair(values["prompt"], answer, values.get("system"))
    elif "instruction" in values and "output" in values:
        extra = _written(values.get("input"), "input")
        asked = _written(values["instruction"], "instruction")
        yield _pair(f"{asked}\n\n{extra}" if extra else asked, values["output"], None)
    else:
        names = ", ".join(sorted(map(str, values))[:8]) or "none"
        raise LeftOut(f"has no known form; its fields are {names}"[:300])


def _pair(question: Any, answer: Any, system: Any) -> list[dict[str, Any]]:
    pair = [
        {"role": "user", "content": _written(question, "prompt")},
        {"role": "assistant", "content": _written(answer, "answer")},
    ]
    if system:
        pair.insert(0, {"role": "system", "content": _written(system, "system")})
    return pair


def _written(value: Any, name: str) -> str:
    """A cell as the file spells it; nothing becomes an empty text."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or isinstance(value, str):
        return str(value or "")
    raise LeftOut(f"has a {name} that is not text")


def _turn(message: Any) -> tuple[str, str, bool | None]:
    """Role, text and the weight that the message sets."""
    if not isinstance(message, dict):
        raise LeftOut("has a message that is not an object")
    spelt = message.get("role", message.get("from"))
    role = ROLES.get(str(spelt).strip().lower())
    if role is None:
        raise LeftOut(f"has the unknown role {str(spelt)[:40]!r}")
    if "content" in message:
        said = _content(message["content"])
    elif "value" in message:
        said = _written(message["value"], "value")
    else:
        said = _content(message.get("text"))
    weight = message.get("weight")
    return role, said, None if weight is None else str(weight) not in ("0", "0.0", "False")


def _content(value: Any) -> str:
    """The text of a message's content: text parts are joined, and null is empty."""
    if value is None:
        return ""
    if isinstance(value, str) and not isinstance(value, Literal):
        return value
    if isinstance(value, list):
        if not all(_is_text_part(part) for part in value):
            raise LeftOut("has content with parts that are not text")
        return "".join(part if isinstance(part, str) else part["text"] for part in value)
    raise LeftOut("has content that is not text")


def _is_text_part(part: Any) -> bool:
    if isinstance(part, dict):
        said = part.get("text")
        return part.get("type", "text") == "text" and _is_text_part(said)
    return isinstance(part, str) and not isinstance(part, Literal)


# ---- cleaning ------------------------------------------------------------------------------------


def _cleaned(
    number: int,
    found: Sequence[tuple[str, str, bool | None]],
    *,
    group: str,
    train_on: str,
    system_prompt: str,
    redact: bool,
) -> Conversation:
    notes: list[str] = []
    turns: list[Turn] = []
    for role, raw, weight in found:
        said = _clean_text(raw, notes, redact=redact)
        if not said:
            notes.append("an empty turn was dropped")
            continue
        trained = role == "assistant" and weight is not False
        if turns and turns[-1].role == role and role != "tool":
            notes.append("turns of one role were joined")
            before = turns.pop()
            turns.append(Turn(role, f"{before.text}\n{said}", before.trained and trained))
        else:
            turns.append(Turn(role, said, trained))
    turns = _system_first(turns, notes, system_prompt)
    while turns and turns[-1].role != "assistant":
        notes.append("a turn after the last answer was cut")
        turns.pop()
    turns = _trained_turns(turns, notes, train_on)
    if not any(turn.role == "assistant" for turn in turns):
        raise LeftOut("has no answer")
    if not any(turn.trained for turn in turns):
        raise LeftOut("has no answer to learn: no answer follows a question, or all weights are 0")
    return Conversation(number, tuple(turns), group, tuple(dict.fromkeys(notes)))


def _clean_text(raw: str, notes: list[str], *, redact: bool) -> str:
    said = unicodedata.normalize("NFC", _SURROGATE.sub("\ufffd", raw)).replace("\r\n", "\n")
    without = _CONTROL.sub("", said)
    if without != said:
        notes.append("control characters were removed")
    if redact:
        for name, pattern in _SECRETS:
            without, count = pattern.subn(f"[{name}]", without)
            notes.extend([f"{name} replaced"] * bool(count))
    return without.strip()


def _system_first(turns: list[Turn], notes: list[str], system_prompt: str) -> list[Turn]:
    """One system turn, in front."""
    systems = [turn.text for turn in turns if turn.role == "system"]
    others = [turn for turn in turns if turn.role != "system"]
    if len(systems) > 1 or (systems and turns[0].role != "system"):
        notes.append("system turns were joined in front")
    if not systems and system_prompt:
        systems = [system_prompt]
    joined: list[Turn] = []
    for turn in others:
        if joined and joined[-1].role == turn.role and turn.role != "tool":
            before = joined.pop()
            both = before.trained and turn.trained
            joined.append(Turn(turn.role, f"{before.text}\n{turn.text}", both))
        else:
            joined.append(turn)
    return [*([Turn("system", "\n".join(systems))] if systems else []), *joined]


def _trained_turns(turns: list[Turn], notes: list[str], train_on: str) -> list[Turn]:
    """Mark the turns that are trained. An answer before the first question is context."""
    asked, made = False, []
    last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    for index, turn in enumerate(turns):
        asked = asked or turn.role in ("user", "tool")
        trained = turn.trained and asked and (train_on != "last_answer" or index == last)
        if turn.role == "assistant" and not asked:
            notes.append("an answer before the first question is context only")
        made.append(dataclasses.replace(turn, trained=trained or train_on == "all"))
    return made
