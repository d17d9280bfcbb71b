"""Counts and lists in sentences: singular, plural, and each reason once."""

from __future__ import annotations

import pytest

from utils.wording import MOST_NAMES, counted, grouped


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1200, "1,200 images")],
)
def test_a_noun_follows_its_number(number: int, words: str) -> None:
    assert counted(number, "image") == words


def test_a_noun_may_have_an_irregular_plural() -> None:
    assert (counted(1, "entry", "entries"), counted(2, "entry", "entries")) == (
        "1 entry",
        "2 entries",
    )


def test_equal_reasons_are_named_once_with_all_names() -> None:
    problems = [("a.jpg", "is not an image"), ("b.jpg", "is empty"), ("c.jpg", "is not an image")]
    assert grouped(problems, "image") == (
        "2 images: is not an image (a.jpg, c.jpg); b.jpg: is empty"
    )


def test_a_long_group_names_the_first_and_counts_the_others() -> None:
    problems = [(f"{number}.jpg", "is empty") for number in range(MOST_NAMES + 3)]
    words = grouped(problems, "image")
    assert words.startswith(f"{MOST_NAMES + 3} images: is empty (0.jpg, 1.jpg")
    assert words.endswith("9.jpg and 3 more)")
    assert "more" not in grouped(problems[:MOST_NAMES], "image")


def test_no_problems_give_an_empty_text() -> None:
    assert grouped([], "image") == ""
