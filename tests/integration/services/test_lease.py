"""A lease against a real S3 server: kept, lost, noticed; through faults of S3 and of the holder."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.addresses import S3Location
from jobs.record import DeliveryState, JobRecord, JobRequest, StoredCheckpoint
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from services.records.job_records import Claimed, HeldElsewhere
from services.records.lease import SAFE_PART
from services.s3.errors import ConditionalConflict
from services.s3.s3_service import S3Service
from tests.integration.services.record_world import (
    BUCKET,
    LEASE,
    Faulty,
    away,
    claimed,
    ending,
    eventually,
    overwrite,
    request,
    stored,
    times,
    where,
    worker,
)
from utils.errors import LeaseLost, StorageError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module", name="endpoint", autouse=True)
def _endpoint(s3_server: S3Server) -> str:
    s3_server.create_bucket(BUCKET)
    return s3_server.endpoint


def test_renewals_keep_a_job_through_many_leases(s3: S3Service) -> None:
    job = request()
    other = worker(s3, "two")
    with claimed(worker(s3), job) as lease:
        deadline = time.monotonic() + 3.5 * LEASE
        while time.monotonic() < deadline:
            assert isinstance(other.claim(job), HeldElsewhere)
            time.sleep(0.1)
        lease.check()
        assert lease.record.hold.revision >= 10
        assert lease.claim_number == 1


def test_a_holder_that_stopped_renewing_is_replaced_and_writes_nothing_more(s3: S3Service) -> None:
    job = request()
    sleeper = claimed(worker(s3), job)  # never entered, so never renewed
    other = worker(s3, "two")
    began = time.monotonic()
    eventually(lambda: isinstance(other.claim(job), Claimed))
    assert time.monotonic() - began >= LEASE - 0.1
    after = stored(s3, job.task_id)
    with pytest.raises(LeaseLost, match="could not be renewed in time"):
        sleeper.end(ending())
    assert sleeper.lost.is_set()
    assert stored(s3, job.task_id) == after
    assert (after.claim, after.attempts, after.hold.owner) == (2, 1, "two")


def test_a_holder_whose_record_changed_under_it_notices_at_its_next_write(s3: S3Service) -> None:
    job = request()
    lease = claimed(worker(s3, lease=60.0), job)
    overwrite(s3, job.task_id, lambda record: record.claimed("two", 60.0))
    lease.check()
    with pytest.raises(LeaseLost, match="changed by another process"):
        lease.register_checkpoint(StoredCheckpoint("epoch-0010", 10, 10, "p", 1))
    assert lease.lost.is_set()
    with pytest.raises(LeaseLost):
        lease.check()
    assert stored(s3, job.task_id).checkpoints == ()


def test_a_renewing_holder_notices_within_a_renewal_that_it_was_replaced_or_its_record_removed(
    s3: S3Service,
) -> None:
    def replace(job: JobRequest) -> None:
        overwrite(s3, job.task_id, lambda record: record.claimed("two", 60.0))

    def remove(job: JobRequest) -> None:
        s3.delete(BUCKET, [where(job.task_id).key])

    for harm in (replace, remove):
        job = request()
        with claimed(worker(s3), job) as lease:
            # A renewal may come between the read and the write of the overwriting.
            while True:
                with contextlib.suppress(StorageError):
                    harm(job)
                    break
            assert lease.lost.wait(LEASE / 2)


SLEEPER = """
import sys, time
from jobs.record import JobRequest, StoredCheckpoint
from services.records.job_records import JobRecords
from services.s3.s3_service import S3Service
from utils import logger
from utils.errors import LeaseLost
logger.configure()  # to standard error
region, endpoint, key, secret, task_id = sys.argv[1:]
s3 = S3Service(region=region, endpoint_url=endpoint, access_key_id=key, secret_access_key=secret)
outcome = JobRecords(s3, "state", owner="sleeper", lease_seconds=1.0).claim(
    JobRequest(task_id, "style", "7", "abc", {"images": ["s3://media/a.jpg"]}))
