"""Sending back jobs by their records, and later orders of a style, on a real RabbitMQ and S3."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from cli.jobs.redrive import Redrive
from config import Settings
from consumer.life.endings import failed, parked
from jobs import message as messages
from jobs.record import DeliveryState, Ending, EndingKind, JobRecord, JobRequest, OwedCopy, State
from local.rabbitmq_node import RabbitMqNode
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from services.broker.client import properties_of
from services.broker.settlement import OWN_COPY, Publication
from services.records.job_lease import JobLease
from services.records.job_records import Claimed, JobRecords
from services.s3.s3_service import S3Service
from tests.integration.consumer.broker import Client, make_settings
from utils.errors import GpuOutOfMemory, TrainingServerError, WorkerCrashed

MORNING, NOON = "2026-01-20T08:00:00Z", "2026-01-20T12:00:00.000+00:00"
OWED = OwedCopy("WORKER_CRASHED", "it broke", 3)


@pytest.fixture(name="settings")
def _settings(rabbitmq: RabbitMqNode, queue: str, s3_server: S3Server, bucket: str) -> Settings:
    return make_settings(
        rabbitmq,
        queue,
        aws_storage_bucket_name=bucket,
        aws_endpoint_url_s3=s3_server.endpoint,
        aws_access_key_id=ACCESS_KEY_ID,
        aws_secret_access_key=SECRET_ACCESS_KEY,
    )


@dataclasses.dataclass
class _Jobs:
    """The jobs of one bucket, and the broker that has lost their messages."""

    settings: Settings
    s3: S3Service
    s3_server: S3Server
    client: Client

    def __post_init__(self) -> None:
        self.bucket = self.settings.storage.state_bucket_name
        self.records = JobRecords(self.s3, self.bucket, owner="one", lease_seconds=5)

    def body(self, task_id: str, style_id: int = 7, created_at: str = MORNING) -> bytes:
        data = {"style_id": style_id, "images": [f"s3://{self.bucket}/a.jpg"]}
        return json.dumps({"task_id": task_id, "data": data, "created_at": created_at}).encode()

    def claimed(self, task_id: str, **order: Any) -> JobLease:
        """A job that a worker holds."""
        body = self.body(task_id, **order)
        job = messages.parse(body, message_id=None, kinds=self.settings.kinds())
        claim = self.records.claim(
            JobRequest(job.task_id, job.kind, job.subject, job.identity, job.understood(), None)
        )
        assert isinstance(claim, Claimed)
        return claim.lease

    def failed(
        self,
        task_id: str,
        error: TrainingServerError | None = None,
        owed: OwedCopy | None = None,
        **order: Any,
    ) -> None:
        """A job that failed, of which the backend has heard."""
        lease = self.claimed(task_id, **order)
        what = error or WorkerCrashed("it broke")
        style_id = lease.record.style_id
        lease.end(failed({"style_id": style_id}, task_id, what, attempts=3, sequence=1), owed)
        lease.mark_delivered()

    def set_aside(self, task_id: str) -> None:
        """A job whose ending the backend refused for good."""
        lease = self.claimed(task_id)
        lease.end(Ending(EndingKind.COMPLETE, {"style_id": 7}))
        lease.set_aside("the backend answered 400: no", OWED)
        lease.paid()

    def completed(self, task_id: str, **order: Any) -> None:
        """A job that has completed."""
        lease = self.claimed(task_id, **order)
        lease.end(Ending(EndingKind.COMPLETE, {"style_id": lease.record.style_id}))
        lease.mark_delivered()

    def dead_letter(
        self, task_id: str, code: str = "WORKER_CRASHED", *, cut: bool = False, **order: Any
    ) -> None:
        """A copy of a job's message in the dead queue, or of its beginning."""
        letter = Publication.to_dead(
            self.body(task_id, **order), code=code, message="it broke", task_id=task_id, attempts=3
        )
        if cut:
            letter = letter.cut()
            letter = dataclasses.replace(letter, body=letter.body[:20])
        queue = f"{self.settings.broker.training_queue}.dead"
        with self.client.channel() as channel:
            channel.queue_declare(queue, durable=True)
            channel.basic_publish("", queue, letter.body, properties_of(letter), True)

    def model(self, style_id: int, task_id: str, ordered_at: str | None) -> None:
        """A model in a style's folder."""
        metadata = {"task_id": task_id, "claim": "1"}
        self.s3_server.client().put_object(
            Bucket=self.settings.storage.model_bucket_name,
            Key=f"models/style_{style_id}/lora_weights.safetensors",
            Body=b"weights",
            Metadata=metadata | ({"ordered-at": ordered_at} if ordered_at else {}),
        )

    def record(self, task_id: str) -> JobRecord:
        """A job's record."""
        record = self.records.read(task_id)
        assert record is not None
        return record

    @property
    def redrive(self) -> Redrive:
        """As a person who types the command has it."""
        return Redrive(self.settings.broker, self.settings.storage, self.settings.kinds(), self.s3)


