"""Every row of an awkward file is used, or named with its reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conversations import reading
from conversations.intake import Intake, take_in
from conversations.reading import UnreadableFile

PAIR = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def taken(path: Path, **how: Any) -> Intake:
    """The intake of a file, with nothing held out unless asked."""
    defaults: dict[str, Any] = {
        "validation": None,
        "train_on": "answers",
        "system_prompt": "",
        "redact": False,
        "validation_split": 0.0,
        "seed": 1,
    }
    return take_in(path, **defaults | how)


def file_of(tmp_path: Path, *rows: Any, encoding: str = "utf-8") -> Path:
    """A file of rows as JSON Lines."""
    path = tmp_path / "data.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode(encoding))
    return path


def said(intake: Intake) -> list[list[tuple[str, str, bool]]]:
    """The turns of each training conversation."""
    return [[(t.role, t.text, t.trained) for t in each.turns] for each in intake.training]


def reasons(intake: Intake) -> dict[str, list[int]]:
    """Reasons and the rows that they name."""
    return dict(intake.left_out.rows)


def test_all_known_forms_are_read_from_one_mixed_file(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        PAIR,
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": "c", "completion": "d"},
        {"instruction": "e", "input": "f", "output": "g"},
        {"conversations": [PAIR | {"platform": "x"}, {"messages": PAIR["messages"] * 2}]},
    )
    intake = taken(path)
    assert [[text for _, text, _ in each] for each in said(intake)] == [
        ["hi", "yo"],
        ["a", "b"],
        ["c", "d"],
        ["e\n\nf", "g"],
        ["hi", "yo", "hi", "yo"],
    ]
    assert reasons(intake) == {"is a duplicate of another row": [5]}


def test_the_document_of_a_chat_service_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "export.json"
    path.write_text(json.dumps({"org_id": "o", "conversations": [PAIR]}, indent=2), "utf-8")
    assert len(taken(path).training) == 1
    path.write_text(json.dumps([PAIR, 7], indent=2), "utf-8")
    intake = taken(path)
    assert len(intake.training) == 1 and reasons(intake) == {"is not a JSON object": [2]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark_are_read(tmp_path: Path, encoding: str) -> None:
    row = {"prompt": "grüß dich", "completion": "안녕"}
    intake = taken(file_of(tmp_path, row, PAIR, encoding=encoding))
    assert [each[0][1] for each in said(intake)] == ["grüß dich", "hi"]


def test_content_that_is_no_plain_text_never_ends_a_file(tmp_path: Path) -> None:
    def asked(content: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": content}, PAIR["messages"][1]]}

    intake = taken(
        file_of(
            tmp_path,
            asked([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]),
            asked(42),
            asked(True),
            asked([{"type": "image_url", "image_url": "x"}]),
            {
                "messages": [
                    *PAIR["messages"],
                    {"role": "assistant", "content": None, "tool_calls": []},
                ]
            },
            asked({"text": "x"}),
        )
    )
    assert [each[0][1] for each in said(intake)] == ["one two", "hi"]
    assert reasons(intake) == {
        "has content that is not text": [2, 3, 6],
        "has content with parts that are not text": [4],
    }
    texts = str(said(intake))
    assert "None" not in texts and "[{'type'" not in texts


def test_numbers_of_pairs_keep_their_spelling(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"prompt": "n?", "completion": 1e5}\n{"prompt": "t?", "completion": true}\n'
        '{"instruction": "null?", "output": "null"}\n',
        "utf-8",
    )
    assert [each[1][1] for each in said(taken(path))] == ["1e5", "true", "null"]


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(PAIR).encode()
    path.write_bytes(
        b"\n".join(
            [
                good,
                b"{broken",
                b"[1, 2]",
                b'{"prompt": "\xff", "completion": "x"}',
                b"",
                b'{"a": NaN}',
                b'{"x": ' + b"[" * 100_000 + b"}",
                b'{"other": 1}',
            ]
        )
    )
    intake = taken(path)
    assert len(intake.training) == 1 and intake.rows == 7
    assert reasons(intake) == {
        "is not valid JSON": [2, 6, 7],
        "is not a JSON object": [3],
        "is not text in UTF-8": [4],
        "has no known form; its fields are other": [8],
    }


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"question,answer\n1,2\n", "question,answer"),
        (b"[broken", "not valid JSON"),
        (b"\x89PNG\r\n", "not JSON Lines"),
    ],
)
def test_a_file_that_is_none_is_refused_with_what_was_seen(
    tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "data"
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match=says):
        taken(path)


def test_conversations_are_cleaned_and_each_change_is_counted(tmp_path: Path) -> None:
    turns = [
        {"role": "assistant", "content": "welcome"},
        {"role": "human", "content": "one"},
        {"role": "user", "content": "two\u0000"},
        {"role": "bot", "content": "  e\u0301 "},
        {"role": "user", "content": " "},
        {"role": "user", "content": "bye"},
    ]
    intake = taken(file_of(tmp_path, {"messages": turns}))
    assert said(intake) == [
        [("assistant", "welcome", False), ("user", "one\ntwo", False), ("assistant", "é", True)]
    ]
    assert set(intake.changed.counts) == {
        "an answer before the first question is context only",
        "turns of one role were joined",
        "control characters were removed",
        "an empty turn was dropped",
        "a turn after the last answer was cut",
    }


def test_weights_and_train_on_choose_the_answers(tmp_path: Path) -> None:
    turns = [
        *PAIR["messages"],
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "ok", "weight": 0},
    ]
    path = file_of(tmp_path, {"messages": turns})
    assert [t[2] for t in said(taken(path))[0]] == [False, True, False, False]
    assert reasons(taken(path, train_on="last_answer")) == {
        "has no answer to learn: no answer follows a question, or all weights are 0": [1]
    }


def test_rows_without_an_answer_are_named(tmp_path: Path) -> None:
    intake = taken(
        file_of(
            tmp_path,
            {"messages": []},
            {"messages": PAIR["messages"][:1]},
            {"messages": [{"role": "wizard", "content": "x"}]},
            {"prompt": "a", "completion": ""},
        )
    )
    assert reasons(intake) == {
        "has no answer": [1, 2, 4],
        "has the unknown role 'wizard'": [3],
    }


def test_no_conversation_is_trained_and_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i % 30}", "completion": f"a{i}", "group": None} for i in range(90)]
    intake = taken(file_of(tmp_path, *rows), validation_split=0.2)
    questions = [
        {each.turns[0].text for each in part} for part in (intake.training, intake.held_out)
    ]
    assert not questions[0] & questions[1]
    assert 15 <= len(intake.held_out) <= 25
    again = taken(file_of(tmp_path, *rows), validation_split=0.2)
    assert again.held_out == intake.held_out


def test_held_out_rows_that_are_trained_are_left_out(tmp_path: Path) -> None:
    training = file_of(tmp_path, PAIR, {"prompt": "a", "completion": "b"})
    other = tmp_path / "held_out.jsonl"
    other.write_text(
        json.dumps({"prompt": " A", "completion": "b"})
        + "\n"
        + json.dumps({"prompt": "c", "completion": "d"}),
        "utf-8",
    )
    intake = taken(training, validation=other)
    assert len(intake.held_out) == 1
    assert reasons(intake) == {"is held out and also in the training file": [1]}


def test_secrets_are_replaced_when_asked(tmp_path: Path) -> None:
    row = {
        "prompt": "mail me@example.org or +49 170 1234567",
        "completion": "the key is sk-abcdefghijklmnop1234",
    }
    (turns,) = said(taken(file_of(tmp_path, row), redact=True))
    assert [text for _, text, _ in turns] == ["mail [e-mail] or [telephone]", "the key is [key]"]


def test_a_long_line_is_named_and_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(PAIR).encode() + b"\n" + b'{"prompt": "')
        file.seek(1024**3, 1)  # a hole of zeros, which take no disk
        file.write(b'"}\n' + json.dumps({"prompt": "a", "completion": "b"}).encode())
    code = f"""
from pathlib import Path
from conversations.intake import take_in
intake = take_in(Path({str(path)!r}), validation=None, train_on="answers", system_prompt="",
                 redact=False, validation_split=0.0, seed=1)
assert len(intake.training) == 2 and intake.left_out.listed()[0]["rows"] == [2], intake.report()
# The peak of this program: getrusage would count the memory of the process that started it.
print(next(each.split()[1] for each in open("/proc/self/status") if each.startswith("VmHWM")))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 400 * 1024  # KiB


def test_a_large_document_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_DOCUMENT", 10)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([PAIR]), "utf-8")
    with pytest.raises(UnreadableFile, match="JSON Lines"):
        taken(path)


def test_few_and_uniform_answers_are_warned_of(tmp_path: Path) -> None:
    intake = taken(file_of(tmp_path, *({"prompt": str(i), "completion": "ok"} for i in range(5))))
    assert any("100 or more" in each for each in intake.warnings)
    assert any("All answers are alike" in each for each in intake.warnings)
