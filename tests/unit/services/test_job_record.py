"""A job's record: its transitions, how attempts are counted, and its form as JSON."""

from __future__ import annotations

import dataclasses
import json
import uuid

import pytest

from services.hold import decode, encode, stamped
from services.job_record import (
    CHECKPOINTS_KEPT,
    Checkpoint,
    Delivery,
    Ending,
    EndingKind,
    JobRecord,
    JobRequest,
    LastError,
    State,
    derived_task_id,
)
from utils.errors import StorageError

REQUEST = JobRequest(
    task_id="task-1",
    style_id=7,
    identity="abc",
    message={"task_id": "task-1", "images": ["s3://media/a.jpg"], "captions": [None, "a näme"]},
    webhook_url="https://api.example.com",
)
FAILED = Ending(EndingKind.FAILED, {"style_id": 7}, "GPU_OOM")


def new() -> JobRecord:
    return JobRecord.new(REQUEST, "one", 120.0)


def checkpoint(step: int, claim: int = 1) -> Checkpoint:
    return Checkpoint(f"epoch-{step:04}", step, step, f"checkpoints/style_7/task-1/{step}", claim)


def crash(record: JobRecord) -> JobRecord:
    """The holder dies without a word, and another worker takes the record."""
    return record.claimed(f"worker {record.hold.claim + 1}", 120.0)


def test_a_record_survives_json_with_everything_in_it() -> None:
    record = stamped(
        new()
        .with_checkpoint(checkpoint(10))
        .released(count_attempt=True, error=LastError("GPU_OOM", "no memory", 1))
        .claimed("two", 60.0)
        .ended(FAILED)
    )
    assert decode(JobRecord, encode(record), "k") == record
    assert json.loads(encode(record))["message"] == REQUEST.message


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xff", b"{}", encode(new()).replace(b"style_id", b"styl_id")]
)
def test_a_damaged_or_newer_record_is_refused_by_name(body: bytes) -> None:
    with pytest.raises(StorageError, match=r"jobs/task-1\.json cannot be read"):
        decode(JobRecord, body, "jobs/task-1.json")


def test_each_write_has_a_body_of_its_own() -> None:
    record = stamped(new())
    again = stamped(record)
    assert again.hold.revision == record.hold.revision + 1
    assert again.hold.nonce != record.hold.nonce


def test_a_claim_raises_the_number_and_takes_the_record_over() -> None:
    record = new().released(count_attempt=False, quiet_seconds=600.0).claimed("two", 60.0)
    assert (record.claim, record.hold.owner, record.hold.lease_seconds) == (2, "two", 60.0)
    assert not record.hold.released
    assert record.hold.silence == 60.0


def test_a_holder_that_is_killed_has_made_an_attempt() -> None:
    record = new()
    assert record.attempts == 0
    assert crash(record).attempts == 1
    assert crash(crash(record)).attempts == 2


def test_a_holder_that_takes_its_own_record_again_was_not_dead() -> None:
    """It could not reach S3 for longer than a lease, and that is not the job's fault."""
    record = new()
    for _ in range(5):
        record = record.claimed("one", 120.0)
    assert record.attempts == 0


def test_ten_preemptions_are_no_attempt() -> None:
    record = new()
    for _ in range(10):
        record = record.released(count_attempt=False).claimed("another", 120.0)
    assert (record.attempts, record.claim) == (0, 11)


def test_a_failed_attempt_counts_once_and_leaves_its_reason() -> None:
    error = LastError("STORAGE_FAILED", "S3 was away", 1)
    record = new()
    assert record.attempts_with_this == 1
    record = record.released(count_attempt=True, error=error).claimed("two", 120.0)
    assert (record.attempts, record.attempts_with_this) == (1, 2)
    assert record.last_error == error


def test_a_new_checkpoint_forgives_what_failed_before_it_and_its_own_attempt() -> None:
    record = crash(crash(new())).with_checkpoint(checkpoint(10))
    assert (record.attempts, record.attempts_with_this) == (0, 0)
    assert crash(record).attempts == 0
    assert crash(crash(record)).attempts == 1


