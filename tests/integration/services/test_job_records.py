"""Job records against a real S3 server: claims, attempts, endings and repeated bodies."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
import uuid
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from jobs.record import DeliveryState, EndingKind, JobRequest, StoredCheckpoint, derived_task_id
from sandbox.s3_server import S3Server
from services.records.job_lease import JobLease
from services.records.job_records import (
    Claim,
    Claimed,
    Ended,
    HeldElsewhere,
    JobRecords,
    OtherBody,
    Unclaimed,
)
from services.s3.s3_service import S3Service
from tests.integration.services.record_world import (
    BUCKET,
    LEASE,
    adopted,
    claimed,
    derived,
    ending,
    eventually,
    owed,
    request,
    settle,
    stored,
    worker,
)
from utils.errors import LeaseLost


@pytest.fixture(scope="module", name="endpoint", autouse=True)
def _endpoint(s3_server: S3Server) -> str:
    s3_server.create_bucket(BUCKET)
    return s3_server.endpoint


def race(pool: Executor, workers: list[JobRecords], job: JobRequest) -> list[Claim]:
    """Let all of them claim the job at the same moment."""
    start = threading.Barrier(len(workers))

    def run(records: JobRecords) -> Claim:
        start.wait()
        return records.claim(job)

    return list(pool.map(run, workers))


def test_of_workers_racing_for_a_new_or_a_released_job_exactly_one_wins(
    s3: S3Service,
) -> None:
    workers = [worker(s3, f"worker-{number}", lease=60.0) for number in range(4)]
    with ThreadPoolExecutor(len(workers)) as pool:
        for _ in range(10):
            job = request()
            for claim in (1, 2, 3):
                outcomes = race(pool, workers, job)
                winners = [one for one in outcomes if isinstance(one, Claimed)]
                assert len(winners) == 1
                assert sum(isinstance(one, HeldElsewhere) for one in outcomes) == 3
                assert winners[0].lease.claim_number == claim
                assert stored(s3, job.task_id) == winners[0].lease.record
                winners[0].lease.release(count_attempt=False)


def test_of_workers_racing_for_an_abandoned_job_exactly_one_wins(s3: S3Service) -> None:
    workers = [worker(s3, f"worker-{number}", lease=60.0) for number in range(4)]
    jobs = [request() for _ in range(10)]
    for job in jobs:
        claimed(worker(s3, "dead", lease=0.3), job)
        for records in workers:
            assert isinstance(records.claim(job), HeldElsewhere)
    time.sleep(0.4)
    with ThreadPoolExecutor(len(workers)) as pool:
        for job in jobs:
            outcomes = race(pool, workers, job)
            assert sum(isinstance(one, Claimed) for one in outcomes) == 1
            assert sum(isinstance(one, HeldElsewhere) for one in outcomes) == 3
            assert (stored(s3, job.task_id).claim, stored(s3, job.task_id).attempts) == (2, 1)


def test_a_live_job_is_held_for_no_longer_than_a_lease(s3: S3Service) -> None:
    job = request()
    claimed(worker(s3, "one", 60.0), job)
    outcome = worker(s3, "two").claim(job)
    assert isinstance(outcome, HeldElsewhere)
    assert 50 < outcome.wait_seconds <= 60
    assert outcome.record.hold.owner == "one"


def test_the_same_id_with_another_body_is_recognised_also_after_its_end(s3: S3Service) -> None:
    job = request()
    lease = claimed(worker(s3), job)
    other = dataclasses.replace(job, identity="xyz")
    assert isinstance(worker(s3).claim(other), OtherBody)
    lease.end(ending())
    lease.mark_delivered()
    assert isinstance(worker(s3).claim(other), OtherBody)
    assert isinstance(worker(s3).claim(job), Ended)


def test_a_silent_record_is_taken_at_first_sight_by_s3s_own_dates(s3: S3Service) -> None:
    job = request()
    claimed(worker(s3, lease=0.5), job)
    time.sleep(0.5 + 2 + 1.5)
    assert claimed(worker(s3, "two"), job).claim_number == 2


@pytest.mark.parametrize("shift", [-86_400.0, 86_400.0])
def test_the_clock_of_the_machine_does_not_decide_who_holds_a_job(
    s3: S3Service, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    job, abandoned = request(), request()
    real = time.time
    with claimed(worker(s3), job):
        claimed(worker(s3), abandoned)
        other = worker(s3, "two")
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: real() + shift)
            assert isinstance(other.claim(abandoned), HeldElsewhere)
            began = time.monotonic()
            eventually(lambda: isinstance(other.claim(abandoned), Claimed))
            assert time.monotonic() - began >= LEASE / 2
            assert isinstance(other.claim(job), HeldElsewhere)


def test_a_released_job_can_be_claimed_at_once_and_its_holder_writes_nothing_more(
    s3: S3Service,
) -> None:
    job = request()
    with claimed(worker(s3, lease=60.0), job) as lease:
        lease.release(count_attempt=True, error=("STORAGE_FAILED", "S3 was away"))
        with pytest.raises(LeaseLost, match="given back"):
            lease.check()
        with pytest.raises(LeaseLost):
            lease.end(ending())
        assert not lease.lost.is_set()  # no other worker took it
    again = claimed(worker(s3, "two"), job)
    assert (again.claim_number, again.record.attempts) == (2, 1)
    assert again.record.last_error and again.record.last_error.message == "S3 was away"


def test_attempts_are_counted_for_deaths_and_failures_but_not_for_preemptions_or_progress(
    s3: S3Service,
) -> None:
    job = request()
    names = itertools.count(1)

    def next_lease() -> JobLease:
        leases: list[JobLease] = []
        records = worker(s3, f"worker {next(names)}", lease=0.5)

        def take() -> bool:
            outcome = records.claim(job)
            leases.extend([outcome.lease] if isinstance(outcome, Claimed) else [])
            return bool(leases)

        eventually(take)
        return leases[0]

    next_lease()  # and dies
    lease = next_lease()
    assert lease.record.attempts == 1
    lease.release(count_attempt=False)  # preempted
    lease = next_lease()
    assert lease.record.attempts == 1
    lease.release(count_attempt=True)  # failed
    lease = next_lease()
    assert lease.record.attempts == 2
    lease.register_checkpoint(StoredCheckpoint("epoch-0001", 1, 10, "p", lease.claim_number))
    assert lease.record.attempts == 0  # and dies
    assert next_lease().record.attempts == 0


def test_sequences_rise_within_a_claim_and_from_claim_to_claim(s3: S3Service) -> None:
    job = request()
    lease = claimed(worker(s3), job)
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda _: lease.next_sequence(), range(200)))
    assert sorted(numbers) == list(range(1_000_001, 1_000_201))
    lease.release(count_attempt=False)
    assert claimed(worker(s3), job).next_sequence() == 2_000_001


def test_an_ending_is_durable_with_its_delivery_pending_before_it_is_sent(
    s3: S3Service,
) -> None:
    job = request()
    last_word = ending()
    lease = claimed(worker(s3), job)
    assert lease.end(last_word) == last_word
    record = stored(s3, job.task_id)
    assert (record.ending, record.delivery) == (last_word, DeliveryState.PENDING)
    revision = record.hold.revision
    assert lease.end(ending(EndingKind.FAILED)) == last_word
    assert stored(s3, job.task_id).hold.revision == revision


def test_an_undelivered_ending_is_renewed_then_adopted_with_its_webhook_id_and_settled_once(
    s3: S3Service,
) -> None:
    job = request()
    last_word = ending()
    with claimed(worker(s3), job) as lease:
        lease.end(last_word)
        other = worker(s3, "two")
        assert isinstance(other.claim(job), Ended)
        for _ in range(13):  # longer than a lease: it is renewed while it is being delivered
            assert isinstance(other.adopt_ending(job.task_id), HeldElsewhere)
            time.sleep(0.1)
        lease.release(count_attempt=True)
    with adopted(other, job.task_id) as second:
        assert second.claim_number == 2
        assert second.record.ending == last_word
        assert second.record.attempts == 0
        second.mark_delivered()
    assert other.adopt_ending(job.task_id) is None
    outcome = other.claim(job)
    assert isinstance(outcome, Ended)
    assert outcome.record.is_settled and outcome.record.delivery is DeliveryState.DELIVERED
    assert 0 <= outcome.seconds_ago < 30


def test_there_is_nothing_to_adopt_of_an_unknown_or_a_live_job(s3: S3Service) -> None:
    job = request()
    assert worker(s3).adopt_ending(job.task_id) is None
    lease = claimed(worker(s3), job)
    assert isinstance(worker(s3, "two").adopt_ending(job.task_id), HeldElsewhere)
    lease.release(count_attempt=False)
    assert isinstance(worker(s3, "two").adopt_ending(job.task_id), Unclaimed)


def test_a_refused_ending_is_set_aside_with_the_answer(s3: S3Service) -> None:
    job = request()
    lease = claimed(worker(s3), job)
    lease.end(ending())
    lease.set_aside("400 style_id is unknown", owed())
    lease.paid()
    record = stored(s3, job.task_id)
    assert (record.delivery, record.delivery_detail) == (
        DeliveryState.SET_ASIDE,
        "400 style_id is unknown",
    )


def test_the_ending_of_an_invalid_message_is_kept_under_its_bodys_hash(s3: S3Service) -> None:
    sha = uuid.uuid4().hex
    first = ending(EndingKind.FAILED)
    outcome = worker(s3).claim_invalid(sha, first, kind="style", subject="7")
    assert isinstance(outcome, Claimed)
    assert stored(s3, f"invalid/{sha}").ending == first
    # Its worker dies; the message comes back and another delivers the same ending.
    outcome.lease.release(count_attempt=True)
    again = worker(s3, "two").claim_invalid(
        sha, ending(EndingKind.FAILED), kind="style", subject="7"
    )
    assert isinstance(again, Claimed)
    assert again.lease.record.ending == first
    again.lease.mark_delivered()
    repeated = ending(EndingKind.FAILED)
    assert isinstance(worker(s3).claim_invalid(sha, repeated, kind="style", subject="7"), Ended)
    assert isinstance(
        worker(s3).claim_invalid(sha, repeated, kind="style", subject="7", new_run_after=600.0),
        Ended,
    )
    # Published again after the window, it is reported again.
    anew = worker(s3).claim_invalid(sha, repeated, kind="style", subject="7", new_run_after=-1.0)
    assert isinstance(anew, Claimed)
    assert anew.lease.record.ending == repeated


def test_a_body_published_again_after_the_window_is_a_new_job_and_within_it_the_old_one(
    s3: S3Service,
) -> None:
    job = derived()
    settle(claimed(worker(s3), job, new_run_after=600.0))
    assert isinstance(worker(s3).claim(job, new_run_after=600.0), Ended)
    second = claimed(worker(s3), job, new_run_after=-1.0)
    assert second.record.task_id == derived_task_id(job.task_id, 1)
    assert isinstance(worker(s3, "two").claim(job, new_run_after=-1.0), HeldElsewhere)
    settle(second)
    third = claimed(worker(s3), job, new_run_after=-1.0)
    assert third.record.task_id == derived_task_id(job.task_id, 2)


def test_a_redelivered_body_means_its_newest_run_and_never_begins_one(s3: S3Service) -> None:
    job = derived()
    settle(claimed(worker(s3), job))
    assert isinstance(worker(s3).claim(job), Ended)
    second = claimed(worker(s3), job, new_run_after=-1.0)
    second.release(count_attempt=False)
    assert claimed(worker(s3), job).record.task_id == second.record.task_id


def test_an_id_of_the_backend_always_names_one_job(s3: S3Service) -> None:
    job = request()
    settle(claimed(worker(s3), job))
    assert isinstance(worker(s3).claim(job, new_run_after=-1.0), Ended)
