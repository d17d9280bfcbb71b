"""The API's part of a run: its clients and its faults, and its findings in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tests.chaos.fleet import wait_for
from tests.chaos.jobs import Job, Jobs
from tests.chaos.time_line import TimeLine
from tests.chaos.with_api.clients import Follower, Orders, Steering
from tests.chaos.with_api.faults import ApiFaults
from tests.chaos.with_api.ground import ORGANIZATIONS, ApiGround
from tests.chaos.with_api.verdict import ApiVerdict
from tests.chaos.world import World

_STOP_SECONDS = 15.0
_READY_SECONDS = 30.0


class ApiPlay:
    """The clients of the API while the workers run.

    Attributes:
        faults: Carries out the faults of the API.
    """

    def __init__(
        self, world: World, ground: ApiGround, clients: tuple[Orders, Steering], line: TimeLine
    ) -> None:
        self._orders, self._steering = clients
        self._world, self._ground, self._line = world, ground, line
        self.followers = tuple(Follower(ground, org) for org in ORGANIZATIONS)
        self.faults = ApiFaults(world, ground, self._orders, self.followers, line)

    @classmethod
    @contextlib.contextmanager
    def of(cls, world: World, jobs: Jobs, line: TimeLine, seed: int) -> Iterator[ApiPlay | None]:
        """Order over the API, if there is one, and follow the events."""
        if world.api is None:
            yield None
            return
        jobs.orders, jobs.steering = Orders(world.api, seed), Steering(world.api)
        play = cls(world, world.api, (jobs.orders, jobs.steering), line)
        with contextlib.ExitStack() as stack:
            stack.enter_context(jobs.steering)
            for follower in play.followers:
                stack.enter_context(follower)
            yield play

    def findings(self, jobs: list[Job]) -> list[str]:
        """All findings, once everything has settled; the processes of the API are ended.

        Raises:
            BaseException: An error of a client, which is the suite's own.
        """
        if self._steering.errors:
            raise self._steering.errors[0]
        broken = self._orders.broken + self.faults.broken
        if not wait_for(self._ground.is_ready, _READY_SECONDS, every=0.5):
            broken.append("the API is not ready, though nothing is broken any more")
        verdict = ApiVerdict(self._ground, jobs, self._world.records())
        broken += verdict.findings(self.followers)
        broken += self._exits()
        reconnects = sum(follower.reconnects for follower in self.followers)
        self._line.note(
            f"orders {self._orders.sent}, sent twice at once {self._orders.twice}; steering acts "
            f"{self._steering.acts}; streams opened again {reconnects}"
        )
        return broken

    def _exits(self) -> list[str]:
        """How the processes ended."""
        broken = []
        for slot in self._ground.slots:
            slot.may_end_with(-15)
            slot.close(_STOP_SECONDS)
            broken += [
                f"{each.who} ended with {each.code}, wanted {each.wanted or 'no end'}; its log "
                f"says: {each.last_error}"
                for each in slot.exits
                if each.code not in each.wanted
            ]
        return broken
