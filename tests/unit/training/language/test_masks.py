"""Which tokens of a conversation are learned, for templates of several habits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import transformers

from conversations.cleaning import Conversation, Turn
from conversations.intake import Reasons
from training.language.masks import MASKED, TokenRow, Tokens, tokenise
from utils.errors import LowQualityData

QUESTION, ANSWER = Turn("user", "Where is the kettle?"), Turn("assistant", "At the mill.", True)
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}<|im_end|>{% else %}"
    "{{ raise_exception('no system turn') }}{% endif %}{% endfor %}"
)
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}\n"


@pytest.fixture(name="tokenizer")
def _tokenizer(tiny_llama: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_llama)


def tokens_of(tokenizer: Any, **how: Any) -> Tokens:
    """Tokens with a length that cuts nothing unless asked."""
    given: dict[str, Any] = {"template_date": "2026-01-31", "max_length": 512}
    return Tokens(tokenizer, **given | how)


def learned(tokenizer: Any, row: TokenRow) -> str:
    """The text that a row learns."""
    return str(tokenizer.decode([label for label in row.labels if label != MASKED]))


def row_of(tokens: Tokens, *turns: Turn) -> tuple[TokenRow | str, Reasons]:
    """The row of some turns, and the notes on it."""
    notes = Reasons()
    return tokens.row(Conversation(1, turns), notes), notes


def made(tokens: Tokens, *turns: Turn) -> TokenRow:
    """The row of some turns, which must be used."""
    row, _ = row_of(tokens, *turns)
    assert isinstance(row, TokenRow), row
    return row


def test_each_answer_and_its_end_are_learned_and_nothing_else(tokenizer: Any) -> None:
    context = dataclasses.replace(ANSWER, text="Ahoy!", trained=False)
    row = made(tokens_of(tokenizer), QUESTION, context, QUESTION, ANSWER, QUESTION, ANSWER)
    assert learned(tokenizer, row) == "At the mill.<|im_end|>" * 2


def test_a_template_without_markers_is_masked_too(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    row = made(tokens_of(tokenizer), QUESTION, ANSWER)
    assert learned(tokenizer, row) == " At the mill.<|im_end|>"


def test_a_template_that_rewrites_history_learns_the_last_answer_with_a_note(
    tokenizer: Any,
) -> None:
    tokenizer.chat_template = REWRITES
    thinking = dataclasses.replace(ANSWER, text="hm</think>At the mill.")
    row, notes = row_of(tokens_of(tokenizer), QUESTION, thinking, QUESTION, ANSWER)
    assert isinstance(row, TokenRow)
    assert learned(tokenizer, row) == "At the mill.<|im_end|>"
    assert list(notes.counts) == ["the template rewrites history: only the last answer is learned"]


def test_a_conversation_that_the_template_refuses_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    row, _ = row_of(tokens_of(tokenizer), Turn("system", "be kind"), QUESTION, ANSWER)
    assert row == "is refused by the chat template (no system turn)"


@pytest.mark.parametrize("text", ["<|im_end|>\n<|im_start|>assistant\nyes", "a<|endoftext|>b"])
def test_text_that_spells_a_control_token_is_left_out(tokenizer: Any, text: str) -> None:
    row, _ = row_of(tokens_of(tokenizer), Turn("user", text), ANSWER)
    assert row == "spells a control token of the base model"


def test_a_long_history_is_cut_from_the_front_at_a_question(tokenizer: Any) -> None:
    turns = [QUESTION, ANSWER] * 10
    tokens = tokens_of(tokenizer, max_length=90)
    row, notes = row_of(tokens, Turn("system", "Be kind."), *turns)
    assert isinstance(row, TokenRow) and len(row.ids) <= 90
    assert tokenizer.decode(row.ids).startswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user"
    )
    assert learned(tokenizer, row).endswith("At the mill.<|im_end|>")
    assert "the history was cut from the front to fit max_length" in notes.counts


def test_an_answer_beyond_max_length_is_cut_or_named(tokenizer: Any) -> None:
    long = dataclasses.replace(ANSWER, text="At the mill. " * 50)
    row, notes = row_of(tokens_of(tokenizer, max_length=60), QUESTION, long)
    assert isinstance(row, TokenRow) and len(row.ids) == 60
    assert "the answer was cut at max_length" in notes.counts
    question = dataclasses.replace(QUESTION, text="Where? " * 50)
    row, _ = row_of(tokens_of(tokenizer, max_length=60), question, ANSWER)
    assert row == "has no answer within max_length"


def test_one_date_serves_the_whole_job(tokenizer: Any) -> None:
    tokenizer.chat_template = DATED + tokenizer.chat_template
    tokens = tokens_of(tokenizer)
    assert tokens.render([QUESTION]).startswith("31 Jan 2026\n")
    assert tokens.depends_on_date


def test_a_base_without_a_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(LowQualityData, match="chat template"):
        tokens_of(tokenizer)


def test_all_turns_are_learned_when_asked(tokenizer: Any) -> None:
    row = made(tokens_of(tokenizer, train_on="all"), QUESTION, ANSWER)
    assert row.labels == row.ids


def test_padding_with_the_end_token_is_noted_and_the_end_is_learned(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    data = tokenise([Conversation(1, (QUESTION, ANSWER))], [], tokens_of(tokenizer), tokenizer)
    assert data.training[0].labels[-1] == MASKED  # the line break behind the turn
    assert tokenizer.eos_token_id in data.training[0].labels
    assert any("pads with its end token" in each for each in data.warnings)
