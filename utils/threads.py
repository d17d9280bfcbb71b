"""Small uses of threads: a call at an interval, and one call per item, several at a time."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Self, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(
    function: Callable[[T], R], items: Iterable[T], *, at_once: int, name: str
) -> list[R]:
    """Call a function with each item, several calls at a time, and return the results in order.

    The first error ends the work: calls that have not begun are cancelled, calls that run are
    waited for, and the error is raised. Each call has a copy of the caller's context, so its log
    lines name the job.

    Args:
        function: Called in threads.
        items: One call per item.
        at_once: Calls that run at the same time, at most.
        name: Prefix of the threads' names.
    """
    with ThreadPoolExecutor(at_once, thread_name_prefix=name) as pool:
        futures = [pool.submit(contextvars.copy_context().run, function, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    # Calls begin in order, so a call that failed comes before those that were cancelled.
    return [future.result() for future in futures]


class Every:
    """Calls a function at an interval, in a daemon thread, until it is stopped; a context manager.

    The thread has a copy of its maker's context, so its log lines name the job. An error is logged,
    and the next call comes at its time.

    Args:
        seconds: Time between two calls, or a function that returns the time until the next one.
        function: The call.
        name: The thread's name.
        at_once: The first call comes at the start; otherwise after the first interval.
    """

    def __init__(
        self,
        seconds: float | Callable[[], float],
        function: Callable[[], object],
        *,
        name: str,
        at_once: bool = True,
    ) -> None:
        self._seconds = seconds if callable(seconds) else lambda: seconds
        self._function = function
        self._at_once = at_once
        self._due = threading.Event()
        self._stopping = threading.Event()
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=context.run, args=(self._run,), name=name, daemon=True
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def hurry(self) -> None:
        """Make the next call now instead of at its time."""
        self._due.set()

    def stop(self, join_seconds: float | None = None) -> None:
        """Begin no further call, and wait for the one that runs.

        Args:
            join_seconds: Wait this long at most; None for as long as the call takes.
        """
        self._stopping.set()
        self._due.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(join_seconds)

    def _run(self) -> None:
        if not self._at_once:
            self._due.wait(self._seconds())
        while not self._stopping.is_set():
            self._due.clear()
            # Do not miss a stop between the loop's test and the line above.
            if self._stopping.is_set():
                return
            try:
                self._function()
            except Exception:  # pylint: disable=broad-exception-caught  # logged
                log.exception("periodic_call_failed", extra={"loop": self._thread.name})
            self._due.wait(self._seconds())
