"""Claiming jobs and adopting endings, fast: on an S3 in memory."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from jobs.addresses import S3Location
from jobs.record import PROTOCOL_LEVEL, Ending, EndingKind, JobRequest, OwedCopy, State
from services.records.job_records import (
    Claimed,
    Ended,
    HeldElsewhere,
    JobRecords,
    OtherBody,
    Unclaimed,
)
from tests.memory_s3 import MemoryS3, works
from utils.errors import NewerRecord, StorageError

BUCKET = "state"
REQUEST = JobRequest("task-1", "style", "7", "abc", {"images": ["s3://media/a.jpg"]})
DERIVED = dataclasses.replace(REQUEST, id_is_derived=True)
FAILED = Ending(EndingKind.FAILED, {"style_id": 7}, "GPU_OOM")


@pytest.fixture(name="s3")
def _s3() -> MemoryS3:
    return MemoryS3()


def worker(s3: MemoryS3, name: str = "one", lease: float = 120.0) -> JobRecords:
    return JobRecords(s3, BUCKET, owner=name, lease_seconds=lease)


def claimed(outcome: Any) -> Any:
    assert isinstance(outcome, Claimed), outcome
    return outcome.lease


def settle(lease: Any) -> None:
    lease.end(FAILED)
    lease.mark_delivered()


def test_a_new_job_is_on_the_index_before_its_record_is_there(s3: MemoryS3) -> None:
    lease = claimed(worker(s3).claim(REQUEST))
    puts = [key for method, key in s3.requests if method == "PUT"]
    assert puts == ["jobs/live/task-1", "jobs/task-1.json"]
    assert (lease.claim_number, lease.record.hold.owner, lease.record.attempts) == (1, "one", 0)


def test_a_job_that_another_worker_holds_is_not_claimed_until_its_lease_is_over(
    s3: MemoryS3,
) -> None:
    worker(s3).claim(REQUEST)
    other = worker(s3, "two")
    held = other.claim(REQUEST)
    assert isinstance(held, HeldElsewhere)
    assert 0 < held.wait_seconds <= 120
    s3.pass_seconds(125)
    lease = claimed(other.claim(REQUEST))
    assert (lease.claim_number, lease.record.attempts) == (2, 1)


def test_a_released_job_is_taken_at_once_and_counts_nothing(s3: MemoryS3) -> None:
    claimed(worker(s3).claim(REQUEST)).release(count_attempt=False, quiet_seconds=600)
    lease = claimed(worker(s3, "two").claim(REQUEST))
    assert (lease.claim_number, lease.record.attempts) == (2, 0)


def test_the_same_id_with_another_identity_is_another_body(s3: MemoryS3) -> None:
    worker(s3).claim(REQUEST)
    other = dataclasses.replace(REQUEST, identity="xyz")
    assert isinstance(worker(s3, "two").claim(other), OtherBody)


def test_a_claim_whose_answer_was_lost_succeeds_at_the_next_try(s3: MemoryS3) -> None:
    records = worker(s3)
    put = s3.create

    def lose_the_answer(*args: Any, **how: Any) -> str:
        put(*args, **how)
        raise StorageError("no answer")

    s3.create = lose_the_answer  # type: ignore[method-assign]
    with pytest.raises(StorageError):
        records.claim(REQUEST)
    s3.create = put  # type: ignore[method-assign]
    assert isinstance(worker(s3, "two").claim(REQUEST), HeldElsewhere)
    lease = claimed(records.claim(REQUEST))
    assert (lease.claim_number, lease.record.attempts) == (2, 0)
    s3.pass_seconds(1000)
    lease = claimed(records.claim(REQUEST))
    assert lease.record.attempts == 0, "it finds its own name: S3 was silent, and not the holder"


def test_an_ended_job_is_reported_with_the_time_since_its_end(s3: MemoryS3) -> None:
    settle(claimed(worker(s3).claim(REQUEST)))
    s3.pass_seconds(700)
    ended = worker(s3, "two").claim(REQUEST, new_run_after=600)
    assert isinstance(ended, Ended)
    assert ended.seconds_ago == pytest.approx(700, abs=2)


def test_a_body_without_an_id_is_a_new_job_only_after_the_window(s3: MemoryS3) -> None:
    settle(claimed(worker(s3).claim(DERIVED, new_run_after=600)))
    s3.pass_seconds(590)
    assert isinstance(worker(s3).claim(DERIVED, new_run_after=600), Ended)
    s3.pass_seconds(20)
    second = claimed(worker(s3).claim(DERIVED, new_run_after=600))
    assert second.record.task_id != "task-1"
    held = worker(s3, "two").claim(DERIVED, new_run_after=600)
    assert isinstance(held, HeldElsewhere)
    assert held.record.task_id == second.record.task_id
    settle(second)
    s3.pass_seconds(5000)
    again = worker(s3, "two").claim(DERIVED, new_run_after=None)
    assert isinstance(again, Ended)
    assert again.record.task_id == second.record.task_id, "the newest run is meant"


def test_a_job_for_a_newer_worker_is_not_claimed(s3: MemoryS3) -> None:
    newer = dataclasses.replace(REQUEST, min_level=PROTOCOL_LEVEL + 1)
    worker(s3).claim(newer)
    s3.pass_seconds(1000)
    with pytest.raises(NewerRecord, match=rf"protocol level {PROTOCOL_LEVEL + 1}.*Update"):
        worker(s3, "two").claim(REQUEST)


def test_an_ending_is_adopted_once_and_until_it_is_settled(s3: MemoryS3) -> None:
    lease = claimed(worker(s3).claim(REQUEST))
    told = lease.end(FAILED)
    assert isinstance(worker(s3, "two").adopt_ending("task-1"), HeldElsewhere)
    s3.pass_seconds(1000)
    adopted = claimed(worker(s3, "two").adopt_ending("task-1"))
    assert adopted.record.ending == told
    assert adopted.record.attempts == 0, "an ended job has no attempts to count"
    adopted.mark_delivered()
    assert worker(s3, "three").adopt_ending("task-1") is None
    assert worker(s3, "three").adopt_ending("unknown") is None


def test_a_record_that_owes_a_copy_is_adopted_though_its_ending_is_delivered(s3: MemoryS3) -> None:
    lease = claimed(worker(s3).claim(REQUEST))
    lease.end(FAILED, OwedCopy("WORKER_CRASHED", "it died", 3))
    lease.mark_delivered()
    s3.pass_seconds(1000)
    adopted = claimed(worker(s3, "two").adopt_ending("task-1"))
    adopted.paid()
    assert worker(s3, "three").adopt_ending("task-1") is None


def test_a_live_job_has_no_ending_to_adopt(s3: MemoryS3) -> None:
    lease = claimed(worker(s3).claim(REQUEST))
    assert isinstance(worker(s3, "two").adopt_ending("task-1"), HeldElsewhere)
    lease.release(count_attempt=False, quiet_seconds=10)
    s3.pass_seconds(30)
    found = worker(s3, "two").adopt_ending("task-1")
    assert isinstance(found, Unclaimed)
    assert found.record.state is State.LIVE
    assert found.seconds_silent == pytest.approx(30, abs=2)


def test_a_settled_record_leaves_the_index_and_has_its_mark(s3: MemoryS3) -> None:
    records = worker(s3)
    settle(claimed(records.claim(REQUEST)))
    records.forget("task-1")
    assert s3.keys(BUCKET, "jobs/") == ["jobs/task-1.json", "jobs/task-1.settled"]


def test_a_record_that_lives_again_stays_on_the_index(s3: MemoryS3) -> None:
    records = worker(s3)
    claimed(records.claim(REQUEST))
    records.forget("task-1")
    assert s3.keys(BUCKET, "jobs/") == ["jobs/live/task-1", "jobs/task-1.json"]


def test_taking_a_record_off_the_index_never_fails_a_job(s3: MemoryS3) -> None:
    records = worker(s3)
    settle(claimed(records.claim(REQUEST)))

    def away(method: str, bucket: str, key: str) -> None:
        raise StorageError("S3 is away")

    s3.before = away
    records.forget("task-1")
    s3.before = works
    assert "jobs/live/task-1" in s3.keys(BUCKET)


def test_a_cancel_file_is_seen_when_the_job_is_claimed(s3: MemoryS3) -> None:
    records = worker(s3)
    assert not records.requests.wants_cancel("task-1")
    s3.write(S3Location(BUCKET, "jobs/task-1.cancel"), b"")
    assert records.requests.wants_cancel("task-1")
    assert claimed(records.claim(REQUEST)).cancelled.is_set()


def test_the_time_that_workers_hold_a_job_is_kept_over_their_claims(
    s3: MemoryS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lease = claimed(worker(s3, lease=1e6).claim(REQUEST))
    now[0] += 50
    lease.release(count_attempt=False)
    now[0] += 1000  # it waits
    lease = claimed(worker(s3, "two", lease=1e6).claim(REQUEST))
    assert lease.seconds_run == pytest.approx(50)
    now[0] += 25
    lease.end(FAILED)
    now[0] += 500  # its ending waits
    lease.mark_delivered()
    record = worker(s3).read("task-1")
    assert record is not None and record.seconds_run == pytest.approx(75)


def test_the_numbers_of_a_jobs_reports_rise_within_a_claim_and_from_claim_to_claim(
    s3: MemoryS3,
) -> None:
    first = claimed(worker(s3).claim(REQUEST))
    assert [first.next_sequence() for _ in range(2)] == [1_000_001, 1_000_002]
    first.release(count_attempt=False)
    assert claimed(worker(s3, "two").claim(REQUEST)).next_sequence() == 2_000_001


def test_a_release_stores_its_reason_its_delay_and_the_worker_that_rejected(s3: MemoryS3) -> None:
    lease = claimed(worker(s3).claim(REQUEST))
    lease.release(count_attempt=True, error=("DISK", "it is full"), quiet_seconds=60, rejected=True)
    record = worker(s3).read("task-1")
    assert record is not None and record.last_error is not None
    assert (record.last_error.code, record.last_error.claim) == ("DISK", 1)
    assert (record.attempts, record.hold.quiet_seconds) == (1, 60)
    assert (record.rejections, record.rejected_by) == (1, "one")


def test_a_released_record_is_settled_with_the_backends_answer(s3: MemoryS3) -> None:
    lease = claimed(worker(s3).claim(REQUEST))
    lease.end(FAILED)
    lease.set_aside("the backend answered 400", OwedCopy("WEBHOOK_REJECTED", "400", 0))
    record = worker(s3).read("task-1")
    assert record is not None and record.delivery_detail == "the backend answered 400"
    assert not record.is_settled
    lease.paid()
    record = worker(s3).read("task-1")
    assert record is not None and record.is_settled and record.hold.released


def test_a_record_that_changes_at_every_try_is_given_up_for_this_time(s3: MemoryS3) -> None:
    claimed(worker(s3).claim(REQUEST)).release(count_attempt=False)

    def changed(method: str, bucket: str, key: str) -> None:
        if (method, key) == ("PUT", "jobs/task-1.json"):
            s3.change(bucket, key, body=s3.objects[bucket, key].body + b" ")

    s3.before = changed
    with pytest.raises(StorageError, match="changes too fast"):
        worker(s3, "two").claim(REQUEST)
    s3.before = works
    claimed(worker(s3, "two").claim(REQUEST)).end(FAILED)
    s3.pass_seconds(1000)
    s3.before = changed
    with pytest.raises(StorageError, match="changes too fast"):
        worker(s3, "three").adopt_ending("task-1")


def test_the_refusal_of_a_message_is_kept_under_its_hash_and_reported_by_one_worker(
    s3: MemoryS3,
) -> None:
    def refuse(name: str, window: float | None = 600) -> Any:
        return worker(s3, name).claim_invalid(
            "ab" * 32, FAILED, kind="style", subject="7", new_run_after=window
        )

    lease = claimed(refuse("one"))
    assert lease.record.task_id == "invalid/" + "ab" * 32
    assert isinstance(refuse("two"), HeldElsewhere)
    lease.release(count_attempt=False)
    claimed(refuse("two")).mark_delivered()
    assert isinstance(refuse("three"), Ended)
    s3.pass_seconds(700)
    assert isinstance(refuse("three", None), Ended)
    assert claimed(refuse("three")).record.task_id.endswith("-1")
