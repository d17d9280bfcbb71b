"""The observed world after everything has settled: the places of each job's data."""

from __future__ import annotations

import base64
import collections
import dataclasses
import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jobs.layout import STYLE_FILES
from jobs.record import SEQUENCES_PER_CLAIM
from sandbox.backend import ReceivedRequest
from tests.chaos.jobs import Job
from tests.chaos.reference import Facts, Kept, Places
from tests.chaos.stand_in_trainer import digest_of
from tests.chaos.timing import DEAD_QUEUE, LLM, LLM_FILES, MEDIA, STATE
from tests.chaos.world import Message, World

_WEIGHTS = "/lora.safetensors"
_MANIFEST = "manifest.json"
NEEDED = set(STYLE_FILES) - {"samples.png", "loss_curve.png", "training_report.html"}
"""Files that every model has, also one that the real trainer made."""

Notes = list[dict[str, Any]]


@dataclasses.dataclass
class Evidence:
    """The input of the verdict.

    Attributes:
        notes: The journal.
        dead: The messages of deleted dead queues.
        exact: The stand-in trained: its files' contents are known.
    """

    world: World
    folder: Path
    jobs: list[Job]
    notes: Notes
    dead: list[Message]
    exact: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A file of a model: its owner's marks, and its SHA-256."""

    task_id: str
    claim: str
    digest: str


