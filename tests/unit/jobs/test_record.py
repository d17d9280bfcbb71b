"""A job's record: its transitions, how attempts are counted, and its form as JSON."""

from __future__ import annotations

import dataclasses
import json
import uuid

import pytest

from jobs.hold import decode, encode, stamped, values_beside
from jobs.record import (
    CHECKPOINTS_KEPT,
    DeliveryState,
    Ending,
    EndingKind,
    JobRecord,
    JobRequest,
    LastError,
    OwedCopy,
    State,
    StoredCheckpoint,
    derived_task_id,
)
from utils.errors import DamagedRecord, NewerRecord

REQUEST = JobRequest(
    task_id="task-1",
    kind="style",
    subject="7",
    identity="abc",
    message={"task_id": "task-1", "images": ["s3://media/a.jpg"], "captions": [None, "a näme"]},
    webhook_url="https://api.example.com",
)
FAILED = Ending(EndingKind.FAILED, {"style_id": 7}, "GPU_OOM")


def new() -> JobRecord:
    return JobRecord.new(REQUEST, "one", 120.0)


def checkpoint(step: int, claim: int = 1) -> StoredCheckpoint:
    return StoredCheckpoint(
        f"epoch-{step:04}", step, step, f"checkpoints/style_7/task-1/{step}", claim
    )


def crash(record: JobRecord) -> JobRecord:
    """The holder is killed, and another worker claims the record."""
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
def test_a_damaged_record_is_refused_by_name(body: bytes) -> None:
    with pytest.raises(DamagedRecord, match=r"jobs/task-1\.json cannot be read"):
        decode(JobRecord, body, "jobs/task-1.json")


def test_a_record_of_a_newer_version_is_not_treated_as_damaged() -> None:
    body = encode(dataclasses.replace(new(), version=2))
    with pytest.raises(NewerRecord, match=r"jobs/task-1\.json has version 2.*Update the worker"):
        decode(JobRecord, body, "jobs/task-1.json")


def test_fields_that_only_a_newer_worker_knows_are_kept_and_written_back() -> None:
    values = json.loads(encode(new().with_checkpoint(checkpoint(10)).ended(FAILED)))
    values["hold"]["zone"] = {"name": "a"}
    values["checkpoints"][0]["format"] = 2
    values["ending"]["report"] = "s3://models/report"
    record = decode(JobRecord, json.dumps(values).encode(), "k")
    assert json.loads(encode(record.settled(DeliveryState.DELIVERED))) == values | {
        "delivery": "delivered",
        "hold": values["hold"] | {"released": True},
    }


def test_a_record_that_needs_nothing_new_has_the_fields_of_the_first_release_only() -> None:
    record = dataclasses.replace(new().ended(FAILED), seconds_run=12.5, rejections=1)
    assert not {"owed", "min_level", "seconds_run", "rejections", "unknown"} & set(
        json.loads(encode(record))
    )
    owing = new().ended(FAILED, OwedCopy("STORAGE_FAILED", "S3 is away", 3))
    assert json.loads(encode(owing))["owed"]["code"] == "STORAGE_FAILED"


def test_values_in_the_metadata_are_restored_and_a_damaged_one_is_ignored() -> None:
    plain = new()
    record = dataclasses.replace(plain, seconds_run=12.5, rejections=2)
    beside = values_beside(record)
    assert beside == {"seconds-run": "12.5", "rejections": "2"}
    assert decode(JobRecord, encode(record), "k", beside) == record
    assert decode(JobRecord, encode(record), "k", {"seconds-run": "long"}) == plain
    assert values_beside(plain) == {}


def test_each_write_has_a_different_body() -> None:
    record = stamped(new())
    again = stamped(record)
    assert again.hold.revision == record.hold.revision + 1
    assert again.hold.nonce != record.hold.nonce


def test_a_claim_raises_the_number_and_takes_the_record_over() -> None:
    record = new().released(count_attempt=False, quiet_seconds=600.0).claimed("two", 60.0)
    assert (record.claim, record.hold.owner, record.hold.lease_seconds) == (2, "two", 60.0)
    assert not record.hold.released
    assert record.hold.silence == 60.0


def test_a_killed_holder_counts_as_an_attempt() -> None:
    record = new()
    assert record.attempts == 0
    assert crash(record).attempts == 1
    assert crash(crash(record)).attempts == 2


def test_a_holder_that_takes_its_own_record_again_was_not_dead() -> None:
    """It could not reach S3 for longer than a lease, which is not the job's fault."""
    record = new()
    for _ in range(5):
        record = record.claimed("one", 120.0)
    assert record.attempts == 0


def test_ten_preemptions_do_not_count_as_attempts() -> None:
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


def test_a_new_checkpoint_clears_earlier_failures_and_its_own_attempt() -> None:
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


def test_training_that_went_back_one_checkpoint_drops_the_checkpoints_after_it() -> None:
    record = new().with_checkpoint(checkpoint(10)).with_checkpoint(checkpoint(20))
    record = record.with_checkpoint(checkpoint(15, claim=2))
    assert [known.step for known in record.checkpoints] == [10, 15]


