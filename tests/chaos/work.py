"""Invariants of work and reports: the trained epochs with worker and time, and their reports."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from typing import Any

from jobs.record import SEQUENCES_PER_CLAIM
from sandbox.backend import PROGRESS, ReceivedRequest
from tests.chaos.jobs import Job
from tests.chaos.noted import log_lines
from tests.chaos.observed import Notes, Observed
from tests.chaos.timing import CHECKPOINT_INTERVAL

TOO_MANY = 429
LONGEST_DISTURBANCE = 20.0
"""Seconds after a fault in which a message may still come back because of it."""
STALE_SECONDS = 1.5
"""How long a worker may need, once it is awake, to notice that its job is another's."""


@dataclasses.dataclass
class Work:
    """The work of a run's jobs.

    Attributes:
        twice: Jobs that were trained after their ending.
    """

    claims: int = 0
    recovered: int = 0
    epochs: int = 0
    wasted_epochs: int = 0
    worst_waste: int = 0
    twice: set[str] = dataclasses.field(default_factory=set)


class WorkLook:
    """Looks at one job after the other.

    Attributes:
        work: The sums.
        broken: Broken invariants, as sentences.
    """

    def __init__(self, observed: Observed) -> None:
        self.work = Work()
        self.broken: list[str] = []
        self._observed = observed
        self._notes = observed.run.notes
        self._logged = log_lines(observed.run.folder, "ending_not_taken")

    def at(self, job: Job) -> None:
        """Repeated epochs, runs after the ending, two claims at once, reports out of order."""
        notes = self._observed.of[job.task_id]
        record = self._observed.record(job)
        self.work.claims += record["hold"]["claim"] if record else 0
        runs = {note["claim"] for note in notes if note["kind"] == "run"}
        self.work.recovered += len(runs) > 1 and record is not None and record["state"] == "ended"
        epochs = [note for note in notes if note["kind"] == "epoch"]
        self.work.epochs += len(epochs)
        self.work.wasted_epochs += max(0, len(epochs) - job.epochs)
        self._after_the_ending_trained(job, notes)
        self._two_at_once(job, notes, epochs)
        self._repeats(job, notes)
        self._sequences(job)
        self._impatience(job)
        if any(note["kind"] == "lease_overrated" for note in notes):
            self.broken.append(f"{job.task_id}: a lease was believed to last longer than it does")

    def _after_the_ending_trained(self, job: Job, notes: Notes) -> None:
        ended = [note["t"] for note in notes if note["kind"] == "ended"]
        sent_back = [note["t"] for note in notes if note["kind"] == "redriven"]
        for run in (note for note in notes if note["kind"] == "run"):
            endings = [t for t in ended if t < run["t"]]
            # A run after an ending is allowed only if an operator has sent the job back.
            if endings and not any(endings[0] < t < run["t"] for t in sent_back):
                self.work.twice.add(job.task_id)
                self.broken.append(f"{job.task_id}: trained after its ending")
                return

    def _two_at_once(self, job: Job, notes: Notes, epochs: Notes) -> None:
        claims = {note["claim"]: note for note in notes if note["kind"] == "claimed"}
        for note in epochs:
            later = [each["t"] for claim, each in claims.items() if claim > note["claim"]]
            if later and note["t"] > self._awake(note["who"], min(later)) + STALE_SECONDS:
                self.broken.append(
                    f"{job.task_id}: claim {note['claim']} trained epoch {note['epoch']} "
                    f"{note['t'] - min(later):.1f} s after the job was taken from it"
                )

    def _repeats(self, job: Job, notes: Notes) -> None:
        """At most one interval is repeated, and the training during an upload.

        One interval more is allowed for each checkpoint that the suite has damaged.
        """
        spoilt = sum(note["kind"] == "spoilt" for note in notes)
        allowed = CHECKPOINT_INTERVAL * (1 + spoilt)
        runs = [note for note in notes if note["kind"] == "run"]
        for before, after in zip(runs, runs[1:], strict=False):
            own = [
                note
                for note in notes
                if note["kind"] == "epoch" and note["claim"] == before["claim"]
            ]
            repeated = [note for note in own if note["epoch"] > after["resumed_epoch"]]
            self.work.worst_waste = max(self.work.worst_waste, len(repeated))
            exposed = [note for note in repeated if not _uploading(notes, note)]
            if len(exposed) > allowed:
                self.broken.append(
                    f"{job.task_id}: claim {after['claim']} began at epoch "
                    f"{after['resumed_epoch']} and repeated {len(exposed)} epochs of claim "
                    f"{before['claim']} that no upload stood in the way of"
                )
            self._overlooked(job, notes, after)

    def _overlooked(self, job: Job, notes: Notes, run: dict[str, Any]) -> None:
        """A damaged checkpoint costs no older one, unless the suite also damaged S3's answers."""
        spoilt = {note["name"] for note in notes if note["kind"] == "spoilt"}
        epochs = {note["name"]: note["epoch"] for note in notes if note["kind"] == "checkpoint"}
        registered = {
            note["name"] for note in notes if note["kind"] == "registered" and note["t"] < run["t"]
        }
        sound = max((epochs.get(name, 0) for name in registered - spoilt), default=0)
        if spoilt and run["resumed_epoch"] < sound and not self._answers_spoilt(run["t"]):
            self.broken.append(
                f"{job.task_id}: claim {run['claim']} began at epoch {run['resumed_epoch']} and "
                f"repeated what a whole checkpoint of epoch {sound} held"
            )

    def _answers_spoilt(self, until: float) -> bool:
        return any(
            note["kind"] == "fault"
            and note["name"] in ("S3_CUT", "S3_FLIPPED")
            and until - LONGEST_DISTURBANCE <= note["t"] <= until
            for note in self._notes
        )

    def _awake(self, who: str, since: float) -> float:
        """The earliest time at which the worker could notice an event of that time."""
        for start, end in self._frozen(who):
            if start - 0.5 <= since <= end:
                return end
        return since

    def _frozen(self, who: str) -> Iterator[tuple[float, float]]:
        start = None
        for note in self._notes:
            if note.get("slot") == who and note["kind"] == "frozen":
                start = note["t"]
            elif note.get("slot") == who and note["kind"] == "thawed" and start is not None:
                yield start, note["t"]

    def _sequences(self, job: Job) -> None:
        """Sequence numbers rise within a claim, and the ending has the highest."""
        highest: dict[int, int] = collections.defaultdict(int)
        requests = self._observed.run.world.backend.requests
        heard = [each for each in requests if each.task_id == job.task_id]
        endings = {each.body["sequence"] for each in heard if each.path != PROGRESS}
        for request in heard:
            number = request.body["sequence"]
            claim = number // SEQUENCES_PER_CLAIM
            if request.path == PROGRESS and number <= highest[claim]:
                self.broken.append(f"{job.task_id}: sequence {number} after {highest[claim]}")
            highest[claim] = max(highest[claim], number)
            if request.path == PROGRESS and endings and number > max(endings):
                self.broken.append(f"{job.task_id}: progress {number} beyond its ending")
        self._progress_after_the_ending(job, heard)

    def _progress_after_the_ending(self, job: Job, heard: list[ReceivedRequest]) -> None:
        told = [each for each in heard if each.path != PROGRESS and each.accepted]
        if told and any(
            each.path == PROGRESS
            and each.received_at > told[0].received_at
            and _claim(each) == _claim(told[0])
            for each in heard
        ):
            self.broken.append(f"{job.task_id}: progress of the same claim after its ending")

    def _impatience(self, job: Job) -> None:
        """A backend's `Retry-After` was respected, unless another cause had the ending checked."""
        heard = self._observed.endings(job)
        asked = self._observed.run.world.mood.asked
        if self._unseen(job, heard):
            return
        for before, after in zip(heard, heard[1:], strict=False):
            waited = after.received_at - before.received_at
            wanted = asked.get((before.webhook_id, before.received_at), 0.0)
            if (
                before.status == TOO_MANY
                and after.webhook_id == before.webhook_id
                and waited < wanted * 0.9
                and not self._disturbed(before.received_at, after.received_at)
            ):
                self.broken.append(
                    f"{job.task_id}: its ending was tried again after {waited:.1f} s, though the "
                    f"backend asked for {wanted} s"
                )

    def _unseen(self, job: Job, heard: list[ReceivedRequest]) -> bool:
        """Whether an answer 429 came too late for the worker, or did not arrive."""
        seen = sum(
            line.get("task_id") == job.task_id and line.get("status") == TOO_MANY
            for line in self._logged
        )
        return bool(seen < sum(request.status == TOO_MANY for request in heard))

    def _disturbed(self, since: float, until: float) -> bool:
        """Whether a worker or the broker was hit then: a returned message is checked."""
        return any(
            note["kind"] == "fault"
            and not note["name"].startswith(("ENDING_", "BACKEND_", "S3_"))
            and since - LONGEST_DISTURBANCE <= note["t"] <= until
            for note in self._notes
        )

    def was_in_flight(self, job: Job, claim: int) -> bool:
        """Whether a worker was suspended in the middle of a request when the job ended.

        It writes this one object when it continues. Nothing refers to it.
        """
        notes = self._observed.of[job.task_id]
        who = [n["who"] for n in notes if n["kind"] == "claimed" and n["claim"] == claim]
        ended = [note["t"] for note in notes if note["kind"] == "ended"]
        return (
            claim < int(self._observed.ending_claim(job))
            and bool(who and ended)
            and any(start <= ended[0] <= end for start, end in self._frozen(who[0]))
        )


def _claim(request: ReceivedRequest) -> Any:
    return request.body["sequence"] // SEQUENCES_PER_CLAIM


def _uploading(notes: Notes, epoch: dict[str, Any]) -> bool:
    """Whether an upload of this claim was under way when the epoch ended."""
    for note in notes:
        if note["kind"] == "upload" and note["claim"] == epoch["claim"]:
            over = [
                each["t"]
                for each in notes
                if each["kind"] == "upload_over"
                and (each["claim"], each["name"]) == (note["claim"], note["name"])
            ]
            # An upload without an end was under way when its worker died.
            if note["t"] - 0.2 <= epoch["t"] <= (over[0] if over else float("inf")) + 0.2:
                return True
    return False