class Observed:
    """Reads the world once.

    Attributes:
        broken: Violations that no event can explain, as sentences.
        of: The journal's notes of each task.
    """

    def __init__(self, run: Evidence) -> None:
        self.broken: list[str] = []
        self.run = run
        self.records = run.world.records()
        self.of: dict[str, Notes] = collections.defaultdict(list)
        for note in run.notes:
            if "task" in note:
                self.of[note["task"]].append(note)
        self._endings: dict[str, list[ReceivedRequest]] = collections.defaultdict(list)
        for request in run.world.backend.endings():
            self._endings[request.task_id or ""].append(request)
        self.dead = run.dead + run.world.take_all(DEAD_QUEUE)
        self._state_keys = run.world.keys(STATE)
        self._models = self._read(MEDIA, "models/")
        self._archived = self._read(STATE, "archive/")

    def endings(self, job: Job) -> list[ReceivedRequest]:
        """Each attempt to deliver an ending of the job."""
        return self._endings[job.task_id]

    def record(self, job: Job) -> dict[str, Any] | None:
        """The job's record."""
        return self.records.get(job.record_id)

    def places(self, job: Job, ignored: Collection[str] = ()) -> Places:
        """The places of a job's data.

        Args:
            job: The job.
            ignored: Keys of the state bucket to ignore.
        """
        left = [key for key in self.keys(job) if key not in ignored]
        record = self.record(job) or {"state": "none", "delivery": "none", "ending": None}
        ending = record["ending"] or {"kind": "", "code": None}
        heard = self.endings(job)
        taken = {each.webhook_id for each in heard if each.accepted or each.status == 410}
        return Places(
            record=record["state"],
            delivery=record["delivery"],
            ending=" ".join(filter(None, (ending["kind"], ending["code"]))),
            endings=len({each.webhook_id for each in heard}),
            taken=len(taken),
            dead_letters=frozenset(
                str(headers.get("x-error-code"))
                for headers, _ in self.dead
                if headers.get("x-task-id") in (job.task_id, job.record_id)
            ),
            model=self._has_model(job),
            checkpoints=frozenset({_kept(job, left)}),
            staged=any(key.startswith("staging/") for key in left),
        )

    def keys(self, job: Job) -> list[str]:
        """The keys of the job's checkpoints and staged files."""
        prefixes = (_checkpoints(job), f"staging/{job.task_id}/")
        return [key for key in self._state_keys if key.startswith(prefixes)]

    def facts(self, job: Job) -> Facts:
        """The events of a job in the journal."""
        lost = most = refused = 0
        claims = [note for note in self.of[job.task_id] if note["kind"] == "claimed"]
        for note in self.of[job.task_id]:
            if note["kind"] == "claimed" and note["state"] == "live":
                lost += 1
            elif note["kind"] == "registered":
                lost = 0
            elif note["kind"] == "released" and note["rejected"]:
                refused += 1
            most = max(most, lost)
        old = any(note["who"].endswith("-old") for note in claims)
        return Facts(
            lost_attempts=most,
            no_room=refused,
            last_release=old,
            message_deleted=job.record_id in self.run.world.sweep_allowed,
        )

    def ending_claim(self, job: Job) -> str:
        """The claim that the job's ending was made under."""
        record = self.record(job) or {}
        ending = record.get("ending") or {"body": {"sequence": 0}}
        return str(int(ending["body"]["sequence"]) // SEQUENCES_PER_CLAIM)

    def folder_of(self, style_id: int) -> dict[str, Stored]:
        """The files of a style's model."""
        return self._models.get(f"style_{style_id}", {})

    def unknown_dead(self) -> list[Message]:
        """Dead letters that are about no job of the run."""
        names = {name for job in self.run.jobs for name in (job.task_id, job.record_id)}
        return [message for message in self.dead if message[0].get("x-task-id") not in names]

    def _has_model(self, job: Job) -> bool:
        """Whether any file of the job's model exists; then the model must be complete."""
        folder, needed = f"style_{job.style_id}", NEEDED
        if job.kind == LLM:
            folder, needed = f"llm/{job.subject}/{job.task_id}", set(LLM_FILES)
        archived = self._archived.get(f"{folder}/{job.task_id}", {})
        published = {
            name: file
            for name, file in self._models.get(folder, {}).items()
            if file.task_id == job.task_id
        }
        found = archived | published
        if not found:
            return False
        where = f"{folder}: the model of {job.task_id}"
        if not needed <= set(found):
            self.broken.append(f"{where} has only {sorted(found)}")
        claims = {file.claim for file in found.values()}
        if claims != {self.ending_claim(job)}:
            self.broken.append(
                f"{where} is of claims {sorted(claims)}, its ending of {self.ending_claim(job)}"
            )
        for name, file in found.items():
            if self.run.exact and file.digest != digest_of(name, job.task_id, int(file.claim)):
                self.broken.append(f"{where}: {name} is not what was trained")
        return True

    def _read(self, bucket: str, prefix: str) -> dict[str, dict[str, Stored]]:
        """Folder to name to file; an object that S3's own checksum contradicts is broken."""
        found: dict[str, dict[str, Stored]] = collections.defaultdict(dict)
        for key in self.run.world.keys(bucket, prefix):
            answer = self.run.world.s3.get_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
            digest = hashlib.sha256(answer["Body"].read()).digest()
            stored = answer.get("ChecksumSHA256")
            if stored and stored != base64.b64encode(digest).decode():
                self.broken.append(f"{key}: its checksum differs")
            marks = answer["Metadata"]
            folder, _, name = key.removeprefix(prefix).rpartition("/")
            found[folder][name] = Stored(
                marks.get("task_id", ""), marks.get("claim", ""), digest.hex()
            )
        return found


def _checkpoints(job: Job) -> str:
    if job.kind == LLM:
        return f"checkpoints/llm/{job.task_id}/"
    return f"checkpoints/style_{job.style_id}/{job.task_id}/"


def _kept(job: Job, keys: Collection[str]) -> Kept:
    prefix = _checkpoints(job)
    lying = [key for key in keys if key.startswith(prefix)]
    if not lying:
        return Kept.NOTHING
    full = {key.removeprefix(prefix).split("/")[0] for key in lying if not key.endswith(_WEIGHTS)}
    if not full:
        return Kept.WEIGHTS
    whole = all(f"{prefix}{name}/{_MANIFEST}" in lying for name in full)
    return Kept.NEWEST if whole and len(full) == 1 else Kept.OTHER
