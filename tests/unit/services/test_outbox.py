"""Publications on their way: order, delays, shorter forms, and the end."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from services.broker.outbox import FIRST_DELAY, LONGEST_DELAY, MAX_STRIKES, Backoff, Outbox, Parcel
from services.broker.settlement import BODY_BYTES, Publication, Queue
from tests.unit.services.fake_broker import (  # noqa: F401  # pylint: disable=unused-import
    Clock,
    clock_fixture,
    dead,
)
from utils.errors import Refusal

pytestmark = pytest.mark.usefixtures("clock")
ORDER = Publication(Queue.TRAINING, b"order" * 1000, "task", {"x-put-offs": 2}, 5.0)


@pytest.fixture(name="outbox")
def _outbox() -> Outbox:
    return Outbox()


def strikes(parcel: Parcel, refusal: Refusal) -> Iterator[bool]:
    """Strike until the form changes; yields the result of each strike."""
    for _ in range(MAX_STRIKES + 1):
        changed = parcel.strike(refusal, "why")
        yield changed
        if changed:
            return


def test_publications_are_due_in_their_order(outbox: Outbox) -> None:
    for body in (b"1", b"2", b"3"):
        outbox.put(dead(body))
    assert [parcel.form.body for parcel in outbox.due()] == [b"1", b"2", b"3"]
    assert [parcel.form.body for parcel in outbox.due()] == [b"1", b"2", b"3"]


def test_a_confirmed_publication_is_done_and_gone(outbox: Outbox) -> None:
    first, second = outbox.put(dead(b"1")), outbox.put(dead(b"2"))
    assert not outbox.is_empty()
    outbox.confirm(outbox.due()[0])
    assert first.done() and first.result() is None and not second.done()
    assert not outbox.is_empty()
    outbox.confirm(outbox.due()[0])
    assert outbox.is_empty()


def test_a_new_publication_is_waited_for(outbox: Outbox) -> None:
    outbox.put(dead())
    assert not outbox.is_empty()


def test_a_publication_that_is_put_off_is_due_after_its_delay(outbox: Outbox, clock: Clock) -> None:
    outbox.put(dead())
    (parcel,) = outbox.due()
    assert outbox.put_off(parcel) == FIRST_DELAY
    assert outbox.due() == []
    clock.now += FIRST_DELAY - 0.01
    assert outbox.due() == []
    clock.now += 0.01
    assert outbox.due() == [parcel]
    assert outbox.put_off(parcel) == 2 * FIRST_DELAY


def test_a_stuck_publication_is_tried_with_the_longest_delay(outbox: Outbox) -> None:
    outbox.put(dead())
    (parcel,) = outbox.due()
    parcel.strikes = MAX_STRIKES - 1
    assert outbox.put_off(parcel) == FIRST_DELAY
    parcel.strikes = MAX_STRIKES
    assert parcel.is_stuck
    assert outbox.put_off(parcel) == LONGEST_DELAY


def test_publications_with_the_fewest_refusals_are_tried_first(outbox: Outbox) -> None:
    outbox.put(dead(b"1"))
    outbox.due()[0].strike(Refusal.FULL, "")
    outbox.put(dead(b"2"))
    assert [parcel.form.body for parcel in outbox.due()] == [b"2", b"1"]


# --- shorter forms


def test_a_publication_of_a_refused_form_becomes_a_complete_letter_and_then_a_cut_one() -> None:
    parcel = Parcel(ORDER)
    parcel.backoff.next()
    assert list(strikes(parcel, Refusal.FORM)) == [False] * (MAX_STRIKES - 1) + [True]
    assert parcel.form == ORDER.given_up("why")
    assert parcel.backoff.next() == FIRST_DELAY, "the new form is tried soon"
    assert (parcel.is_cut, parcel.strikes) == (False, 0)
    assert list(strikes(parcel, Refusal.FORM)) == [False] * (MAX_STRIKES - 1) + [True]
    assert parcel.form == ORDER.given_up("why").cut()
    assert (parcel.is_cut, parcel.is_stuck) == (True, False)
    assert list(strikes(parcel, Refusal.FORM)) == [False] * (MAX_STRIKES + 1)
    assert parcel.is_stuck
    assert parcel.form.headers[BODY_BYTES] == len(ORDER.body)


def test_a_letter_that_is_refused_is_cut_at_once() -> None:
    letter = Publication.to_dead(b"x", code="GPU_OOM", message="m", task_id="t")
    parcel = Parcel(letter)
    assert list(strikes(parcel, Refusal.FORM))[-1]
    assert parcel.is_cut and parcel.form == letter.cut()


def test_a_letter_that_no_queue_takes_is_never_cut() -> None:
    parcel = Parcel(ORDER)
    assert list(strikes(parcel, Refusal.ROUTE))[-1]
    assert parcel.form == ORDER.given_up("why")
    assert not any(strikes(parcel, Refusal.ROUTE))
    assert parcel.is_stuck and not parcel.is_cut


@pytest.mark.parametrize("refusal", [Refusal.FULL, Refusal.UNANSWERED])
def test_the_brokers_own_state_changes_no_form(refusal: Refusal) -> None:
    parcel = Parcel(ORDER)
    assert not any(parcel.strike(refusal, "why") for _ in range(50))
    assert parcel == Parcel(
        ORDER, parcel.confirmed, parcel.backoff, tries=50, strikes=0, is_suspect=False
    )


def test_the_first_lost_connection_makes_a_publication_suspect_only() -> None:
    parcel = Parcel(ORDER)
    assert not parcel.strike(Refusal.LOST, "why")
    assert (parcel.is_suspect, parcel.strikes, parcel.tries) == (True, 0, 1)
    assert list(strikes(parcel, Refusal.LOST)) == [False] * (MAX_STRIKES - 1) + [True]
    assert parcel.form == ORDER.given_up("why")


def test_a_connection_that_fails_by_itself_clears_suspects_and_nothing_else(
    outbox: Outbox,
) -> None:
    outbox.put(dead(b"suspect"))
    outbox.put(dead(b"refused"))
    suspect, refused = outbox.due()
    suspect.is_suspect = True
    suspect.strikes = refused.strikes = 2
    outbox.acquit()
    assert (suspect.strikes, refused.strikes) == (0, 2)


# --- the end


def test_an_abandoned_outbox_cancels_waiting_and_new_publications(outbox: Outbox) -> None:
    waiting = outbox.put(dead(b"1"))
    outbox.due()
    arrived = outbox.put(dead(b"2"))
    outbox.abandon()
    later = outbox.put(dead(b"3"))
    assert waiting.cancelled() and arrived.cancelled() and later.cancelled()
    assert outbox.is_empty() and outbox.due() == []


# --- delays


def test_a_delay_doubles_up_to_the_longest_and_begins_again() -> None:
    backoff = Backoff(1.0, 5.0)
    assert [backoff.next() for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    backoff.reset()
    assert backoff.next() == 1.0


def test_a_delay_stays_bounded_however_often_it_is_asked_for() -> None:
    backoff = Backoff()
    assert [backoff.next() for _ in range(3000)][-1] == LONGEST_DELAY


def test_a_delay_has_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.broker.outbox.random.uniform", random.Random(1).uniform)
    delays = [Backoff(1.0, 1.0).next() for _ in range(200)]
    assert 0.5 <= min(delays) < 0.55 and 0.95 < max(delays) <= 1.0
