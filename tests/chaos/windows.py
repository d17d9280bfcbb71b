"""Faults of requests: for a while some requests fail, chosen at random from the seed."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from sandbox.backend import COMPLETE, FAILED, PROGRESS, Answer, ReceivedRequest
from tests.chaos.hits import Hits
from tests.chaos.reference import Destiny
from tests.integration.services.s3_proxy import Fault, S3Proxy

T = TypeVar("T")

_REMEMBERED = 5_000
PATIENCE_SECONDS = 8.0


@dataclasses.dataclass
class Window(Generic[T]):
    """A fault that is active for a while, and a little longer if it has hit nothing by then.

    Attributes:
        until: The time of its end (`time.monotonic`).
        chance: Part of the requests that it hits.
        dice: Its own random numbers.
        fault: The fault of these requests.
        hits: Whether a request, by its method and path, can be hit.
        kind: The kind of fault, for the count of hits.
    """

    until: float
    chance: float
    dice: random.Random
    fault: T
    hits: Callable[[str, str], bool]
    kind: str
    has_hit: bool = False

    def is_open(self, now: float) -> bool:
        """Whether requests can still be hit."""
        return now < self.until or (not self.has_hit and now < self.until + PATIENCE_SECONDS)


class Weather(Generic[T]):
    """The windows in force at one place.

    Args:
        struck: Counts each request that is hit.
    """

    def __init__(self, struck: Hits) -> None:
        self._struck = struck
        self._windows: list[Window[T]] = []
        self._lock = threading.Lock()

    def add(self, window: Window[T]) -> None:
        """Start a window."""
        with self._lock:
            self._windows.append(window)

    def calm(self) -> None:
        """End all faults."""
        with self._lock:
            self._windows.clear()

    def fault(self, method: str, path: str) -> T | None:
        """The fault of a request, or none."""
        with self._lock:
            now = time.monotonic()
            self._windows = [window for window in self._windows if window.is_open(now)]
            for window in self._windows:
                if window.hits(method, path) and window.dice.random() < window.chance:
                    window.has_hit = True
                    self._struck.struck(window.kind)
                    return window.fault
        return None


class FaultyS3(Weather[Fault]):
    """An S3 proxy with its faults; a context manager.

    Args:
        target: The S3 server's address.
        struck: Counts each request that is hit.
        passing: Sees each request that nothing hits, and may still choose a fault for it.
    """

    def __init__(
        self, target: str, struck: Hits, passing: Callable[[str, str], Fault | None]
    ) -> None:
        super().__init__(struck)
        self._passing = passing
        self.proxy = S3Proxy(target)
        self.proxy.fault = self._choose
        self.endpoint = self.proxy.endpoint

    def _choose(self, method: str, path: str) -> Fault | None:
        if len(self.proxy.requests) > _REMEMBERED:
            self.proxy.requests.clear()
            self.proxy.headers.clear()
        return self.fault(method, path) or self._passing(method, path)

    def __enter__(self) -> FaultyS3:
        self.proxy.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.calm()
        self.proxy.__exit__()


class BackendMood(Weather[Answer]):
    """The backend's unusual answers; to be set as `Backend.answer`.

    Attributes:
        destinies: The destinies by task id, which decide some answers.
        repaired: Tasks whose endings are accepted from now on, with any destiny.
        asked: Seconds of an answer's `Retry-After`, by `webhook-id` and arrival.
        heard: Called with each verified request.
    """

    def __init__(self, struck: Hits) -> None:
        super().__init__(struck)
        self.destinies: dict[str, Destiny] = {}
        self.repaired: set[str] = set()
        self.asked: dict[tuple[str, float], float] = {}
        self.heard: Callable[[ReceivedRequest], None] = lambda request: None

    def __call__(self, request: ReceivedRequest) -> Answer | None:
        self.heard(request)
        fault = self.fault(request.method, request.path)
        if fault and "Retry-After" in fault.headers:
            seconds = float(fault.headers["Retry-After"])
            self.asked[request.webhook_id, request.received_at] = seconds
        destined = self._destined(request.task_id or "", request.path)
        if fault and destined and fault.status == Answer().status:
            return destined._replace(
                delay=fault.delay
            )  # the answer is late but has its usual content
        return fault or destined

    def _destined(self, task_id: str, path: str) -> Answer | None:
        is_ending = path in (COMPLETE, FAILED)
        match self.destinies.get(task_id):
            case Destiny.CANCEL_ANSWER if not is_ending:
                return Answer(body=b'{"cancel": true}')
            case Destiny.CANCEL_GONE:
                return Answer(410, body=b'{"detail": "deleted"}')
            case Destiny.REFUSED if is_ending:
                return Answer(400, body=b'{"detail": "refused"}')
            case Destiny.REFUSED_REDRIVEN if is_ending and task_id not in self.repaired:
                return Answer(400, body=b'{"detail": "refused"}')
            case Destiny.NOT_FOUND if is_ending:
                return Answer(404, body=b'{"detail": "no such style"}')
        return None


def anything(_method: str, _path: str) -> bool:
    """Every request."""
    return True


def writes(method: str, _path: str) -> bool:
    """Every request that stores something."""
    return method == "PUT"


def conditional_writes(method: str, path: str) -> bool:
    """Requests to keys whose writes carry a condition."""
    return method == "PUT" and any(f"/{name}/" in path for name in ("jobs", "models"))


def progress(_method: str, path: str) -> bool:
    """Progress reports."""
    return path == PROGRESS


def endings(_method: str, path: str) -> bool:
    """Endings."""
    return path in (COMPLETE, FAILED)


def object_reads(method: str, path: str) -> bool:
    """Requests for an object's content."""
    return method == "GET" and "list-type" not in path and path.count("/") > 2


def calm_all(places: Iterable[Weather[Fault]]) -> None:
    """The same for several."""
    for place in places:
        place.calm()
