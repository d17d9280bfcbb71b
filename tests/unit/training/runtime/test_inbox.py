"""Runs and stops on their way into the trainer: a stop reaches its own run, or none."""

from __future__ import annotations

import threading

import pytest

from jobs.kinds import Run
from jobs.style import StyleKind
from tests.unit.training.conftest import MakeRun
from training.runtime.inbox import Inbox
from utils.errors import StopReason
from utils.events import Stop


@pytest.fixture(name="inbox")
def _inbox() -> Inbox:
    with open("/dev/null", "rb", buffering=0) as pipe:  # messages are put in by hand
        return Inbox(pipe)


@pytest.fixture(name="first")
def _first(make_run: MakeRun) -> Run:
    return Run.of(make_run(task_id="task-1"), StyleKind.runner, {})


@pytest.fixture(name="second")
def _second(make_run: MakeRun) -> Run:
    return Run.of(make_run(task_id="task-2"), StyleKind.runner, {})


def stop(run: Run, reason: StopReason = StopReason.CANCELLED) -> Stop:
    """A stop for this run."""
    return Stop(reason, run.task_id, run.claim)


def test_runs_are_taken_in_the_order_in_which_they_came(
    inbox: Inbox, first: Run, second: Run
) -> None:
    assert not inbox.has_run()
    inbox.deliver(first)
    inbox.deliver(second)
    assert inbox.has_run()
    assert (inbox.take(), inbox.take()) == (first, second)
    assert not inbox.has_run()


def test_taking_waits_for_a_run(inbox: Inbox, first: Run) -> None:
    threading.Timer(0.1, lambda: inbox.deliver(first)).start()
    assert inbox.take() == first


def test_a_stop_reaches_the_run_in_hand_and_a_later_reason_replaces_it(
    inbox: Inbox, first: Run
) -> None:
    inbox.deliver(first)
    inbox.take()
    assert inbox.stop_reason() is None
    inbox.deliver(stop(first, StopReason.SHUTDOWN))
    assert inbox.stop_reason() is StopReason.SHUTDOWN
    inbox.deliver(stop(first, StopReason.LEASE_LOST))
    assert inbox.stop_reason() is StopReason.LEASE_LOST


def test_a_run_that_is_stopped_before_it_is_taken_is_stopped_from_its_start(
    inbox: Inbox, first: Run
) -> None:
    inbox.deliver(first)
    inbox.deliver(stop(first))
    assert inbox.stop_reason() is None  # nothing is in hand yet
    inbox.take()
    assert inbox.stop_reason() is StopReason.CANCELLED


def test_a_run_that_is_laid_down_takes_its_stop_with_it(
    inbox: Inbox, first: Run, second: Run
) -> None:
    inbox.deliver(first)
    inbox.take()
    inbox.deliver(stop(first))
    inbox.lay_down()
    assert inbox.stop_reason() is None
    inbox.deliver(second)
    inbox.take()
    assert inbox.stop_reason() is None


def test_a_stop_that_comes_after_its_run_was_laid_down_stops_no_other(
    inbox: Inbox, first: Run, second: Run
) -> None:
    inbox.deliver(first)
    inbox.take()
    inbox.lay_down()
    inbox.deliver(stop(first))
    inbox.deliver(second)
    inbox.deliver(stop(first))
    inbox.take()
    assert inbox.stop_reason() is None
    inbox.deliver(stop(first))
    assert inbox.stop_reason() is None


def test_a_stop_for_a_waiting_run_does_not_stop_the_one_in_hand(
    inbox: Inbox, first: Run, second: Run
) -> None:
    inbox.deliver(first)
    inbox.take()
    inbox.deliver(second)
    inbox.deliver(stop(second))
    assert inbox.stop_reason() is None
    inbox.lay_down()
    inbox.take()
    assert inbox.stop_reason() is StopReason.CANCELLED


def test_a_stop_of_an_earlier_claim_does_not_stop_the_next_claim_of_the_job(
    inbox: Inbox, make_run: MakeRun
) -> None:
    earlier, later = (Run.of(make_run(claim=claim), StyleKind.runner, {}) for claim in (1, 2))
    inbox.deliver(later)
    inbox.take()
    inbox.deliver(stop(earlier))
    assert inbox.stop_reason() is None
    inbox.deliver(stop(later))
    assert inbox.stop_reason() is StopReason.CANCELLED