@pytest.fixture(name="jobs")
def _jobs(settings: Settings, s3: S3Service, s3_server: S3Server, client: Client) -> _Jobs:
    assert s3_server.endpoint and REGION
    return _Jobs(settings, s3, s3_server, client)


def test_a_job_without_a_dead_letter_is_listed_and_sent_back_by_its_id(
    jobs: _Jobs, client: Client, queue: str
) -> None:
    jobs.failed("lost")
    jobs.failed("other")
    (found, *others), _ = jobs.redrive.look()
    assert not found.in_dead_queue and len(others) == 1
    (one,), _ = jobs.redrive.send_back({"lost"})
    assert one.sent_back and "the beginning" in one.outcome
    assert jobs.record("lost").state is State.LIVE and jobs.record("other").state is State.ENDED
    taken = client.get(queue)
    assert taken is not None and taken[0].headers == {OWN_COPY: True}
    again = messages.parse(taken[1], message_id=taken[0].message_id, kinds=jobs.settings.kinds())
    assert again.identity == jobs.record("lost").identity and again.task_id == "lost"


def test_the_option_all_sends_back_the_dead_queue_and_no_job_whose_copy_was_removed(
    jobs: _Jobs, client: Client, queue: str
) -> None:
    jobs.failed("removed")
    jobs.failed("there")
    jobs.dead_letter("there")
    found, _ = jobs.redrive.look()
    assert [(each.task_id, each.in_dead_queue) for each in found] == [
        ("there", True),
        ("removed", False),
    ]
    (one,), _ = jobs.redrive.send_back(None)
    assert (one.task_id, one.sent_back) == ("there", True)
    assert client.waiting(queue) == 1 and jobs.record("removed").state is State.ENDED


def test_an_ending_that_was_set_aside_is_sent_again_by_its_record(
    jobs: _Jobs, client: Client, queue: str
) -> None:
    jobs.set_aside("refused")
    (found,), _ = jobs.redrive.look()
    assert not found.trains and "400" in found.reason
    (one,), _ = jobs.redrive.send_back({"refused"})
    assert one.sent_back and "nothing is trained" in one.outcome
    taken = client.get(f"{queue}.endings")
    assert taken is not None and json.loads(taken[1])["task_id"] == "refused"
    assert jobs.record("refused").delivery is DeliveryState.PENDING and client.waiting(queue) == 0


def test_a_job_that_still_owes_its_dead_letter_is_sent_back_and_owes_nothing(
    jobs: _Jobs, client: Client, queue: str
) -> None:
    jobs.failed("owing", owed=OWED)
    assert jobs.record("owing").owed == OWED
    (one,), _ = jobs.redrive.send_back({"owing"})
    assert one.sent_back and client.waiting(queue) == 1
    record = jobs.record("owing")
    assert record.state is State.LIVE and record.owed is None


def test_a_job_that_another_attempt_cannot_help_stays_and_the_reason_is_printed(
    jobs: _Jobs, client: Client, queue: str
) -> None:
    jobs.failed("large", GpuOutOfMemory("too large"))
    jobs.completed("done")
    jobs.claimed("live")
    assert jobs.redrive.look() == ([], 0)
    done, _ = jobs.redrive.send_back({"large", "done", "live", "unknown"})
    outcomes = {one.task_id: one.outcome for one in done}
    assert "GPU_OOM" in outcomes["large"] and "completed" in outcomes["done"]
    assert "not ended" in outcomes["live"] and "unknown" not in outcomes
    assert not any(one.sent_back for one in done)
    jobs.dead_letter("unrelated", "INVALID_MESSAGE")  # makes the queues
    assert client.waiting(queue) == 0


