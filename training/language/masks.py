"""Token rows with a mask: which tokens of a conversation are learned.

An answer's tokens are those between the rendered text up to its question (with the template's
prompt for an answer) and the rendered text up to its end. Padding is masked by its position, never
by a token's value.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

from conversations.cleaning import Conversation, Turn
from conversations.intake import Reasons
from utils.errors import LowQualityData

MASKED = -100


@dataclasses.dataclass(frozen=True, slots=True)
class TokenRow:
    """One row: its conversation's number, its token ids, and the ids to learn (`MASKED` if none).

    Attributes:
        prompt_tokens: Tokens in front of the first learned one.
    """

    number: int
    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def learned(self) -> int:
        """Tokens that are learned; the first token of a row is predicted from nothing."""
        return sum(label != MASKED for label in self.labels[1:])

    @property
    def prompt_tokens(self) -> int:
        """Tokens in front of the first learned one."""
        return next(i for i, label in enumerate(self.labels) if label != MASKED)


class _NotRendered(ValueError):
    """The template cannot render a conversation."""


class Tokens:
    """Renders and tokenises conversations with the chat template of a base model.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        template_date: Date that the template sees, `YYYY-MM-DD`.
        max_length: Longest row in tokens.
        train_on: `answers`, `last_answer` or `all`.
    """

    def __init__(
        self, tokenizer: Any, *, template_date: str, max_length: int, train_on: str = "answers"
    ) -> None:
        if not tokenizer.chat_template:
            raise LowQualityData(
                "The base model has no chat template. Choose a chat model (often named -Instruct "
                "or -Chat)."
            )
        self._tokenizer = tokenizer
        self._template = _compile_jinja_template(str(tokenizer.chat_template))
        self._now = datetime.datetime.fromisoformat(template_date)
        self._max_length, self._train_on = max_length, train_on
        added = {str(token) for token in tokenizer.get_added_vocab()}
        self._control = tuple(sorted(added | set(tokenizer.all_special_tokens)))
        self.ends = self._end_ids()

    def _end_ids(self) -> frozenset[int]:
        special = set(self._tokenizer.all_special_ids)
        named = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<turn|>")
        vocabulary = self._tokenizer.get_added_vocab()
        found = {vocabulary[name] for name in named if name in vocabulary}
        found |= (
            {self._tokenizer.eos_token_id} if self._tokenizer.eos_token_id is not None else set()
        )
        starts = {self._tokenizer.bos_token_id} - {self._tokenizer.eos_token_id}
        return frozenset((found & special | found) - starts)

    @property
    def depends_on_date(self) -> bool:
        """Whether the template prints a date."""
        template = str(self._tokenizer.chat_template)
        return "strftime_now" in template or "date_string" in template

    def render(self, turns: Sequence[Turn], *, ask: bool = False) -> str:
        """The text of some turns; with `ask` it ends with the template's prompt for an answer."""
        try:
            text = self._template.render(
                messages=[{"role": turn.role, "content": turn.text} for turn in turns],
                tools=None,
                documents=None,
                add_generation_prompt=ask,
                # transformers gives templates the clock of this moment.
                strftime_now=self._now.strftime,
                **self._tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            said = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
            raise _NotRendered(f"is refused by the chat template ({said})") from error
        return str(text)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def row(self, conversation: Conversation, notes: Reasons) -> TokenRow | str:
        """The token row of a conversation, or the reason why there is none."""
        number = conversation.number
        if any(sign in turn.text for turn in conversation.turns for sign in self._control):
            return "spells a control token of the base model"
        try:
            return self._fitted(conversation, notes)
        except _NotRendered as problem:
            notes.add(number, "the chat template refused the conversation")
            return str(problem)

    def _fitted(self, conversation: Conversation, notes: Reasons) -> TokenRow | str:
        """Cut a long history from the front, at a question, and at last the end of the answer."""
        turns = list(conversation.turns)
        number = conversation.number
        ids, labels = self._masked(turns, number, notes)
        while len(ids) > self._max_length and (shorter := _without_first_exchange(turns)):
            if not any(turn.trained for turn in shorter):
                break
            notes.add(number, "the history was cut from the front to fit max_length")
            turns = shorter
            ids, labels = self._masked(turns, number, notes)
        if len(ids) > self._max_length:
            notes.add(number, "the answer was cut at max_length")
            ids, labels = ids[: self._max_length], labels[: self._max_length]
        row = TokenRow(number, tuple(ids), tuple(labels))
        if not row.learned:
            return "has no answer within max_length"
        return row

    # pylint: disable-next=too-many-locals  # one for each part of a conversation
    def _masked(
        self, turns: list[Turn], number: int, notes: Reasons
    ) -> tuple[list[int], list[int]]:
        """Ids and labels. If the template rewrites history, only the last answer is learned."""
        whole = self.render(turns)
        encoded = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        if self._train_on == "all":
            return ids, list(ids)
        spans = self._spans(whole, turns)
        if spans is None:
            notes.add(number, "the template rewrites history: only the last answer is learned")
            last = max(index for index, turn in enumerate(turns) if turn.role == "assistant")
            asked = self.render(turns[:last], ask=True)
            if not whole.startswith(asked) or not turns[last].trained:
                raise _NotRendered("is rendered differently by the template with its last answer")
            spans = [(len(asked), len(whole))]
        labels = [MASKED] * len(ids)
        for start, end in spans:
            inside = [
                i for i, (left, right) in enumerate(offsets) if left >= start and right <= end
            ]
            inside = [i for i in inside if offsets[i][0] < offsets[i][1] or ids[i] in self.ends]
            ends = [i for i in inside if ids[i] in self.ends]
            if not ends:
                notes.add(number, "the end of the turn is not learned")
            for index in inside:
                if not ends or index <= ends[-1]:
                    labels[index] = ids[index]
        return ids, labels

    def _spans(self, whole: str, turns: list[Turn]) -> list[tuple[int, int]] | None:
        """Positions of the trained answers in the text; None if the template rewrites history."""
        spans = []
        for index, turn in enumerate(turns):
            if not turn.trained:
                continue
            before = self.render(turns[:index], ask=True)
            after = self.render(turns[: index + 1])
            if not whole.startswith(before) or not whole.startswith(after):
                return None
            spans.append((len(before), len(after)))
        return spans


def _without_first_exchange(turns: list[Turn]) -> list[Turn]:
    """The turns from the second question on, with the system turn; empty if there is none."""
    questions = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if len(questions) < 2:
        return []
    system = [turn for turn in turns if turn.role == "system"]
    return [*system, *turns[questions[1] :]]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenData:
    """The token rows of a job, with the facts for its report."""

    training: tuple[TokenRow, ...]
    held_out: tuple[TokenRow, ...]
    left_out: Reasons
    notes: Reasons
    warnings: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """Counts as JSON values."""
        lengths = sorted(len(row.ids) for row in self.training) or [0]
        return {
            "rows_trained": len(self.training),
            "rows_held_out": len(self.held_out),
            "tokens_seen": sum(lengths),
            "tokens_learned": sum(row.learned for row in self.training),
            "tokens_held_out": sum(row.learned for row in self.held_out),
            "longest": lengths[-1],
            "median_length": lengths[len(lengths) // 2],
            "left_out": self.left_out.listed(),
            "notes": self.notes.listed(),
            "warnings": list(self.warnings),
        }


def tokenise(
    training: Sequence[Conversation],
    held_out: Sequence[Conversation],
    tokens: Tokens,
    tokenizer: Any,
) -> TokenData:
    """Make the token rows of both parts; a conversation without one is named with its reason."""
    left_out, notes = Reasons(), Reasons()
    parts: list[tuple[TokenRow, ...]] = []
    for part in (training, held_out):
        rows = []
        for each in part:
            made = tokens.row(each, notes)
            if isinstance(made, TokenRow):
                rows.append(made)
            else:
                left_out.add(each.number, made)
        parts.append(tuple(rows))
    warnings = []
    if tokens.depends_on_date:
        warnings.append("The chat template prints a date; the job uses one date throughout.")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        warnings.append(
            "The tokenizer pads with its end token. Padding is masked by position, so that the end "
            "of an answer is still learned."
        )
    bos = tokenizer.bos_token_id
    if bos is not None and any(row.ids[:2] == (bos, bos) for row in parts[0]):
        warnings.append("The chat template prints the begin token twice.")
    return TokenData(parts[0], parts[1], left_out, notes, tuple(warnings))
