"""Stops a job when its lease is lost, or when a file asks for its end or for a pause."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from consumer.life.stop_signal import StopSignal
from services.records.job_lease import JobLease
from utils.errors import StopReason
from utils.threads import Every

_SECONDS = 0.1


@contextlib.contextmanager
def relayed(lease: JobLease, stop: StopSignal) -> Iterator[None]:
    """While the block runs, a lost lease, a cancel file or a pause file asks the job to stop."""

    def relay() -> None:
        if lease.lost.is_set():
            stop.request(StopReason.LEASE_LOST)
        if lease.cancelled.is_set():
            stop.request(StopReason.CANCELLED)
        if lease.paused.is_set():
            stop.request(StopReason.PAUSED)

    relay()  # a file from before the first claim stops the job before any work
    with Every(_SECONDS, relay, name="relay", at_once=False):
        yield
