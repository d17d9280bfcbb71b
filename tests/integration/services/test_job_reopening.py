"""Sending a job back, against a real S3 server: allowed cases, once each.

A delivered ending stays delivered.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs.layout import cancel_file_at, settled_mark_at
from jobs.record import DeliveryState, EndingKind, JobRequest, State, StoredCheckpoint
from sandbox.s3_server import S3Server
from services.records.job_records import Ended
from services.records.reopening import CannotReopen, reopen, tell_again
from services.records.sweep import RecordSweep
from services.s3.s3_service import S3Service
from tests.integration.services.record_world import (
    BUCKET,
    Faulty,
    adopted,
    claimed,
    ending,
    overwrite,
    owed,
    request,
    settle,
    stored,
    worker,
)


@pytest.fixture(name="server", scope="module")
def _server() -> Iterator[S3Server]:
    with S3Server() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture(name="store")
def _store(server: S3Server) -> Faulty:
    """A store without any records."""
    store = Faulty(server.endpoint)
    store.delete(BUCKET, [info.key for info in store.list_objects(BUCKET, "jobs/")])
    return store


def _failed(s3: S3Service, *, delivered: bool = True) -> JobRequest:
    """A job that has failed under its first claim, with a checkpoint behind it."""
    job = request()
    lease = claimed(worker(s3), job)
    lease.register_checkpoint(StoredCheckpoint("epoch-0010", 10, 100, "checkpoints/x/", 1))
    lease.end(ending(EndingKind.FAILED))
    if delivered:
        lease.mark_delivered()
    return job


def test_a_failed_job_gets_a_new_attempt_from_its_checkpoint_under_the_next_claim(
    store: S3Service,
) -> None:
    job = _failed(store)
    first = stored(store, job.task_id).ending
    reopen(store, BUCKET, job.task_id, identity=job.identity)
    record = stored(store, job.task_id)
    assert (record.state, record.delivery, record.attempts) == (State.LIVE, DeliveryState.NONE, 0)
    assert record.ending is None and record.last_error is not None
    lease = claimed(worker(store, "two"), job)
    assert lease.claim_number == 2 and lease.record.checkpoint is not None
    assert lease.next_sequence() > 2_000_000
    second = lease.end(ending())
    assert first is not None and second.webhook_id != first.webhook_id


def test_a_live_job_is_not_changed(store: S3Service) -> None:
    job = request()
    claimed(worker(store), job)
    before = stored(store, job.task_id)
    reopen(store, BUCKET, job.task_id, identity=job.identity)
    assert stored(store, job.task_id) == before


def test_a_job_without_a_record_is_for_its_message_to_make(store: S3Service) -> None:
    assert reopen(store, BUCKET, "nobody-knows-it", identity="abc") is None


def test_a_completed_job_is_not_trained_again(store: S3Service) -> None:
    job = request()
    settle(claimed(worker(store), job))
    with pytest.raises(CannotReopen, match="completed"):
        reopen(store, BUCKET, job.task_id, identity=job.identity)
    assert isinstance(worker(store).claim(job), Ended)


def test_an_undelivered_ending_is_not_lost(store: S3Service) -> None:
    job = _failed(store, delivered=False)
    with pytest.raises(CannotReopen, match="does not know of the failure"):
        reopen(store, BUCKET, job.task_id, identity=job.identity)
    assert stored(store, job.task_id).delivery is DeliveryState.PENDING


def test_the_record_of_another_job_is_not_changed(store: S3Service) -> None:
    job = _failed(store)
    with pytest.raises(CannotReopen, match="something else"):
        reopen(store, BUCKET, job.task_id, identity="another")
    assert stored(store, job.task_id).state is State.ENDED


def test_a_job_that_would_only_be_cancelled_again_stays_ended(store: S3Service) -> None:
    job = _failed(store)
    store.write(cancel_file_at(BUCKET, job.task_id), b"")
    with pytest.raises(CannotReopen, match=r"delete s3://state/jobs/.*\.cancel"):
        reopen(store, BUCKET, job.task_id, identity=job.identity)


def test_a_refused_ending_is_sent_again_unchanged(store: S3Service) -> None:
    job = request()
    lease = claimed(worker(store), job)
    told = lease.end(ending())
    lease.set_aside("the backend answered 400", owed())
    lease.paid()
    tell_again(store, BUCKET, job.task_id)
    tell_again(store, BUCKET, job.task_id)  # as after a lost connection
    again = adopted(worker(store, "two"), job.task_id)
    assert again.record.ending == told
    again.mark_delivered()
    with pytest.raises(CannotReopen, match="accepted"):
        tell_again(store, BUCKET, job.task_id)


def test_the_sweep_sees_a_job_again_that_was_sent_back(store: S3Service) -> None:
    job = _failed(store)
    mark = settled_mark_at(BUCKET, job.task_id)
    sweep = RecordSweep(store, BUCKET, lease_seconds=1.0)
    assert job.task_id not in {record.task_id for record in sweep.abandoned()}
    assert store.exists(mark)
    reopen(store, BUCKET, job.task_id, identity=job.identity)
    assert not store.exists(mark)


def test_a_job_that_is_sent_back_while_the_sweep_marks_it_keeps_no_mark(
    store: Faulty,
) -> None:
    job = _failed(store)
    mark = settled_mark_at(BUCKET, job.task_id)
    plain = worker(store)

    def sent_back_meanwhile() -> None:
        store.before = lambda: None
        overwrite(store, job.task_id, lambda record: record.reopened())

    sweep = RecordSweep(store, BUCKET, lease_seconds=1.0)
    store.before = sent_back_meanwhile  # the sweep has read it as settled, and is about to mark it
    try:
        list(sweep.abandoned())
    finally:
        store.before = lambda: None
    assert plain.read(job.task_id) is not None
    assert stored(store, job.task_id).state is State.LIVE and not store.exists(mark)


def test_two_simultaneous_requests_both_find_the_job_live(store: Faulty) -> None:
    job = _failed(store)

    def somebody_else() -> None:
        store.before = lambda: None
        overwrite(store, job.task_id, lambda record: record.reopened())

    store.before = somebody_else
    record = reopen(store, BUCKET, job.task_id, identity=job.identity)
    assert record is not None and record.state is State.LIVE
    assert record.hold.nonce == stored(store, job.task_id).hold.nonce