with outcome.lease as lease:
    print("claimed", flush=True)
    step = 0
    try:
        while True:
            step += 1
            lease.register_checkpoint(StoredCheckpoint("c", step, step, "p", lease.claim_number))
            time.sleep(0.05)
    except LeaseLost:
        print("lost", lease.lost.is_set(), flush=True)
"""


def test_a_process_that_was_suspended_beyond_its_lease_writes_nothing(
    s3: S3Service, endpoint: str
) -> None:
    job = request()
    arguments = [REGION, endpoint, ACCESS_KEY_ID, SECRET_ACCESS_KEY, job.task_id]
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as sleeper:
        try:
            assert sleeper.stdout and sleeper.stdout.readline() == "claimed\n"
            eventually(lambda: stored(s3, job.task_id).checkpoint is not None)
            sleeper.send_signal(signal.SIGSTOP)
            other = worker(s3, "two", lease=60.0)
            eventually(lambda: isinstance(other.claim(job), Claimed))
            taken = stored(s3, job.task_id)
            sleeper.send_signal(signal.SIGCONT)
            assert sleeper.stdout.readline() == "lost True\n"
            assert sleeper.wait(10) == 0
        finally:
            sleeper.kill()
    assert stored(s3, job.task_id) == taken
    assert taken.checkpoint is not None and taken.checkpoint.claim == 1


def test_changes_from_many_threads_and_the_renewals_all_arrive(s3: S3Service) -> None:
    job = request()
    with claimed(worker(s3), job) as lease, ThreadPoolExecutor(8) as pool:

        def add(record: JobRecord) -> JobRecord:
            return dataclasses.replace(record, sweeps=record.sweeps + 1)

        list(pool.map(lambda _: lease.update(add), range(60)))
    assert stored(s3, job.task_id).sweeps == 60


def test_a_cancel_file_is_seen_when_the_job_is_claimed_and_at_each_renewal(s3: S3Service) -> None:
    before, after = request(), request()
    s3.write(S3Location(BUCKET, f"jobs/{before.task_id}.cancel"), b"")
    assert claimed(worker(s3), before).cancelled.is_set()
    with claimed(worker(s3), after) as lease:
        assert not worker(s3).requests.wants_cancel(after.task_id)
        assert not lease.cancelled.wait(LEASE / 2)
        s3.write(S3Location(BUCKET, f"jobs/{after.task_id}.cancel"), b"")
        assert lease.cancelled.wait(LEASE)


def test_a_cancel_file_is_seen_though_other_changes_renew_the_lease_all_the_time(
    s3: S3Service,
) -> None:
    """As where every epoch takes less than a renewal's interval and registers a checkpoint."""
    job = request()
    with claimed(worker(s3), job) as lease:
        s3.write(S3Location(BUCKET, f"jobs/{job.task_id}.cancel"), b"")
        deadline = time.monotonic() + 2 * LEASE
        while not lease.cancelled.is_set() and time.monotonic() < deadline:
            lease.renew()
            time.sleep(LEASE / 20)
        assert lease.cancelled.is_set()


@pytest.fixture(name="faulty")
def _faulty(endpoint: str) -> Faulty:
    return Faulty(endpoint)


def test_the_own_write_is_recognised_if_its_answer_was_lost(faulty: Faulty) -> None:
    job = request()
    lease = claimed(worker(faulty), job)
    faulty.after = times(1)
    lease.end(ending())
    lease.check()
    assert stored(faulty, job.task_id) == lease.record
    lease.mark_delivered()


def test_a_lease_begins_with_the_first_try_if_its_answer_was_lost(faulty: Faulty) -> None:
    lease = claimed(worker(faulty, lease=20.0), request())
    lost = [True]

    def lose_the_answer() -> None:
        if lost.pop():
            lost.append(False)
            time.sleep(1.0)
            raise StorageError("no answer")
        lost.append(False)

    faulty.after = lose_the_answer
    began = time.monotonic()
    lease.renew()
    assert lease.remaining <= 20.0 * SAFE_PART - (time.monotonic() - began) + 0.05
    assert lease.remaining < 20.0 * SAFE_PART - 1.0