def test_a_cut_dead_letter_is_sent_back_in_full_from_its_record(
    jobs: _Jobs, client: Client, queue: str
) -> None:
    jobs.failed("large")
    jobs.dead_letter("large", cut=True)
    jobs.dead_letter("unknown", cut=True)
    done, _ = jobs.redrive.send_back(None)
    outcomes = {one.task_id: (one.sent_back, one.outcome) for one in done}
    assert outcomes["large"][0] and not outcomes["unknown"][0]
    assert "only the beginning" in outcomes["unknown"][1]
    taken = client.get(queue)
    assert taken is not None
    again = messages.parse(taken[1], message_id=None, kinds=jobs.settings.kinds())
    assert again.identity == jobs.record("large").identity
    assert client.waiting(queue) == 0 and client.waiting(f"{queue}.dead") == 1


def test_a_dead_letter_of_the_endings_queue_returns_to_that_queue(
    jobs: _Jobs, client: Client, queue: str
) -> None:
    on_its_way = parked("some-job", b"its message", tries=3, delay=None)
    dead = Publication.to_dead(
        on_its_way.body, code="STORAGE_FAILED", message="given up", task_id="some-job"
    )
    with client.channel() as channel:
        channel.queue_declare(f"{queue}.dead", durable=True)
        channel.basic_publish("", f"{queue}.dead", dead.body, properties_of(dead), True)
    (found,), _ = jobs.redrive.look()
    assert not found.trains
    (one,), _ = jobs.redrive.send_back(None)
    assert one.sent_back and "nothing is trained" in one.outcome
    taken = client.get(f"{queue}.endings")
    assert taken is not None and json.loads(taken[1])["message"] == "its message"
    assert client.waiting(queue) == 0


@pytest.mark.parametrize("later", ["live", "completed", "published", "published long ago"])
def test_the_option_all_leaves_out_a_job_whose_style_has_a_later_order(
    jobs: _Jobs, client: Client, queue: str, later: str
) -> None:
    jobs.failed("older", created_at=MORNING)
    jobs.dead_letter("older", created_at=MORNING)
    match later:
        case "live":
            jobs.claimed("newer", created_at=NOON)
        case "completed":
            jobs.completed("newer", created_at=NOON)
        case "published":  # by a job whose record is gone
            jobs.model(7, "newer", NOON)
        case _:  # by a release that did not write down when the job was ordered
            jobs.completed("newer", created_at=NOON)
            jobs.model(7, "newer", None)
    (found,), _ = jobs.redrive.look()
    assert "newer" in found.superseded and "2026-01-20 12:00 UTC" in found.superseded
    (one,), _ = jobs.redrive.send_back(None)
    assert one.left_out and not one.sent_back and "newer" in one.outcome
    assert client.waiting(queue) == 0 and client.waiting(f"{queue}.dead") == 1
    (one,), _ = jobs.redrive.send_back(None, include_superseded=True)
    assert one.sent_back and client.waiting(queue) == 1


def test_a_superseded_job_is_sent_back_if_it_is_named(
    jobs: _Jobs, client: Client, queue: str
) -> None:
    jobs.failed("older", created_at=MORNING)
    jobs.completed("newer", created_at=NOON)
    (one,), _ = jobs.redrive.send_back({"older"})
    assert one.sent_back and client.waiting(queue) == 1


@pytest.mark.parametrize(
    ("earlier", "failed_too"), [(MORNING, False), (NOON, True)], ids=["an older order", "it failed"]
)
def test_an_order_that_replaces_nothing_supersedes_nothing(
    jobs: _Jobs, earlier: str, failed_too: bool
) -> None:
    jobs.failed("job", created_at=NOON if not failed_too else MORNING)
    jobs.dead_letter("job")
    if failed_too:
        jobs.failed("other", created_at=earlier)
    else:
        jobs.completed("other", created_at=earlier)
    found = {each.task_id: each.superseded for each in jobs.redrive.look()[0]}
    assert found["job"] == ""


def test_a_style_with_a_published_model_is_a_warning(jobs: _Jobs) -> None:
    jobs.failed("retrain", created_at=NOON)
    jobs.failed("first", style_id=8)
    jobs.model(7, "sold", MORNING)
    found = {each.task_id: each.at_stake for each in jobs.redrive.look()[0]}
    assert "Style 7 has a published model (of job sold)" in found["retrain"]
    assert "marks the whole style as failed" in found["retrain"] and found["first"] == ""
