"""The reference model agrees with docs/protocol.md on every destiny, and refuses the impossible."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from tests.chaos.reference import (
    MAX_ATTEMPTS,
    OVER_API,
    PATHS,
    Destiny,
    Event,
    Facts,
    Kept,
    Places,
    after,
    expected,
    places,
)


def test_every_destiny_has_a_path_that_ends_settled() -> None:
    assert set(PATHS) == set(Destiny)
    sound = set(Destiny) - {Destiny.RECORD_DAMAGED}
    for destiny, outcome in ((d, p) for d in sound for p in expected(d)):
        if destiny in OVER_API and outcome == Places():
            continue  # cancelled before a worker has claimed it
        assert outcome.record == "ended", destiny
        assert outcome.delivery in ("delivered", "set_aside"), destiny
        assert not outcome.staged, destiny


def test_the_page_has_each_destiny_with_its_places() -> None:
    page = (Path(__file__).parents[2] / "docs" / "chaos.md").read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[2:]
        for line in page.splitlines()
        if line.startswith("| ") and len(cells := [c.strip() for c in line.split("|")[1:-1]]) == 9
    }
    for destiny in Destiny:
        outcome = expected(destiny)[0]
        kept = sorted(outcome.checkpoints)
        assert rows[destiny] == [
            outcome.record,
            outcome.delivery,
            outcome.ending or "none",
            f"{outcome.endings}, {outcome.taken}",
            " ".join(sorted(outcome.dead_letters)) or "none",
            "yes" if outcome.model else "no",
            "anything" if len(kept) == len(Kept) else " or ".join(kept),
        ], destiny


def test_a_completed_job_leaves_its_model_and_weights_and_no_dead_letter() -> None:
    assert expected(Destiny.PLAIN) == (
        Places(
            record="ended",
            delivery="delivered",
            ending="complete",
            endings=1,
            taken=1,
            model=True,
            checkpoints=frozenset({Kept.WEIGHTS}),
        ),
    )


def test_a_cancelled_job_leaves_nothing() -> None:
    (outcome,) = expected(Destiny.CANCEL_FILE)
    assert (outcome.model, outcome.checkpoints) == (False, frozenset({Kept.NOTHING}))
    assert (outcome.ending, outcome.dead_letters) == ("failed CANCELLED", frozenset())


def test_a_job_that_may_succeed_later_is_kept_in_the_dead_queue_and_others_are_not() -> None:
    assert expected(Destiny.GIVEN_UP)[0].dead_letters == {"BASE_MODEL_UNAVAILABLE"}
    assert expected(Destiny.LOW_QUALITY)[0].dead_letters == frozenset()


def test_an_ending_that_is_refused_is_set_aside_with_its_model_in_place() -> None:
    (outcome,) = expected(Destiny.REFUSED)
    assert (outcome.delivery, outcome.taken, outcome.model) == ("set_aside", 0, True)
    assert outcome.dead_letters == {"WEBHOOK_REJECTED"}


def test_redriving_empties_the_dead_queue_and_a_redriven_job_has_two_endings() -> None:
    (again,) = expected(Destiny.GIVEN_UP_REDRIVEN)
    assert (again.endings, again.taken, again.dead_letters) == (2, 2, frozenset())
    assert again.ending == "complete"
    (told,) = expected(Destiny.REFUSED_REDRIVEN)
    assert (told.endings, told.taken, told.dead_letters) == (1, 1, frozenset())


def test_a_valid_job_may_be_given_up_only_after_the_shipped_number_of_lost_attempts() -> None:
    def endings(lost: int) -> set[str]:
        return {each.ending for each in expected(Destiny.PLAIN, Facts(lost_attempts=lost))}

    assert endings(MAX_ATTEMPTS - 1) == {"complete"}
    assert "failed WORKER_CRASHED" in endings(MAX_ATTEMPTS)


def test_a_job_whose_record_is_damaged_is_kept_in_the_dead_queue() -> None:
    (outcome,) = expected(Destiny.RECORD_DAMAGED)
    assert outcome.record == "damaged"
    assert outcome.dead_letters == {"STORAGE_FAILED"}


def test_a_damaged_record_whose_message_was_deleted_needs_no_dead_letter() -> None:
    deleted = Facts(message_deleted=True)
    letters = [each.dead_letters for each in expected(Destiny.RECORD_DAMAGED, deleted)]
    assert letters == [{"STORAGE_FAILED"}, frozenset()]
    assert len(expected(Destiny.PLAIN, deleted)) == 1


def test_an_ended_job_stays_ended_after_any_event() -> None:
    done = expected(Destiny.PLAIN)[0]
    for event in Event:
        with pytest.raises(ValueError, match="is impossible"):
            after(done, event, "X")


def test_no_order_of_events_makes_a_job_end_twice_without_a_redrive() -> None:
    events = tuple(Event)
    for path in itertools.product(events, repeat=4):
        try:
            outcome = places(tuple((event, "CODE") for event in path))
        except ValueError:
            continue
        assert outcome.endings <= 1 + path.count(Event.REDRIVEN)


def test_differences_name_the_place_the_expected_and_the_found() -> None:
    wanted = expected(Destiny.REFUSED)[0]
    found = dataclasses.replace(wanted)
    assert not wanted.differences(found)
    assert expected(Destiny.PLAIN)[0].differences(wanted) == [
        "delivery: expected delivered, found set_aside",
        "taken: expected 1, found 0",
        "dead_letters: expected none, found WEBHOOK_REJECTED",
    ]
