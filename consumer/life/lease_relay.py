"""What the lease learns reaches the job: that it is lost, or that a cancel file was put there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from consumer.life.stop_signal import StopSignal
from services.records.job_lease import JobLease
from utils.errors import StopReason

_SECONDS = 0.1


@contextlib.contextmanager
def relayed(lease: JobLease, stop: StopSignal) -> Iterator[None]:
    """While the block runs, a lost lease or a cancel file asks the job to stop."""
    done = threading.Event()

    def relay() -> None:
        if lease.lost.is_set():
            stop.request(StopReason.LEASE_LOST)
        if lease.cancelled.is_set():
            stop.request(StopReason.CANCELLED)

    def watch() -> None:
        while not done.wait(_SECONDS):
            relay()

    relay()  # what was there before the first claim is obeyed before any work
    thread = threading.Thread(target=watch, name="relay", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
