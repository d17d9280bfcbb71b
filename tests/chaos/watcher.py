"""Checks the live jobs all the time: each checkpoint that a job can resume from is complete."""

from __future__ import annotations

import threading
from typing import Any, Self

from tests.chaos import journal
from tests.chaos.jobs import Jobs, journal_of
from tests.chaos.timing import STATE
from tests.chaos.world import World

_LOOK_SECONDS = 0.7
_KEPT_IN_FULL = 2
_FILES = ("manifest.json", "state.json", "optimizer.safetensors", "random.safetensors")


class Watcher:
    """A thread; a context manager.

    Attributes:
        broken: Its findings, one sentence per job.
    """

    def __init__(self, world: World, jobs: Jobs) -> None:
        self._world, self._jobs = world, jobs
        self._found: dict[str, str] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="watcher", daemon=True)

    @property
    def broken(self) -> list[str]:
        """One sentence for each job that had an incomplete checkpoint."""
        return list(self._found.values())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            for record in self._world.records().values():
                if record["state"] == "live" and record["checkpoints"]:
                    self._look(record)

    def _look(self, record: dict[str, Any]) -> None:
        task_id = record["task_id"]
        for checkpoint in _in_full(record):
            prefix = checkpoint["prefix"]
            lying = {key.removeprefix(prefix) for key in self._world.keys(STATE, prefix)}
            missing = sorted(set(_FILES) - lying)
            if not missing or task_id in self._found:
                continue
            now = self._world.records().get(task_id)
            if now is None or now["state"] != "live" or checkpoint not in _in_full(now):
                continue  # it has moved on meanwhile
            notes = journal.read(journal_of(self._world.folder))
            if any(note["kind"] == "spoilt" and note["task"] == task_id for note in notes):
                continue
            self._found[task_id] = (
                f"{task_id}: its record points to checkpoint {checkpoint['name']}, which lacks "
                f"{', '.join(missing)}"
            )


def _in_full(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The checkpoints that a job can resume from; of older ones only the weights stay."""
    newest: list[dict[str, Any]] = record["checkpoints"][-_KEPT_IN_FULL:]
    return newest