def test_a_repeated_checkpoint_is_no_progress() -> None:
    record = crash(new().with_checkpoint(checkpoint(10)).with_checkpoint(checkpoint(20)))
    again = record.with_checkpoint(checkpoint(15, 2)).with_checkpoint(checkpoint(20, 2))
    assert crash(again).attempts == 1
    assert crash(again.with_checkpoint(checkpoint(21, 2))).attempts == 0


def test_the_last_few_checkpoints_are_kept_newest_last() -> None:
    record = new()
    assert record.checkpoint is None
    for step in range(1, 9):
        record = record.with_checkpoint(checkpoint(step))
    assert [known.step for known in record.checkpoints] == [6, 7, 8]
    assert len(record.checkpoints) == CHECKPOINTS_KEPT
    assert record.checkpoint == checkpoint(8)


def test_training_that_went_one_checkpoint_back_drops_the_line_it_left() -> None:
    record = new().with_checkpoint(checkpoint(10)).with_checkpoint(checkpoint(20))
    record = record.with_checkpoint(checkpoint(15, claim=2))
    assert [known.step for known in record.checkpoints] == [10, 15]


def test_a_job_has_one_ending() -> None:
    record = new().ended(FAILED)
    assert record.ended(Ending(EndingKind.COMPLETE, {})) is record
    assert (record.state, record.delivery, record.ending) == (
        State.ENDED,
        Delivery.PENDING,
        FAILED,
    )


def test_two_endings_have_two_webhook_ids() -> None:
    assert Ending(EndingKind.COMPLETE, {}).webhook_id != Ending(EndingKind.COMPLETE, {}).webhook_id


def test_delivering_an_ending_counts_no_attempts_and_keeps_it() -> None:
    record = crash(crash(new().ended(FAILED)))
    assert (record.attempts, record.claim, record.ending) == (0, 3, FAILED)
    assert record.released(count_attempt=True).attempts == 0


@pytest.mark.parametrize("delivery", [Delivery.DELIVERED, Delivery.SET_ASIDE])
def test_a_settled_record_is_free_and_changes_no_more(delivery: Delivery) -> None:
    record = new().ended(FAILED).settled(delivery, "400")
    assert record.is_settled and record.hold.released
    assert record.settled(Delivery.SET_ASIDE) is record
    assert record.released(count_attempt=True) is record


def test_only_an_ended_job_can_be_settled() -> None:
    with pytest.raises(ValueError, match="live cannot be settled"):
        new().settled(Delivery.DELIVERED)
    with pytest.raises(ValueError, match="as pending"):
        new().ended(FAILED).settled(Delivery.PENDING)


def test_a_swept_record_is_free_counted_once_and_left_alone_twice_as_long_each_time() -> None:
    first = new().swept()
    assert (first.attempts, first.hold.released, first.hold.silence) == (1, True, 120.0)
    second = first.swept()
    assert (second.attempts, second.hold.silence) == (1, 240.0)
    assert second.claimed("two", 120.0).sweeps == 0


def test_an_abandoned_retry_keeps_its_count() -> None:
    waiting = new().released(count_attempt=True, quiet_seconds=600.0)
    assert waiting.hold.silence == 600.0
    assert waiting.swept().attempts == 1


def test_runs_of_one_body_have_ids_that_every_worker_finds() -> None:
    first = str(uuid.uuid5(uuid.NAMESPACE_URL, "body"))
    assert derived_task_id(first, 0) == first
    assert derived_task_id(first, 1) == derived_task_id(first, 1) != derived_task_id(first, 2)
    assert uuid.UUID(derived_task_id(first, 1)).version == 5
    assert derived_task_id("invalid/abc", 2) == "invalid/abc-2"
    assert REQUEST.run(0) == REQUEST
    assert REQUEST.run(1) == dataclasses.replace(REQUEST, task_id=derived_task_id("task-1", 1))


def test_an_invalid_messages_record_begins_with_its_ending() -> None:
    record = JobRecord.new(dataclasses.replace(REQUEST, ending=FAILED), "one", 120.0)
    assert (record.state, record.delivery, record.ending) == (
        State.ENDED,
        Delivery.PENDING,
        FAILED,
    )
