"""The time of an order, by which the later one's model stays."""

from __future__ import annotations

import pytest

from consumer.publishing.order_time import instant, order_time

EARLY, LATE = "2026-01-20T08:00:00Z", "2026-01-20T12:00:00+00:00"


@pytest.mark.parametrize(
    ("said", "recorded", "counts"),
    [
        (EARLY, LATE, EARLY),
        (LATE, EARLY, EARLY),  # a publisher's clock that runs ahead has no advantage
        ("yesterday", LATE, LATE),
        ("2026-01-20T17:00:00+09:00", LATE, EARLY),
        ("2026-01-20T08:00:00", LATE, EARLY),  # without a zone it is UTC
    ],
)
def test_the_time_of_an_order_is_that_of_its_message_but_never_later_than_its_record(
    said: str, recorded: str, counts: str
) -> None:
    assert order_time(said, recorded) == instant(counts)


@pytest.mark.parametrize("text", [None, "", "soon", "0001-01-01T00:00:00+14:00"])
def test_an_unreadable_time_is_ignored(text: str | None) -> None:
    assert instant(text) is None