def test_a_job_has_one_ending() -> None:
    record = new().ended(FAILED)
    assert record.ended(Ending(EndingKind.COMPLETE, {})) is record
    assert (record.state, record.delivery, record.ending) == (
        State.ENDED,
        DeliveryState.PENDING,
        FAILED,
    )


def test_two_endings_have_two_webhook_ids() -> None:
    assert Ending(EndingKind.COMPLETE, {}).webhook_id != Ending(EndingKind.COMPLETE, {}).webhook_id


def test_delivering_an_ending_counts_no_attempts_and_keeps_it() -> None:
    record = crash(crash(new().ended(FAILED)))
    assert (record.attempts, record.claim, record.ending) == (0, 3, FAILED)
    assert record.released(count_attempt=True).attempts == 0


@pytest.mark.parametrize("delivery", [DeliveryState.DELIVERED, DeliveryState.SET_ASIDE])
def test_a_settled_record_is_released_and_final(delivery: DeliveryState) -> None:
    record = new().ended(FAILED).settled(delivery, "400")
    assert record.is_settled and record.hold.released
    assert record.settled(DeliveryState.SET_ASIDE) is record
    assert record.released(count_attempt=True) is record


def test_only_an_ended_job_can_be_settled() -> None:
    with pytest.raises(ValueError, match="live cannot be settled"):
        new().settled(DeliveryState.DELIVERED)
    with pytest.raises(ValueError, match="as pending"):
        new().ended(FAILED).settled(DeliveryState.PENDING)


def test_a_swept_record_is_released_counted_once_and_waits_longer_each_time() -> None:
    first = new().swept()
    assert (first.attempts, first.hold.released, first.hold.silence) == (1, True, 120.0)
    second = first.swept()
    assert (second.attempts, second.hold.silence) == (1, 960.0)
    assert second.claimed("two", 120.0).sweeps == 0


def test_the_sweep_publishes_few_copies_of_a_job_that_waits_for_days() -> None:
    record, days, copies = new(), 0.0, 0
    while days < 3.0:
        record = record.swept()
        copies += 1
        days += (record.hold.silence + 2 * record.hold.lease_seconds) / 86_400
    assert copies <= 7
    assert record.hold.silence <= 86_400


def test_a_copy_that_is_owed_keeps_the_record_unsettled_and_held_until_it_is_sent() -> None:
    copy = OwedCopy("WORKER_CRASHED", "given up", 3)
    delivered = new().ended(FAILED, copy).settled(DeliveryState.DELIVERED)
    assert not delivered.is_settled
    assert not delivered.hold.released
    paid = delivered.paid()
    assert paid.is_settled
    assert paid.hold.released
    assert paid.paid() is paid


def test_an_ending_set_aside_owes_its_copy_and_one_that_is_sent_again_does_not() -> None:
    copy = OwedCopy("WEBHOOK_REJECTED", "the backend answered 400", 0)
    aside = new().ended(FAILED).settled(DeliveryState.SET_ASIDE, "400", copy)
    assert (aside.is_settled, aside.owed) == (False, copy)
    assert aside.to_be_told_again().owed is None
    first = OwedCopy("WORKER_CRASHED", "given up", 3)
    assert new().ended(FAILED, first).settled(DeliveryState.DELIVERED).owed == first


def test_a_job_whose_copy_is_sent_before_its_ending_stays_pending() -> None:
    record = new().ended(FAILED, OwedCopy("WORKER_CRASHED", "given up", 3)).paid()
    assert (record.is_settled, record.hold.released) == (False, False)


def test_rejections_are_counted_until_a_worker_makes_progress() -> None:
    once = new().released(count_attempt=False, rejected=True)
    twice = once.claimed("two", 60.0).released(count_attempt=False, rejected=True)
    assert (once.rejections, twice.rejections, twice.attempts) == (1, 2, 0)
    assert twice.claimed("three", 60.0).with_checkpoint(checkpoint(10)).rejections == 0


def test_only_a_failed_job_that_the_backend_knows_of_can_be_sent_back() -> None:
    with pytest.raises(ValueError, match="live .* cannot be reopened"):
        new().reopened()
    with pytest.raises(ValueError, match="pending.* cannot be reopened"):
        new().ended(FAILED).reopened()
    complete = new().ended(Ending(EndingKind.COMPLETE, {})).settled(DeliveryState.DELIVERED)
    with pytest.raises(ValueError, match="cannot be reopened"):
        complete.reopened()
    with pytest.raises(ValueError, match="delivered cannot be sent again"):
        complete.to_be_told_again()


def test_a_job_that_is_sent_back_has_its_whole_time_again() -> None:
    record = dataclasses.replace(new(), seconds_run=5000.0, rejections=3)
    again = record.ended(FAILED).settled(DeliveryState.DELIVERED).reopened()
    assert (again.seconds_run, again.rejections, again.owed) == (0.0, 0, None)


def test_the_time_of_an_order_is_that_of_its_message_or_of_its_first_claim() -> None:
    said = dataclasses.replace(REQUEST, message={"created_at": "2025-01-20T10:00:00Z"})
    assert JobRecord.new(said, "one", 1.0).ordered_at == "2025-01-20T10:00:00Z"
    silent = new()
    assert silent.ordered_at == silent.created_at


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
        DeliveryState.PENDING,
        FAILED,
    )
