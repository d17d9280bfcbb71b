"""The dead queue on a real RabbitMQ: listed without changes, emptied only after a safe copy."""

from __future__ import annotations

import json

import pytest

from cli.jobs.dead_queue import MOST_RETURNS, DeadLetter, go_through
from cli.jobs.redrive import Redrive, Redriven, Waiting
from config import Settings
from consumer.life.endings import failed
from jobs import kinds
from jobs import message as messages
from jobs.addresses import AddressRules
from jobs.kinds import Kinds
from jobs.layout import record_at
from jobs.record import JobRequest, State
from local.rabbitmq_node import RabbitMqNode
from sandbox.s3_server import ACCESS_KEY_ID, SECRET_ACCESS_KEY, S3Server
from services.broker.client import properties_of
from services.broker.settlement import Publication
from services.records.job_records import Claimed, JobRecords
from services.s3.s3_service import S3Service
from tests.integration.consumer.broker import Client, make_settings
from utils.errors import BrokerError, WorkerCrashed


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


def _die(
    client: Client, queue: str, *letters: Publication, arguments: dict[str, str] | None = None
) -> None:
    with client.channel() as channel:
        channel.queue_declare(f"{queue}.dead", durable=True, arguments=arguments)
        for letter in letters:
            channel.basic_publish("", f"{queue}.dead", letter.body, properties_of(letter), True)


def _letter(
    task_id: str, code: str = "WORKER_CRASHED", style_id: int = 7, bucket: str = "media"
) -> Publication:
    order = {"style_id": style_id, "image_urls": [f"s3://{bucket}/a.jpg"], "task_id": task_id}
    return Publication.to_dead(
        json.dumps(order).encode(), code=code, message="it broke", task_id=task_id, attempts=3
    )


def _end(records: JobRecords, settings: Settings, letter: Publication, *, told: bool) -> None:
    """Have the letter's job end in `failed`."""
    job = messages.parse(letter.body, message_id=None, kinds=settings.kinds())
    claim = records.claim(
        JobRequest(job.task_id, job.kind, job.subject, job.identity, job.understood(), None)
    )
    assert isinstance(claim, Claimed)
    error = WorkerCrashed("it broke")
    claim.lease.end(
        failed({"style_id": job.spec.style_id}, job.task_id, error, attempts=3, sequence=1)
    )
    if told:
        claim.lease.mark_delivered()


def redrive(settings: Settings, s3: S3Service) -> Redrive:
    """The command's work with these settings."""
    return Redrive(settings.broker, settings.storage, settings.kinds(), s3)


def look(settings: Settings, s3: S3Service) -> list[Waiting]:
    return redrive(settings, s3).look()[0]


def send_back(
    settings: Settings, s3: S3Service, chosen: set[str] | None, **how: bool
) -> list[Redriven]:
    return redrive(settings, s3).send_back(chosen, **how)[0]


def only(redriven: list[Redriven]) -> Redriven:
    assert len(redriven) == 1
    return redriven[0]


def test_looking_takes_nothing(
    client: Client, queue: str, settings: Settings, s3: S3Service
) -> None:
    _die(client, queue, _letter("one"), _letter("two", "INVALID_MESSAGE"))
    for _ in range(2):
        letters, more = redrive(settings, s3).look()
        assert [(each.task_id, each.code, each.attempts) for each in letters] == [
            ("one", "WORKER_CRASHED", 3),
            ("two", "INVALID_MESSAGE", 3),
        ]
        assert more == 0
    assert client.waiting(f"{queue}.dead") == 2


def test_a_dead_queue_that_does_not_exist_is_empty(settings: Settings, s3: S3Service) -> None:
    assert redrive(settings, s3).look() == ([], 0)


def test_letters_beyond_the_limit_are_counted_and_left(
    client: Client, queue: str, settings: Settings
) -> None:
    _die(client, queue, *(_letter(str(number)) for number in range(3)))
    seen: list[DeadLetter] = []
    assert go_through(settings.broker, seen.append, limit=2) == 1
    assert [letter.task_id for letter in seen] == ["0", "1"]
    assert client.waiting(f"{queue}.dead") == 3


def test_a_job_that_was_given_up_is_sent_back_with_a_live_record_and_the_others_stay(
    client: Client, queue: str, settings: Settings, s3: S3Service, bucket: str
) -> None:
    records = JobRecords(s3, bucket, owner="one", lease_seconds=5)
    chosen, other = _letter("chosen", bucket=bucket), _letter("other", bucket=bucket)
    for letter in (chosen, other):
        _end(records, settings, letter, told=True)
    _die(client, queue, chosen, other)
    (one,), more = redrive(settings, s3).send_back({"chosen"})
    assert (one.task_id, one.sent_back, more) == ("chosen", True, 0)
    taken = client.get(queue)
    assert taken is not None and taken[1] == chosen.body
    assert taken[0].message_id == "chosen" and taken[0].delivery_mode == 2
    assert not taken[0].headers, "what was said of its death is not said of its life"
    assert [letter.task_id for letter in look(settings, s3)] == ["other"]
    states = {name: records.read(name) for name in ("chosen", "other")}
    assert [each and each.state for each in states.values()] == [State.LIVE, State.ENDED]


