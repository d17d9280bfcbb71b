"""Requests to stop a job: the strongest reason counts, and every listener is called."""

import pytest

from consumer.life.stop_signal import Shutdown, StopSignal
from utils.errors import Cancelled, LeaseLost, Stopped, StopReason, TimeLimit


def test_a_signal_that_was_not_set_stops_nothing() -> None:
    signal = StopSignal()
    signal.check()
    assert signal.reason is None
    assert not signal.wait(0)


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        (StopReason.CANCELLED, Cancelled),
        (StopReason.TIME_LIMIT, TimeLimit),
        (StopReason.LEASE_LOST, LeaseLost),
        (StopReason.SHUTDOWN, Stopped),
    ],
)
def test_each_reason_is_raised_as_its_own_error(reason: StopReason, error: type[Exception]) -> None:
    signal = StopSignal()
    signal.request(reason)
    with pytest.raises(error):
        signal.check()


def test_a_lost_lease_outweighs_a_cancellation_a_pause_and_a_shutdown_in_this_order() -> None:
    signal = StopSignal()
    heard: list[StopReason] = []
    signal.subscribe(heard.append)
    order = (StopReason.SHUTDOWN, StopReason.PAUSED, StopReason.CANCELLED, StopReason.LEASE_LOST)
    for reason in order:
        signal.request(reason)
    signal.request(StopReason.SHUTDOWN)
    assert signal.reason is StopReason.LEASE_LOST
    assert heard == list(order)


def test_a_late_subscriber_is_called_at_once() -> None:
    signal = StopSignal()
    signal.request(StopReason.CANCELLED)
    heard: list[StopReason] = []
    signal.subscribe(heard.append)
    assert heard == [StopReason.CANCELLED]


def test_a_shutdown_stops_the_job_in_hand_and_the_one_that_begins_after_it() -> None:
    shutdown = Shutdown(grace_seconds=8)
    before, after, over = StopSignal(), StopSignal(), StopSignal()
    with shutdown.covering(over):
        pass
    with shutdown.covering(before):
        shutdown.request()
    with shutdown.covering(after):
        pass
    assert before.reason is StopReason.SHUTDOWN
    assert after.reason is StopReason.SHUTDOWN
    assert over.reason is None


def test_saving_has_no_limit_until_a_shutdown_begins() -> None:
    shutdown = Shutdown(grace_seconds=4)
    assert shutdown.seconds_for_saving() == float("inf")
    shutdown.request()
    assert 2.0 < shutdown.seconds_for_saving() <= 2.5
