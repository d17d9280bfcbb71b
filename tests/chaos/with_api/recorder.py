"""The backend that workers know: it records each webhook, and passes it on to an API process."""

from __future__ import annotations

import collections
import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import httpx

from sandbox.backend import PROGRESS, Answer, Backend, ReceivedRequest

_PASS_SECONDS = 4.0
_REMEMBERED = 300
_AWAY = Answer(503, body=b'{"detail": "the API is away"}')


class Webhook(NamedTuple):
    """A request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    raw: bytes


class Recorder(Backend):
    """A backend in front of the API, as a load balancer is.

    Each verified request goes to the processes of the API in turn, and the next one is asked if a
    process does not listen. Answers of a destiny or of a fault that are no success are given
    without the API: it never hears of these requests.

    Attributes:
        targets: The addresses of the API's processes.
        late_until: Until then (`time.monotonic`) some progress is answered 503, and kept for later.
    """

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.late_until = 0.0
        self._late: list[Webhook] = []
        self._recent: collections.deque[Webhook] = collections.deque(maxlen=_REMEMBERED)
        self._turns = itertools.count()
        self._now = threading.local()
        self._client = httpx.Client(timeout=_PASS_SECONDS)
        self._heard: set[str] = set()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._client.close()

    @property
    def heard(self) -> set[str]:
        """The tasks of which the API has accepted a webhook."""
        return set(self._heard)

    def handle(self, method: str, path: str, headers: Mapping[str, str], raw: bytes) -> Answer:
        """Check and record one request, and return the answer."""
        self._now.webhook = Webhook(method, path, dict(headers), raw)
        return super().handle(method, path, headers, raw)

    def through(
        self, mood: Callable[[ReceivedRequest], Answer | None]
    ) -> Callable[[ReceivedRequest], Answer]:
        """The answers: those of the mood, and otherwise the API's."""

        def answer(request: ReceivedRequest) -> Answer:
            scripted = mood(request)
            if scripted is not None and (scripted.reset or not 200 <= scripted.status < 300):
                return scripted
            webhook: Webhook = self._now.webhook
            if self._is_late(webhook):
                return _AWAY
            real = self.pass_on(webhook)
            if not 200 <= real.status < 300:
                return real
            self._heard.add(request.task_id or "")
            self._recent.append(webhook)
            if scripted is None:
                return real
            if scripted.body == Answer().body:
                return real._replace(delay=scripted.delay)
            return scripted

        return answer

    def _is_late(self, webhook: Webhook) -> bool:
        late = (
            time.monotonic() < self.late_until
            and webhook.path == PROGRESS
            and next(self._turns) % 2 == 0
        )
        if late:
            self._late.append(webhook)
        return late

    def pass_on(self, webhook: Webhook) -> Answer:
        """The API's answer; 503 without one."""
        kept = {
            name: value
            for name, value in webhook.headers.items()
            if name.lower() not in ("host", "content-length", "connection", "accept-encoding")
        }
        first = next(self._turns)
        for number in range(len(self.targets)):
            target = self.targets[(first + number) % len(self.targets)]
            try:
                answer = self._client.request(
                    webhook.method, target + webhook.path, headers=kept, content=webhook.raw
                )
            except httpx.ConnectError:
                continue
            except httpx.HTTPError:
                return _AWAY
            return Answer(answer.status_code, body=answer.content)
        return _AWAY

    def repeat(self, seed: int) -> tuple[int, list[int]]:
        """Send earlier webhooks again in any order, and those that were kept for later.

        Returns:
            The number of them, and the statuses that are neither a success nor a passing failure.
        """
        dice = random.Random(seed)
        late, self._late = self._late, []
        recent = list(self._recent)
        chosen = late + dice.sample(recent, min(20, len(recent)))
        dice.shuffle(chosen)
        statuses = [self.pass_on(each).status for each in chosen]
        return len(chosen), [each for each in statuses if not 200 <= each < 300 and each < 500]

    def forge(self, seed: int) -> tuple[int, list[int]]:
        """Send changed, stale and unsigned copies of earlier webhooks.

        Returns:
            The number of them, and the statuses that are no refusal.
        """
        dice = random.Random(seed)
        recent = list(self._recent)
        chosen = dice.sample(recent, min(6, len(recent)))
        statuses = []
        for number, each in enumerate(chosen):
            headers = {name.lower(): value for name, value in each.headers.items()}
            raw = each.raw
            if number % 3 == 0:
                raw = raw.replace(b'"task_id"', b'"other_id"')
            elif number % 3 == 1:
                headers["webhook-timestamp"] = str(int(headers["webhook-timestamp"]) - 3600)
            else:
                headers["authorization"] = "Bearer of-nobody"
            with contextlib.suppress(httpx.HTTPError):
                statuses.append(self.pass_on(Webhook(each.method, each.path, headers, raw)).status)
        return len(chosen), [each for each in statuses if each not in (400, 401) and each < 500]
