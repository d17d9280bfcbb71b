"""Faults of the services that workers talk to: requests, answers and connections that go wrong."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from types import MappingProxyType

from sandbox.backend import Answer
from tests.chaos.schedule import Fault, Kind
from tests.chaos.timing import RETRY_AFTER
from tests.chaos.windows import (
    Window,
    anything,
    conditional_writes,
    endings,
    object_reads,
    progress,
    writes,
)
from tests.chaos.world import Ways, World
from tests.integration.services.s3_proxy import Fault as S3Fault
from tests.integration.services.s3_proxy import refusal

_ALWAYS = {Kind.S3_AWAY, Kind.S3_AWAY_LONG}
_AWAY = S3Fault(reset=True, forward=False)
_S3: dict[Kind, tuple[S3Fault, Callable[[str, str], bool]]] = {
    Kind.S3_500: (refusal(500, "InternalError"), anything),
    Kind.S3_503: (refusal(503, "SlowDown"), anything),
    Kind.S3_SLOW: (S3Fault(delay=0.25), anything),
    # Longer than any time-out of the workers, and than their lease.
    Kind.S3_SILENT: (S3Fault(delay=4.0, reset=True, forward=False), anything),
    Kind.S3_ANSWER_LOST: (S3Fault(reset=True), writes),
    Kind.S3_409: (refusal(409, "ConditionalRequestConflict"), conditional_writes),
    Kind.S3_412: (refusal(412, "PreconditionFailed"), conditional_writes),
    Kind.S3_RESET: (_AWAY, anything),
    Kind.S3_AWAY: (_AWAY, anything),
    Kind.S3_AWAY_LONG: (_AWAY, anything),
    Kind.S3_CUT: (S3Fault(keep=20), object_reads),
    Kind.S3_FLIPPED: (S3Fault(flip=True), object_reads),
}
_ENDINGS = {
    Kind.ENDING_401: Answer(401, body=b'{"detail": "unknown token"}'),
    Kind.ENDING_403: Answer(403, body=b'{"detail": "forbidden"}'),
    # Answers of a proxy in front of a backend that is being deployed; not of the backend itself.
    Kind.ENDING_404: Answer(404, MappingProxyType({"Content-Type": "text/html"}), b"<html>"),
    Kind.ENDING_429: Answer(429, MappingProxyType({"Retry-After": str(RETRY_AFTER)})),
    Kind.ENDING_SLOW: Answer(delay=1.5),
}
_LONGEST_OUTAGE = 2.5
"""Of endings, in seconds: a 404 for longer is one that the backend means."""


class ServiceFaults:
    """Carries out the faults of S3, the backend, and the connections to the broker."""

    def __init__(self, world: World) -> None:
        self._world = world

    def inject(self, fault: Fault) -> None:
        """Begin one; it ends by itself."""
        if fault.kind in _S3:
            self._s3(fault)
        elif fault.kind.name.startswith("BROKER_"):
            self._broker(fault)
        else:
            self._backend(fault)

    def _s3(self, fault: Fault) -> None:
        what, hits = _S3[fault.kind]
        chance = 1.0 if fault.kind in _ALWAYS else fault.chance
        for way in self._ways(fault):
            way.s3.add(
                Window(
                    until=time.monotonic() + fault.seconds,
                    chance=chance,
                    dice=random.Random(fault.seed),
                    fault=what,
                    hits=hits,
                    kind=fault.kind,
                )
            )

    def _backend(self, fault: Fault) -> None:
        struck = functools.partial(self._world.hits.struck, fault.kind)
        if fault.kind is Kind.BACKEND_CUT:
            # Half of them in the middle of the answer's head or body, half before its first byte.
            after = (0, 30)[fault.detail % 2]
            self._world.backend_way.cut_answers(after, fault.seconds, struck)
            return
        location = f"{self._world.elsewhere.url}/api/webhooks/training/progress"
        answers = _ENDINGS | {
            Kind.BACKEND_500: Answer(500, body=b"oops"),
            Kind.BACKEND_429: Answer(429, MappingProxyType({"Retry-After": "1"})),
            Kind.BACKEND_HANGS: Answer(delay=4.0),
            Kind.BACKEND_REDIRECTS: Answer(
                (301, 302, 307, 308)[fault.detail % 4], MappingProxyType({"Location": location})
            ),
        }
        which: Callable[[str, str], bool] = anything
        seconds = fault.seconds
        if fault.kind is Kind.BACKEND_REDIRECTS:
            which = progress
        elif fault.kind in _ENDINGS:
            which, seconds = endings, _LONGEST_OUTAGE
        self._world.mood.add(
            Window(
                until=time.monotonic() + seconds,
                chance=fault.chance,
                dice=random.Random(fault.seed),
                fault=answers[fault.kind],
                hits=which,
                kind=fault.kind,
            )
        )

    def _broker(self, fault: Fault) -> None:
        struck = functools.partial(self._world.hits.struck, fault.kind)
        for way in self._ways(fault):
            match fault.kind:
                case Kind.BROKER_RESET:
                    way.broker.reset(struck)
                case Kind.BROKER_SILENT:
                    way.broker.go_silent(fault.seconds, struck)
                case Kind.BROKER_HALF_OPEN:
                    way.broker.half_open(server_knows=bool(fault.detail % 2), struck=struck)
                case Kind.BROKER_REFUSES:
                    way.broker.refuse(fault.seconds, struck)
                case Kind.BROKER_CONFIRMS_LOST:
                    way.broker.lose_confirms(fault.seconds, struck)
                case kind:
                    raise AssertionError(kind)

    def _ways(self, fault: Fault) -> list[Ways]:
        return self._world.ways if fault.slot < 0 else [self._world.ways[fault.slot]]
