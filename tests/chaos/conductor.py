"""Leads each job to its destiny: cancels it, orders it again, sends it back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

from config import setting_names
from sandbox.backend import PROGRESS, ReceivedRequest
from tests.chaos.fleet import ROOT
from tests.chaos.jobs import Job, Jobs, is_settled
from tests.chaos.reference import Destiny
from tests.chaos.timing import WINDOW_SECONDS
from tests.chaos.world import World

_LOOK_SECONDS = 0.5
_WINDOW_SLACK = 3.0
"""S3's dates have whole seconds."""
REDRIVEN = (Destiny.GIVEN_UP_REDRIVEN, Destiny.REFUSED_REDRIVEN)


class Conductor:
    """Watches records and requests in a separate thread; a context manager.

    Args:
        world: The servers.
        jobs: The published jobs.
        folder: The run's folder.

    Attributes:
        errors: Errors of its thread.
    """

    def __init__(self, world: World, jobs: Jobs, folder: Path) -> None:
        self.errors: list[BaseException] = []
        self._world, self._jobs, self._folder = world, jobs, folder
        self._done: set[str] = set()
        self._settled_at: dict[str, float] = {}
        self._struck: set[str] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="conductor", daemon=True)
        (folder / "repaired").mkdir(exist_ok=True)
        world.mood.heard = self._heard

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def pending(self) -> list[Job]:
        """Jobs that still need an act of the conductor."""
        waits = (Destiny.ORDERED_TWICE, *REDRIVEN)
        return [
            job
            for job in tuple(self._jobs.published)
            if job.destiny in waits and not job.again and job.task_id not in self._done
        ]

    def waits(self) -> bool:
        """Whether the conductor waits for a time, and not for a worker."""
        return any(
            job.destiny is Destiny.ORDERED_TWICE and job.task_id in self._settled_at
            for job in self.pending()
        )

    def _heard(self, request: ReceivedRequest) -> None:
        """Cancel a job, or damage its record, at its first progress report."""
        task_id = request.task_id
        if task_id is None or request.path != PROGRESS or task_id in self._struck:
            return
        destiny = self._world.mood.destinies.get(task_id)
        if destiny is Destiny.CANCEL_FILE:
            self._struck.add(task_id)
            self._world.destined.cancel(task_id)
        elif destiny is Destiny.RECORD_DAMAGED:
            self._struck.add(task_id)
            self._world.damage_record(task_id)

    def _loop(self) -> None:
        while not self._stopping.wait(_LOOK_SECONDS):
            try:
                self._look()
            except Exception as error:  # pylint: disable=broad-exception-caught
                self.errors.append(error)  # the suite raises it

    def _look(self) -> None:
        pending = self.pending()
        records = self._world.records() if pending else {}
        for job in pending:
            record = records.get(job.record_id)
            if record is None or not is_settled(record):
                continue
            since = self._settled_at.setdefault(job.task_id, time.monotonic())
            if job.destiny in REDRIVEN and _is_told(job, record):
                self._done.add(job.task_id)
            elif job.destiny is Destiny.ORDERED_TWICE:
                if time.monotonic() > since + WINDOW_SECONDS + _WINDOW_SLACK:
                    self._done.add(job.task_id)
                    self._jobs.order_again(job)
            elif job.destiny is not Destiny.REFUSED_REDRIVEN or record["delivery"] == "set_aside":
                (self._folder / "repaired" / job.task_id).touch()
                self._world.mood.repaired.add(job.task_id)
                if self._redrive(job.task_id):
                    self._done.add(job.task_id)

    def _redrive(self, task_id: str) -> bool:
        """Send a job back as an operator does; False if it must be retried."""
        environment = {
            name: value for name, value in os.environ.items() if name.upper() not in setting_names()
        }
        with self._world.broker_turn:
            self._jobs.journal.note("redriven", task=task_id)
            done = subprocess.run(
                [sys.executable, "-m", "main", "redrive", task_id, "--json"],
                cwd=self._folder,  # without a `.env` in it
                env=environment | self._world.settings(None) | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
        with (self._folder / "redrive.log").open("a", encoding="utf-8") as log:
            log.write(f"{task_id}: {done.returncode}\n{done.stdout}{done.stderr}\n")
        # Finding nothing is no success: the copy may not be in the dead queue yet.
        return done.returncode == 0 and task_id in done.stdout


def _is_told(job: Job, record: dict[str, Any]) -> bool:
    """Whether the job has reached the state after its return."""
    if job.destiny is Destiny.REFUSED_REDRIVEN:
        return bool(record["delivery"] == "delivered")
    return bool(record["ending"]["kind"] == "complete")
