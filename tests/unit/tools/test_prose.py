"""The prose check finds the words of its list where people read them, and nothing in code."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import prose


def _words(text: str) -> list[str]:
    return [each.word for each in prose.check("cli/page.py", 1, text)]


@pytest.mark.parametrize(
    "text",
    [
        "What a worker knows.",
        "A claim. What was made is kept.",
        "Whoever publishes decides: nothing follows.",
        "**Where CUDA is missing**, the CPU trains.",
        "what a worker knows is on the page",
    ],
)
def test_a_sentence_that_opens_with_a_free_relative_is_found(text: str) -> None:
    assert prose.RELATIVE in _words(text)


@pytest.mark.parametrize(
    "text",
    [
        "What is in the queue? Run `jobs`.",
        "The page shows what a worker knows.",
        "`tell()` and {somebody} are code.",
        "Leave the record alone. A stand-alone server.",
        "See https://example.com/beside for more.",
    ],
)
def test_plain_sentences_and_code_pass(text: str) -> None:
    assert not _words(text)


def test_a_finding_names_the_line_and_the_remedy() -> None:
    (finding,) = prose.check("cli/page.py", 3, "First line.\nThe worker tells the backend.")
    assert str(finding).startswith("cli/page.py:4: tell: write `report`")
    assert finding.room == "cli" and prose.room_of("README.md") == "root"


def test_comments_docstrings_errors_and_test_names_are_read_and_code_is_not() -> None:
    source = (
        "# It tells\n# nobody.\n"
        'def test_it_lies_here():\n    """Mended."""\n'
        "    raise Error(f'the file {beside} is said to be gone', 'alone')\n"
    )
    found = [
        each
        for line, text in prose.texts("cli/x.py", source)
        for each in prose.check("", line, text)
    ]
    assert sorted((each.line, each.word) for each in found) == [
        (1, "tell"),
        (2, "nobody"),
        (3, "lie"),
        (4, "mend"),
        (5, "say"),
    ]


def test_a_name_with_a_word_that_the_code_does_not_use_is_found_unless_its_form_is_fixed() -> None:
    source = (
        "def pictures_in(pictures, path):\n"
        "    first_picture = row['pictures_used']\n"
        "    return folder / 'picture_folder'\n"
        "class PictureFolder:\n    picture_left_out: int\n"
    )
    assert list(prose.texts("cli/x.py", source)) == [
        (1, "pictures in"),
        (4, "Picture Folder"),
        (2, "first picture"),
        (3, "picture folder"),
    ]
    assert (3, "picture folder") not in list(prose.texts("tests/x.py", source))


def test_a_string_in_a_test_is_data() -> None:
    source = '"""Module."""\nPROMPT = "somebody lies beside a river"\n'
    assert [text for _, text in prose.texts("tests/x.py", source)] == ["Module."]


def test_paragraphs_and_cells_of_markdown_are_read_without_blocks_of_code() -> None:
    source = "# Head\n\nOne\nparagraph.\n\n```\ntell me\n```\n\n| a | What b |\n"
    assert list(prose.texts("docs/x.md", source)) == [
        (1, "Head"),
        (3, "One\nparagraph."),
        (10, "a"),
        (10, "What b"),
    ]


def test_limits_only_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text("[a]\nb = 1\n\n[tool.prose.limits]\ncli = 4\ndocs = 2\n\n[c]\nd = 1\n", "utf-8")
    monkeypatch.setattr(prose, "SETTINGS", file)
    prose.tighten({"cli": 3, "jobs": 5})
    assert prose.limits() == {"cli": 3}
    assert file.read_text("utf-8").endswith('[tool.prose.limits]\n"cli" = 3\n\n[c]\nd = 1\n')
