"""The count at the end, and the invariants: what was promised, looked for in what was left behind
and in what everybody noted."""

from __future__ import annotations

import base64
import collections
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandbox.backend import COMPLETE, ReceivedRequest
from services.job_record import SEQUENCES_PER_CLAIM
from tests.chaos.jobs import Job
from tests.chaos.stand_in_trainer import FILES, digest_of
from tests.chaos.timing import CHECKPOINT_INTERVAL, DEAD_QUEUE, MEDIA, STATE
from tests.chaos.world import SECRETS, Message, World

STALE_SECONDS = 1.5
"""How long a worker may need, once it is awake, to notice that its job is another's."""


@dataclasses.dataclass
class Count:
    """A run in numbers.

    Attributes:
        crash_points: How often a process was killed at each.
    """

    published: int = 0
    ended: int = 0
    lost: int = 0
    duplicated: int = 0
    recovered: int = 0
    claims: int = 0
    epochs: int = 0
    wasted_epochs: int = 0
    worst_waste: int = 0
    crash_points: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass
class Evidence:
    """What the verdict looks at.

    Attributes:
        notes: The journal.
        dead: What dead queues held that were deleted.
        exact: The stand-in trained: its files' contents are known.
    """

    world: World
    folder: Path
    jobs: list[Job]
    notes: list[dict[str, Any]]
    dead: list[Message]
    exact: bool


