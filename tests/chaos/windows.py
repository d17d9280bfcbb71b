"""Faults of requests: for a while, some of them go wrong, as dice that the seed has loaded say."""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from sandbox.backend import PROGRESS, Answer, ReceivedRequest
from tests.integration.services.s3_proxy import Fault, S3Proxy

T = TypeVar("T")

_REMEMBERED = 5_000


@dataclasses.dataclass
class Window(Generic[T]):
    """A fault that is in the air for a while.

    Attributes:
        until: When it is over (`time.monotonic`).
        chance: Part of the requests that it hits.
        dice: Its own.
        fault: What happens to them.
        hits: Whether a request, by its method and path, can be hit.
    """

    until: float
    chance: float
    dice: random.Random
    fault: T
    hits: Callable[[str, str], bool]


class Weather(Generic[T]):
    """The windows in force at one place."""

    def __init__(self) -> None:
        self._windows: list[Window[T]] = []
        self._lock = threading.Lock()

    def add(self, window: Window[T]) -> None:
        """Let it blow."""
        with self._lock:
            self._windows.append(window)

    def calm(self) -> None:
        """Nothing goes wrong any more."""
        with self._lock:
            self._windows.clear()

    def fault(self, method: str, path: str) -> T | None:
        """What is to happen to a request."""
        with self._lock:
            now = time.monotonic()
            self._windows = [window for window in self._windows if window.until > now]
            for window in self._windows:
                if window.hits(method, path) and window.dice.random() < window.chance:
                    return window.fault
        return None


class FaultyS3(Weather[Fault]):
    """An S3 proxy with its weather; a context manager."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.proxy = S3Proxy(target)
        self.proxy.fault = self._choose
        self.endpoint = self.proxy.endpoint

    def _choose(self, method: str, path: str) -> Fault | None:
        if len(self.proxy.requests) > _REMEMBERED:
            self.proxy.requests.clear()
            self.proxy.headers.clear()
        return self.fault(method, path)

    def __enter__(self) -> FaultyS3:
        self.proxy.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.calm()
        self.proxy.__exit__()


class BackendMood(Weather[Answer]):
    """What the backend answers instead of the usual; goes where `Backend.answer` is."""

    def __call__(self, request: ReceivedRequest) -> Answer | None:
        return self.fault(request.method, request.path)


def anything(_method: str, _path: str) -> bool:
    """Every request."""
    return True


def writes(method: str, _path: str) -> bool:
    """Every request that stores something."""
    return method == "PUT"


def conditional_writes(method: str, path: str) -> bool:
    """Those to places where writes carry a condition."""
    return method == "PUT" and any(f"/{name}/" in path for name in ("jobs", "models"))


def progress(_method: str, path: str) -> bool:
    """Progress reports."""
    return path == PROGRESS


def calm_all(places: Iterable[Weather[Fault]]) -> None:
    """The same for several."""
    for place in places:
        place.calm()