def test_a_job_of_another_kind_is_sent_back_to_the_queue_of_its_kind(
    client: Client,
    queue: str,
    settings: Settings,
    s3: S3Service,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(kinds.REGISTRY, "toy", "tests.toy.kind:ToyKind")
    order = {"task_id": "toy-1", "type": "toy_training", "data": {"name": "seven"}}
    letter = Publication.to_dead(
        json.dumps(order).encode(), code="INVALID_MESSAGE", message="no text", task_id="toy-1"
    )
    _die(client, queue, letter)
    both = Kinds({}, addresses=AddressRules("media", ("media",)), served=("style", "toy"))
    (one,), _ = Redrive(settings.broker, settings.storage, both, s3).send_back({"toy-1"})
    assert one.sent_back
    assert client.waiting(queue) == 0 and client.waiting(f"{queue}.dead") == 0
    taken = client.get(f"{queue}.toy")
    assert taken is not None and taken[1] == letter.body


def test_a_job_whose_failure_the_backend_does_not_know_stays(
    client: Client, queue: str, settings: Settings, s3: S3Service, bucket: str
) -> None:
    letter = _letter("unheard", bucket=bucket)
    _end(JobRecords(s3, bucket, owner="one", lease_seconds=5), settings, letter, told=False)
    _die(client, queue, letter)
    one = only(send_back(settings, s3, None))
    assert not one.sent_back and "does not know of the failure" in one.outcome
    assert client.waiting(f"{queue}.dead") == 1 and client.waiting(queue) == 0


def test_a_refused_message_is_sent_back_as_it_was_published(
    client: Client, queue: str, settings: Settings, s3: S3Service
) -> None:
    body = b'{"style_id": 7, "image_urls": ["s3://elsewhere/a.jpg"]}'
    letter = Publication.to_dead(body, code="INVALID_MESSAGE", message="bucket", task_id=None)
    _die(client, queue, letter)
    one = only(send_back(settings, s3, None))
    taken = client.get(queue)
    assert one.sent_back and taken is not None and taken[1] == body
    assert taken[0].message_id is None, "an id of ours would make it another message"
    assert client.waiting(f"{queue}.dead") == 0


def test_a_refused_ending_goes_to_the_endings_and_nothing_is_trained(
    client: Client, queue: str, settings: Settings, s3: S3Service, bucket: str
) -> None:
    records = JobRecords(s3, bucket, owner="one", lease_seconds=5)
    letter = _letter("rejected", "WEBHOOK_REJECTED", bucket=bucket)
    _end(records, settings, letter, told=False)
    claim = records.adopt_ending("rejected")
    assert claim is None or not isinstance(claim, Claimed)
    _die(client, queue, letter)
    waiting = only(send_back(settings, s3, None))
    assert waiting.sent_back, "its delivery is open: another message about it does no harm"
    taken = client.get(f"{queue}.endings")
    assert taken is not None and json.loads(taken[1])["task_id"] == "rejected"
    assert client.waiting(queue) == 0


@pytest.mark.parametrize("task_id", ["elsewhere/in-the-bucket", "nobody-knows-it"])
def test_a_header_without_a_valid_record_name_moves_nothing(
    client: Client, queue: str, settings: Settings, s3: S3Service, bucket: str, task_id: str
) -> None:
    records = JobRecords(s3, bucket, owner="one", lease_seconds=5)
    _end(records, settings, _letter("real", bucket=bucket), told=False)
    real = s3.read(record_at(bucket, "real")).body
    s3.write(record_at(bucket, "elsewhere/in-the-bucket"), real)
    _die(client, queue, _letter(task_id, "WEBHOOK_REJECTED"))
    one = only(send_back(settings, s3, None))
    assert not one.sent_back
    assert client.waiting(f"{queue}.dead") == 1


def test_a_quorum_queue_loses_no_message_to_frequent_looks(
    client: Client, queue: str, settings: Settings, s3: S3Service
) -> None:
    """RabbitMQ counts the returns of a message, and drops it at a limit."""
    limit = {"x-queue-type": "quorum", "x-delivery-limit": MOST_RETURNS + 1}
    _die(client, queue, _letter("one"), arguments=limit)  # type: ignore[arg-type]
    for _ in range(2 * MOST_RETURNS):
        assert [letter.task_id for letter in look(settings, s3)] == ["one"]


def test_a_broker_that_refuses_the_copy_keeps_the_message(
    client: Client, queue: str, settings: Settings, s3: S3Service
) -> None:
    with client.channel() as channel:
        full = {"x-max-length": 0, "x-overflow": "reject-publish"}
        channel.queue_declare(queue, durable=True, arguments=full)
    _die(client, queue, _letter("one", "INVALID_MESSAGE"))
    with pytest.raises(BrokerError):
        send_back(settings, s3, None)
    assert client.waiting(f"{queue}.dead") == 1