def test_a_claim_whose_answer_was_lost_succeeds_at_once_and_counts_no_attempt(
    faulty: Faulty, s3: S3Service
) -> None:
    job = request()
    one = worker(faulty, lease=60.0)
    for claim in (2, 4):
        faulty.after = times(1)
        with pytest.raises(StorageError, match="away"):
            one.claim(job)
        assert isinstance(worker(s3, "two").claim(job), HeldElsewhere)
        lease = claimed(one, job)
        assert (lease.claim_number, lease.record.attempts) == (claim, 0)
        lease.release(count_attempt=False)


def test_a_change_survives_s3_being_away_for_less_than_the_lease(faulty: Faulty) -> None:
    job = request()
    with claimed(worker(faulty), job) as lease:
        faulty.before = times(3)
        lease.end(ending())
        lease.check()
    assert stored(faulty, job.task_id).delivery is DeliveryState.PENDING


def test_a_conflict_with_a_write_that_then_fails_does_not_lose_the_lease(faulty: Faulty) -> None:
    lease = claimed(worker(faulty), request())
    conflicts = [ConditionalConflict("another write of this object is in flight")]

    def conflict() -> None:
        if conflicts:
            raise conflicts.pop()

    faulty.before = conflict
    lease.end(ending())
    assert not conflicts and not lease.lost.is_set()


def test_a_lease_that_cannot_be_renewed_is_given_up_before_another_takes_it(
    faulty: Faulty, s3: S3Service
) -> None:
    job = request()
    with claimed(worker(faulty), job) as lease:
        other = worker(s3, "two")
        faulty.before = away
        eventually(lambda: isinstance(other.claim(job), Claimed))
        assert lease.lost.is_set()
        faulty.before = lambda: None
        taken = stored(s3, job.task_id)
        with pytest.raises(LeaseLost):
            lease.end(ending())
    assert stored(s3, job.task_id) == taken


def test_a_hanging_write_does_not_hide_the_loss_or_block_the_caller(
    faulty: Faulty,
) -> None:
    job = request()
    hanging = threading.Event()

    def hang() -> None:
        hanging.wait(30)

    try:
        with claimed(worker(faulty), job) as lease:
            faulty.before = hang
            time.sleep(LEASE / 2)  # the renewal hangs now, with the lock in hand
            began = time.monotonic()
            with pytest.raises(LeaseLost, match="earlier write"):
                lease.release(count_attempt=False, within=0.1)
            assert time.monotonic() - began < 0.3
            assert lease.lost.is_set()
    finally:
        hanging.set()


def test_changes_that_queue_up_for_longer_than_a_lease_keep_it_by_being_written(
    faulty: Faulty,
) -> None:
    job = request()
    with claimed(worker(faulty), job) as lease, ThreadPoolExecutor(12) as pool:
        faulty.before = lambda: time.sleep(LEASE / 5)

        def add(record: JobRecord) -> JobRecord:
            return dataclasses.replace(record, sweeps=record.sweeps + 1)

        list(pool.map(lambda _: lease.update(add), range(12)))
    assert stored(faulty, job.task_id).sweeps == 12


def test_a_hanging_renewal_is_noticed_by_the_clock(faulty: Faulty) -> None:
    hanging = threading.Event()

    def hang() -> None:
        hanging.wait(30)

    try:
        with claimed(worker(faulty), request()) as lease:
            faulty.before = hang
            assert lease.lost.wait(LEASE)
    finally:
        hanging.set()


def test_a_release_gives_up_in_the_time_that_a_shutdown_has(faulty: Faulty) -> None:
    lease = claimed(worker(faulty, lease=60.0), request())
    faulty.before = away
    began = time.monotonic()
    with pytest.raises(LeaseLost, match="in the time that was left"):
        lease.release(count_attempt=False, within=0.2)
    assert time.monotonic() - began < 5
    assert lease.lost.is_set()
