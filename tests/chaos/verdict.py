"""The final count: the world against the reference model, job by job, and the invariants."""

from __future__ import annotations

import collections
import dataclasses

from tests.chaos.jobs import Job
from tests.chaos.observed import Evidence, Observed
from tests.chaos.reference import Places, expected
from tests.chaos.timing import STATE, STYLE
from tests.chaos.work import Work, WorkLook
from tests.chaos.world import SECRETS

__all__ = ["Count", "Evidence", "Verdict"]


@dataclasses.dataclass
class Count:
    """A run in numbers.

    Attributes:
        lost: Jobs with a lost ending, or without an ending.
        duplicated: Jobs that ended or were trained more often than they were ordered.
        swept: Jobs that only the sweep saved, although their queue was not deleted.
        given_up: Jobs that lost all their attempts to faults.
        destinies: Number of jobs of each destiny.
        crash_points: Number of kills or stops at each point.
    """

    published: int = 0
    ended: int = 0
    lost: int = 0
    duplicated: int = 0
    swept: int = 0
    given_up: int = 0
    work: Work = dataclasses.field(default_factory=Work)
    destinies: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    crash_points: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Verdict:
    """Compares and counts, and collects what is broken as sentences."""

    def __init__(self, run: Evidence) -> None:
        self.count = Count(published=len(run.jobs))
        self.broken: list[str] = []
        self._run = run
        self._observed = Observed(run)
        self._look = WorkLook(self._observed)

    @property
    def unexplained(self) -> int:
        """Findings that are neither a lost nor a duplicated job."""
        return max(0, len(self.broken) - self.count.lost - self.count.duplicated)

    def reach(self) -> None:
        """Check everything."""
        for job in self._run.jobs:
            self._compare(job)
            if job.valid:
                self._look.at(job)
        self.count.work = self._look.work
        self.count.destinies.update(str(job.destiny) for job in self._run.jobs)
        self.count.crash_points.update(
            f"{note['act']} {note['point']}"
            for note in self._run.notes
            if note["kind"] == "crash_point"
        )
        self._folders()
        self._sweeps()
        self._backend()
        self._dead()
        self._logs()
        self.broken += self._observed.broken + self._look.broken

    def _compare(self, job: Job) -> None:
        """The job's places against those that the reference model allows."""
        allowed = expected(job.destiny, self._observed.facts(job))
        found = self._found(job, allowed)
        best = min((each.differences(found) for each in allowed), key=len)
        self.count.ended += found.record == allowed[0].record
        if not best:
            intended = expected(job.destiny)
            self.count.given_up += all(each.differences(found) for each in intended)
            return
        wanted = min(allowed, key=lambda each: len(each.differences(found)))
        is_lost = (
            found.record != wanted.record
            or found.taken < wanted.taken
            or not wanted.dead_letters <= found.dead_letters
        )
        is_twice = found.endings > wanted.endings or job.task_id in self._look.work.twice
        self.count.lost += is_lost
        self.count.duplicated += is_twice and not is_lost
        what = "lost" if is_lost else "duplicated" if is_twice else "misplaced"
        again = ", second order" if job.again else ""
        self.broken.append(f"{job.task_id} ({job.destiny}{again}): {what}; {'; '.join(best)}")

    def _found(self, job: Job, allowed: tuple[Places, ...]) -> Places:
        """The job's places, without an object that a suspended worker wrote after the ending."""
        found = self._observed.places(job)
        if not any(
            difference.startswith(("checkpoints", "staged"))
            for each in allowed
            for difference in each.differences(found)
        ):
            return found
        late = set()
        for key in self._observed.keys(job):
            mark = self._run.world.s3.head_object(Bucket=STATE, Key=key)["Metadata"]
            if self._look.was_in_flight(job, int(mark.get("claim", 0))):
                late.add(key)
        return self._observed.places(job, late) if late else found

    def _folders(self) -> None:
        """Each style's folder is of one run."""
        for style_id in sorted(
            {job.style_id for job in self._run.jobs if job.valid and job.kind == STYLE}
        ):
            files = self._observed.folder_of(style_id)
            runs = {(file.task_id, file.claim) for file in files.values()}
            if len(runs) > 1:
                self.broken.append(f"style {style_id}: its files are of several runs: {runs}")

    def _sweeps(self) -> None:
        """A job that only the sweep saved would have been lost without it."""
        allowed = self._run.world.sweep_allowed
        saved = {
            note["task"]
            for note in self._run.notes
            if note["kind"] == "swept" and note["task"] not in allowed
        }
        self.count.swept = len(saved)
        for task_id in sorted(saved):
            self.broken.append(f"{task_id}: only the sweep saved it, and its queue was not deleted")

    def _backend(self) -> None:
        for request in self._run.world.backend.rejected:
            self.broken.append(f"the backend refused {request.path}: {request.reason}")
        elsewhere = self._run.world.elsewhere
        if elsewhere.requests or elsewhere.rejected:
            self.broken.append("a redirect was followed: another host has seen a request")

    def _dead(self) -> None:
        for headers, _ in self._observed.unknown_dead():
            self.broken.append(f"in the dead queue: {headers}")

    def _logs(self) -> None:
        for log in sorted(self._run.folder.glob("worker-*.log")):
            text = log.read_text(encoding="utf-8", errors="replace")
            if any(secret in text for secret in SECRETS):
                self.broken.append(f"{log.name} shows a secret")
            for word in ("Traceback", "handler_crashed", "job_broke"):
                if word in text:
                    self.broken.append(f"{log.name} says {word}")