class Verdict:
    """Counts, and collects what is broken as sentences."""

    def __init__(self, run: Evidence) -> None:
        self.count = Count(published=len(run.jobs))
        self.broken: list[str] = []
        self._run = run
        self._records = run.world.records()
        self._of: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        for note in run.notes:
            if "task" in note:
                self._of[note["task"]].append(note)

    def reach(self) -> None:
        """Look at everything."""
        for job in self._run.jobs:
            self._endings(job)
            if job.valid:
                self._record(job)
                self._work(job)
                self._sequences(job)
        self.count.crash_points.update(
            note["point"] for note in self._run.notes if note["kind"] == "crash_point"
        )
        self._models()
        self._leftovers()
        self._backend()
        self._dead()
        self._logs()

    def _endings(self, job: Job) -> None:
        heard = self._run.world.backend.endings(job.task_id)
        told = [each for each in heard if each.status != 429 and each.status < 500]
        identities = {each.webhook_id for each in heard}
        if not any(each.accepted for each in heard):
            self.count.lost += 1
            self.broken.append(f"{job.task_id}: lost, the backend has accepted no ending")
        else:
            self.count.ended += 1
        if len(identities) > 1:
            self.count.duplicated += 1
            self.broken.append(f"{job.task_id}: {len(identities)} endings: {sorted(identities)}")
        kinds = {(each.path, each.body.get("error_code")) for each in told}
        if job.valid and any(path != COMPLETE for path, _ in kinds):
            self.broken.append(f"{job.task_id}: a valid job ended with {sorted(map(str, kinds))}")
        if not job.valid and any(code != "INVALID_MESSAGE" for _, code in kinds):
            self.broken.append(f"{job.task_id}: an invalid message ended with {kinds}")

    def _record(self, job: Job) -> None:
        record = self._records.get(job.task_id)
        if record is None:
            self.broken.append(f"{job.task_id}: has no record")
            return
        self.count.claims += record["hold"]["claim"]
        trained_by = {note["claim"] for note in self._of[job.task_id] if note["kind"] == "run"}
        self.count.recovered += len(trained_by) > 1 and record["state"] == "ended"
        if record["delivery"] != "delivered":
            self.broken.append(f"{job.task_id}: its record says {record['delivery']}")

    def _work(self, job: Job) -> None:
        """Epochs done twice, runs after the ending, two claims at once."""
        notes = self._of[job.task_id]
        ended = [note["t"] for note in notes if note["kind"] == "ended"]
        epochs = [note for note in notes if note["kind"] == "epoch"]
        self.count.epochs += len(epochs)
        self.count.wasted_epochs += max(0, len(epochs) - job.epochs)
        if ended and any(note["kind"] == "run" and note["t"] > ended[0] for note in notes):
            self.count.duplicated += 1
            self.broken.append(f"{job.task_id}: trained after its ending")
        claims = {note["claim"]: note for note in notes if note["kind"] == "claimed"}
        for note in epochs:
            later = [each["t"] for claim, each in claims.items() if claim > note["claim"]]
            if later and note["t"] > self._awake(note["who"], min(later)) + STALE_SECONDS:
                self.broken.append(
                    f"{job.task_id}: claim {note['claim']} trained epoch {note['epoch']} "
                    f"{note['t'] - min(later):.1f} s after the job was taken from it"
                )
        self._repeats(job, notes)

    def _repeats(self, job: Job, notes: list[dict[str, Any]]) -> None:
        """At most an interval is repeated, and what was trained during an upload."""
        runs = [note for note in notes if note["kind"] == "run"]
        for before, after in zip(runs, runs[1:], strict=False):
            own = [
                note
                for note in notes
                if note["kind"] == "epoch" and note["claim"] == before["claim"]
            ]
            repeated = [note for note in own if note["epoch"] > after["resumed_epoch"]]
            self.count.worst_waste = max(self.count.worst_waste, len(repeated))
            exposed = [note for note in repeated if not self._uploading(notes, note)]
            if len(exposed) > CHECKPOINT_INTERVAL:
                self.broken.append(
                    f"{job.task_id}: claim {after['claim']} began at epoch "
                    f"{after['resumed_epoch']} and repeated {len(exposed)} epochs of claim "
                    f"{before['claim']} that no upload stood in the way of"
                )

    def _uploading(self, notes: list[dict[str, Any]], epoch: dict[str, Any]) -> bool:
        """Whether an upload of this claim was under way when the epoch ended."""
        for note in notes:
            if note["kind"] == "upload" and note["claim"] == epoch["claim"]:
                over = [
                    each["t"]
                    for each in notes
                    if each["kind"] == "upload_over"
                    and (each["claim"], each["name"]) == (note["claim"], note["name"])
                ]
                # One that never came to its end was under way when its worker died.
                if note["t"] - 0.2 <= epoch["t"] <= (over[0] if over else float("inf")) + 0.2:
                    return True
        return False

    def _awake(self, who: str, since: float) -> float:
        """When the worker could first have noticed something that happened then."""
        for start, end in self._frozen(who):
            if start - 0.5 <= since <= end:
                return end
        return since

    def _frozen(self, who: str) -> Iterator[tuple[float, float]]:
        start = None
        for note in self._run.notes:
            if note.get("slot") == who and note["kind"] == "frozen":
                start = note["t"]
            elif note.get("slot") == who and note["kind"] == "thawed" and start is not None:
                yield start, note["t"]

    def _sequences(self, job: Job) -> None:
        """They rise within a claim, and the ending has the highest."""
        highest: dict[int, int] = collections.defaultdict(int)
        heard = [each for each in self._run.world.backend.requests if each.task_id == job.task_id]
        endings = {each.body["sequence"] for each in heard if each.path == COMPLETE}
        for request in heard:
            number = request.body["sequence"]
            claim = number // SEQUENCES_PER_CLAIM
            if request.path != COMPLETE and number <= highest[claim]:
                self.broken.append(f"{job.task_id}: sequence {number} after {highest[claim]}")
            highest[claim] = max(highest[claim], number)
            if request.path != COMPLETE and endings and number > max(endings):
                self.broken.append(f"{job.task_id}: progress {number} beyond its ending")
        self._after_the_ending(job, heard)

    def _after_the_ending(self, job: Job, heard: list[ReceivedRequest]) -> None:
        said = [each for each in heard if each.path == COMPLETE and each.accepted]
        if said and any(
            each.path != COMPLETE
            and each.received_at > said[0].received_at
            and each.body["sequence"] // SEQUENCES_PER_CLAIM
            == said[0].body["sequence"] // SEQUENCES_PER_CLAIM
            for each in heard
        ):
            self.broken.append(f"{job.task_id}: progress of the same claim after its ending")

    def _models(self) -> None:
        styles: dict[int, list[Job]] = collections.defaultdict(list)
        for job in self._run.jobs:
            if job.valid:
                styles[job.style_id].append(job)
        for style_id, jobs in styles.items():
            owner = self._model(style_id, jobs)
            for job in jobs:
                if owner not in (None, job.task_id):
                    self._archived(style_id, job)

    def _model(self, style_id: int, jobs: list[Job]) -> str | None:
        """The style's folder holds all files of one run, of an ending's claim. Whose."""
        prefix = f"models/style_{style_id}/"
        found = self._objects(MEDIA, prefix)
        marks = {(mark.get("task_id"), mark.get("claim")) for mark, _ in found.values()}
        if not set(FILES) - {"samples.png", "loss_curve.png", "training_report.html"} <= set(found):
            self.broken.append(f"style {style_id}: has only {sorted(found)}")
            return None
        if len(marks) != 1:
            self.broken.append(f"style {style_id}: its files are of several runs: {marks}")
            return None
        task_id, claim = marks.pop()
        wanted = {job.task_id: self._ending_claim(job.task_id) for job in jobs}
        if task_id not in wanted or str(wanted[task_id]) != claim:
            self.broken.append(
                f"style {style_id}: its files are of {task_id}, claim {claim}; endings: {wanted}"
            )
        for name, (_, digest) in found.items():
            if self._run.exact and digest != digest_of(name, str(task_id), int(claim or 0)):
                self.broken.append(f"style {style_id}: {name} is not what {task_id} made")
        return task_id

    def _archived(self, style_id: int, job: Job) -> None:
        found = self._objects(STATE, f"archive/style_{style_id}/{job.task_id}/")
        claim = str(self._ending_claim(job.task_id))
        if {mark.get("claim") for mark, _ in found.values()} != {claim} or (
            self._run.exact and set(found) != set(FILES)
        ):
            self.broken.append(
                f"style {style_id}: the archive of {job.task_id}, claim {claim}, has "
                f"{ {name: mark.get('claim') for name, (mark, _) in found.items()} }"
            )

    def _ending_claim(self, task_id: str) -> int:
        record = self._records.get(task_id) or {}
        ending = record.get("ending") or {"body": {"sequence": 0}}
        return int(ending["body"]["sequence"]) // SEQUENCES_PER_CLAIM

    def _objects(self, bucket: str, prefix: str) -> dict[str, tuple[dict[str, str], str]]:
        """Name to metadata and SHA-256; one that S3's own checksum contradicts is broken."""
        found = {}
        for key in self._run.world.keys(bucket, prefix):
            answer = self._run.world.s3.get_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
            digest = hashlib.sha256(answer["Body"].read()).digest()
            stored = answer.get("ChecksumSHA256")
            if stored and stored != base64.b64encode(digest).decode():
                self.broken.append(f"{key}: its checksum differs")
            found[key.removeprefix(prefix)] = (answer["Metadata"], digest.hex())
        return found

    def _leftovers(self) -> None:
        """After the endings nothing is staged, and of the checkpoints the LoRAs' weights stay."""
        keys = self._run.world.keys(STATE, "staging/")
        keys += [
            key
            for key in self._run.world.keys(STATE, "checkpoints/")
            if not key.endswith("/lora.safetensors")
        ]
        left = [key for key in keys if not self._was_in_flight(key)]
        if left:
            self.broken.append(f"{len(left)} objects were left behind, {left[0]} among them")

    def _was_in_flight(self, key: str) -> bool:
        """A worker that is frozen in the middle of a request writes this one object when it wakes,
        be it after another claim's ending and its clearing up. Nothing points to it.
        """
        mark = self._run.world.s3.head_object(Bucket=STATE, Key=key)["Metadata"]
        task_id, claim = mark["task_id"], int(mark["claim"])
        who = [
            note["who"]
            for note in self._of[task_id]
            if note["kind"] == "claimed" and note["claim"] == claim
        ]
        ended = [note["t"] for note in self._of[task_id] if note["kind"] == "ended"]
        return (
            claim < self._ending_claim(task_id)
            and bool(who and ended)
            and any(start <= ended[0] <= end for start, end in self._frozen(who[0]))
        )

    def _backend(self) -> None:
        for request in self._run.world.backend.rejected:
            self.broken.append(f"the backend refused {request.path}: {request.reason}")
        elsewhere = self._run.world.elsewhere
        if elsewhere.requests or elsewhere.rejected:
            self.broken.append("a redirect was followed: another host has seen a request")

    def _dead(self) -> None:
        dead = self._run.dead + self._run.world.take_all(DEAD_QUEUE)
        invalid = {job.task_id: job for job in self._run.jobs if not job.valid}
        seen = collections.Counter(headers.get("x-task-id") for headers, _ in dead)
        for headers, _ in dead:
            if headers.get("x-task-id") not in invalid:
                self.broken.append(f"in the dead queue: {headers}")
        for task_id in invalid.keys() - seen.keys():
            self.broken.append(f"{task_id}: the invalid message is not in the dead queue")

    def _logs(self) -> None:
        for log in sorted(self._run.folder.glob("worker-*.log")):
            text = log.read_text(encoding="utf-8", errors="replace")
            if any(secret in text for secret in SECRETS):
                self.broken.append(f"{log.name} shows a secret")
            for word in ("Traceback", "handler_crashed", "job_broke"):
                if word in text:
                    self.broken.append(f"{log.name} says {word}")
