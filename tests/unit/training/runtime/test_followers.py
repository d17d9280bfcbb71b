"""The further processes of a trainer, as process 0 watches them; the processes are fakes."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import cast

import pytest

from jobs.kinds import Run, TrainerOptions
from training.runtime import followers
from training.runtime.followers import Followers
from utils.errors import TrainingServerError
from utils.events import Failed, Finished


class FakeFollower:
    """A process that the test ends."""

    def __init__(self, options: TrainerOptions, changed: threading.Condition) -> None:
        self.rank, self._changed = options.rank, changed
        self.ending: Finished | Failed | None = None
        self.dead = self.usable = False
        self.process = SimpleNamespace(pid=0)

    def send(self, line: bytes) -> None:
        """Take a run."""

    def cause_of_death(self) -> str:
        """The sentence for an operator."""
        return "process 1 was killed"

    def die(self) -> None:
        """Its pipe ends."""
        with self._changed:
            self.dead = True
            self._changed.notify_all()


@pytest.fixture(name="given_up")
def _given_up() -> list[Failed]:
    return []


@pytest.fixture(name="two")
def _two(monkeypatch: pytest.MonkeyPatch, given_up: list[Failed]) -> Followers:
    monkeypatch.setattr(followers, "_Follower", FakeFollower)
    monkeypatch.setattr(followers, "_DEATH_SECONDS", 0.2)
    return Followers(TrainerOptions("none", processes=2), given_up.append)


def begin(two: Followers) -> FakeFollower:
    """Begin a run; returns the other process."""
    two.begin(Run("job", 1, "module:class", {}, {}))
    (other,) = cast(list[FakeFollower], two._each)  # pylint: disable=protected-access
    return other


def test_a_death_that_process_0_noticed_first_is_reported_with_the_ending_only(
    two: Followers, given_up: list[Failed]
) -> None:
    other = begin(two)
    threading.Timer(0.2, other.die).start()
    own = Failed("job", TrainingServerError.__name__, "no answer", trainer_usable=True)
    ending, whole = two.settle(own, of_another=True)
    assert isinstance(ending, Failed) and ending.message == "process 1 was killed"
    assert not ending.trainer_usable and not whole
    threading.Event().wait(0.5)
    assert not given_up, "the program would end before the ending is sent"


def test_a_death_that_process_0_does_not_notice_ends_the_program_with_the_failure(
    two: Followers, given_up: list[Failed]
) -> None:
    begin(two).die()
    threading.Event().wait(0.6)
    assert [(each.task_id, each.message) for each in given_up] == [("job", "process 1 was killed")]
