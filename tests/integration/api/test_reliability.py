"""The API's promises about jobs: nothing is lost, doubled or reported twice."""

from __future__ import annotations

import datetime
import json
import secrets
from typing import Any

import pytest
from sqlalchemy import func, select

from api.life.restore import reconcile
from api.store.database import Database
from api.store.migrating import check, migrate
from api.store.tables import EventRow, JobRow, OutboxRow, ReceiptRow
from jobs.layout import cancel_file_at, order_at, record_at
from jobs.record import Ending, EndingKind, JobRecord, JobRequest
from services.broker.client import connect
from services.records.record_object import RecordObject
from tests.integration.api.world import Ground, World, running, until
from utils.threads import in_parallel


def same_place(world: World) -> dict[str, Any]:
    """The settings by which another API finds the same buckets and the same broker."""
    storage = world.settings.storage
    return {
        "aws_storage_bucket_name": storage.aws_storage_bucket_name,
        "model_bucket_name": storage.model_bucket_name,
        "state_bucket_name": storage.state_bucket_name,
        "training_queue": world.settings.broker.training_queue,
    }


def messages(world: World) -> list[dict[str, Any]]:
    """All messages that wait in the training queue."""
    connection = connect(world.settings.broker)
    try:
        channel = connection.channel()
        found: list[dict[str, Any]] = []
        while True:
            method, _, body = channel.basic_get(world.settings.broker.training_queue, auto_ack=True)
            if method is None:
                return found
            found.append(json.loads(body or b""))
    finally:
        connection.close()


def count(world: World, table: Any) -> int:
    """The number of rows of a table."""
    with world.services.database.reading() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def events(world: World, job_id: str) -> list[str]:
    """The messages of a job's events, oldest first."""
    with world.services.database.reading() as session:
        rows = session.scalars(
            select(EventRow.message).where(EventRow.job_id == job_id).order_by(EventRow.id)
        )
        return list(rows)


def record(job: dict[str, Any], ending: Ending | None = None, org_id: str = "") -> JobRecord:
    """A job's record after its first claim."""
    hyper: dict[str, Any] = {}
    message = {
        "task_id": job["id"],
        "style_id": int(job["subject"]),
        "images": [{"source": "s3://media/a.png", "location": {"bucket": "media", "key": "a.png"}}],
        "captions": [None],
        "tags": [],
        "parameters": {},
        **hyper,
        **({"org_id": org_id} if org_id else {}),
    }
    request = JobRequest(job["id"], "style", job["subject"], "0" * 64, message)
    made = JobRecord.new(request, "worker-1", 120.0)
    return made.ended(ending) if ending else made


def write_record(world: World, made: JobRecord) -> None:
    """Put a record on S3."""
    services = world.services
    place = record_at(services.buckets.state, made.task_id)
    RecordObject(services.state_s3, place, JobRecord).write(made, None)


def complete_body(job: dict[str, Any], sequence: int) -> dict[str, Any]:
    """The body of a `complete` webhook."""
    return {
        "style_id": int(job["subject"]),
        "model_url": "s3://m/models/x",
        "task_id": job["id"],
        "sequence": sequence,
        "metadata": {},
        "training_metric": {"loss": 0.1},
    }


# ---- webhooks ------------------------------------------------------------------------------------


def test_the_same_news_twice_late_and_reordered_gives_one_state(world: World) -> None:
    job, worker = world.order(), world.worker()
    worker.progress(job, 1_000_005, loss=0.3)
    worker.progress(job, 1_000_004, loss=0.9)
    assert world.job(job["id"])["progress"]["loss"] == 0.3
    for _ in range(3):
        assert worker.complete(job, 1_000_006, webhook_id="msg_one").status_code == 200
    worker.progress(job, 1_000_007)
    ended = world.job(job["id"])
    assert ended["status"] == "succeeded"
    assert events(world, job["id"]).count("The job has successfully completed") == 1
    # An operator has sent the job back, and it has failed.
    assert worker.failed(job, 2_000_001).status_code == 200
    assert world.job(job["id"])["status"] == "failed"


def test_a_cancelled_job_that_completes_first_has_its_model(world: World) -> None:
    job, worker = world.order(), world.worker()
    worker.progress(job, 1_000_001)
    with world.client() as client:
        asked = client.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel").json()
    assert (asked["status"], asked["cancel_requested"]) == ("running", True)
    assert worker.progress(job, 1_000_002) == {"status": "ok", "cancel": True}
    place = cancel_file_at(world.services.buckets.state, job["id"])
    assert world.services.state_s3.exists(place)
    worker.complete(job, 1_000_003)
    assert world.job(job["id"])["status"] == "succeeded"


def test_a_worker_that_cancels_ends_the_job_as_cancelled(world: World) -> None:
    job = world.order()
    world.worker().failed(job, 1_000_001, code="CANCELLED")
    assert world.job(job["id"])["status"] == "cancelled"


def test_requests_that_no_worker_has_signed_change_nothing(world: World) -> None:
    job, worker = world.order(), world.worker()
    before = count(world, ReceiptRow), count(world, EventRow)
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=6)
    body = complete_body(job, 1_000_001)
    answers = [
        worker.send("complete", body, token="not-the-token" * 3),
        worker.send("complete", body, at=old),
        worker.send("complete", body, change=lambda raw: raw.replace(b"0.1", b"0.2")),
        worker.send("complete", body, change=lambda _: b""),
    ]
    assert [each.status_code for each in answers] == [401, 400, 400, 400]
    assert (count(world, ReceiptRow), count(world, EventRow)) == before
    assert world.job(job["id"])["status"] == "queued"


def test_news_with_nul_and_nan_is_cleaned_and_stored(world: World) -> None:
    job, worker = world.order(), world.worker()
    raw = json.dumps(
        {
            "style_id": int(job["subject"]),
            "task_id": job["id"],
            "sequence": 1_000_001,
            "progress": {"current_epoch": 1, "loss": float("nan"), "stage": "a\x00b"},
        }
    )
    assert worker.send("progress", json.loads(raw)).status_code == 200
    assert worker.failed(job, 1_000_002, code="BAD\x00\ud83d").status_code == 200
    ended = world.job(job["id"])
    assert ended["error"]["code"] == "BAD\ufffd\ufffd"
    with world.client() as client:
        assert client.get("/v1/fine_tuning/jobs?metadata[a]=x").status_code == 200
        assert client.get("/v1/fine_tuning/jobs").status_code == 200


# ---- the outbox ----------------------------------------------------------------------------------


def test_jobs_wait_while_the_broker_is_away_and_none_is_lost(ground: Ground) -> None:
    away = Ground(ground.database_url, ground.s3, None, ground.folder)
    with running(away) as world:
        jobs = [world.order() for _ in range(2)]
        ready = world.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["checks"]["database"] == ready.json()["checks"]["storage"] == "ok"
        assert ready.json()["checks"]["broker"] != "ok"
        place = same_place(world)
    with running(ground, **place) as world:
        found: list[dict[str, Any]] = []

        def all_there() -> bool:
            found.extend(messages(world))
            return len(found) >= 2

        until(all_there)
        assert sorted(each["task_id"] for each in found) == sorted(each["id"] for each in jobs)
        until(lambda: world.get("/ready").status_code == 200)


def test_two_servers_publish_each_message_once(ground: Ground) -> None:
    with running(ground) as one:
        if one.services.database.is_sqlite:
            pytest.skip("SQLite serves one process")
        with running(ground, **same_place(one), broker_depth=50) as two:
            jobs = []
            for world in (one, two) * 3:
                key = world.new_key(f"org_{secrets.token_hex(3)}", "train")
                jobs.append(world.order(key=key)["id"])
            found: list[str] = []

            def all_there() -> bool:
                found.extend(each["task_id"] for each in messages(one))
                return len(found) >= 2

            until(all_there)
            with one.services.database.reading() as session:
                marked = session.scalars(
                    select(OutboxRow.job_id).where(OutboxRow.published_at.is_not(None))
                ).all()
            assert sorted(found) == sorted(marked)
            assert len(set(found)) == len(found)


def test_a_relay_that_dies_before_its_mark_publishes_again(world: World) -> None:
    job = world.order()
    until(lambda: _published(world, job["id"]))

    def forget(session: Any) -> None:
        row = session.scalar(select(OutboxRow).where(OutboxRow.job_id == job["id"]))
        row.published_at = None

    world.services.database.write(forget)
    world.services.wake.set()
    until(lambda: _published(world, job["id"]))
    assert [each["task_id"] for each in messages(world)] == [job["id"]] * 2


def _published(world: World, job_id: str) -> bool:
    with world.services.database.reading() as session:
        row = session.scalar(select(OutboxRow).where(OutboxRow.job_id == job_id))
        return row is not None and row.published_at is not None


def test_a_failure_in_the_middle_of_an_order_leaves_no_part_of_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = world.upload()

    def fail(*_: object) -> None:
        raise RuntimeError("the process dies here")

    for place in ("api.store.jobs.put_out", "api.gate.once.Once.keep"):
        with monkeypatch.context() as patched, world.client() as client:
            patched.setattr(place, fail)
            body = {"kind": "style", "training_files": files}
            answer = client.post("/v1/fine_tuning/jobs", json=body)
            assert answer.status_code == 500
            assert answer.json()["code"] == "internal"
            assert "dies" not in answer.text
    assert (count(world, JobRow), count(world, OutboxRow), count(world, EventRow)) == (0, 0, 0)


# ---- records are the truth -----------------------------------------------------------------------


def test_news_of_an_unknown_job_adopts_it_and_is_never_answered_404(ground: Ground) -> None:
    with running(ground) as world:
        job = world.order(tags=["kept"], metadata={"a": "b"})
        place = same_place(world)
        port = world.settings.api.api_port
    url = f"sqlite:///{ground.folder / 'empty.db'}"
    empty = Ground(url, ground.s3, ground.rabbitmq, ground.folder)
    with running(empty, **place, api_port=port) as world:
        write_record(world, record(job))
        worker = world.worker()
        assert worker.progress(job, 1_000_001) == {"status": "ok"}
        adopted = world.job(job["id"])
        assert (adopted["status"], adopted["tags"]) == ("running", ["kept"])
        assert adopted["metadata"] == {"a": "b"}
        # A job that nothing is known of is not refused either: a worker would cancel it.
        unknown = {"id": "no-such-job", "subject": "5"}
        assert worker.progress(unknown, 1_000_001) == {"status": "ok"}


def test_a_job_of_another_backend_is_never_adopted_into_an_organisation(world: World) -> None:
    foreign = {"id": "550e8400-e29b-41d4-a716-446655440000", "subject": "10"}
    write_record(world, record(foreign))
    world.worker().progress(foreign, 1_000_001)
    with world.client() as client:
        assert client.get(f"/v1/jobs/{foreign['id']}").status_code == 404
        assert client.get("/v1/jobs").json()["data"] == []
    with world.services.database.reading() as session:
        assert session.get_one(JobRow, foreign["id"]).org_id is None


def test_a_job_without_an_order_has_the_organisation_of_its_record(world: World) -> None:
    job = {"id": "ftjob-000000000000000000000001", "subject": "1000000077"}
    write_record(world, record(job, org_id="org_one"))
    world.worker().progress(job, 1_000_001)
    assert world.job(job["id"])["status"] == "running"


def test_a_lost_ending_is_found_in_the_record(world: World) -> None:
    job = world.order()
    world.worker().progress(job, 1_000_001)
    write_record(world, record(job, Ending(EndingKind.COMPLETE, complete_body(job, 1_000_002))))

    def age(session: Any) -> None:
        session.get_one(JobRow, job["id"]).heard_at = 1.0

    world.services.database.write(age)
    assert world.app.state.duties.reconciler.turn() == 1
    assert world.job(job["id"])["status"] == "succeeded"
    with world.client() as client:
        assert len(client.get("/v1/models").json()["data"]) == 1


def test_a_database_of_an_hour_ago_gets_the_truth_of_every_job(ground: Ground) -> None:
    with running(ground, max_concurrent_trainings=50, broker_depth=50) as world:
        place = same_place(world)
        jobs = {name: world.order(name=name) for name in ("done", "runs", "waits", "cancelled")}
        services = world.services
        write_record(
            world,
            record(
                jobs["done"], Ending(EndingKind.COMPLETE, complete_body(jobs["done"], 1_000_009))
            ),
        )
        write_record(world, record(jobs["runs"]))
        with world.client() as client:
            client.post(f"/v1/fine_tuning/jobs/{jobs['cancelled']['id']}/cancel")
        assert services.state_s3.exists(order_at(services.buckets.state, jobs["waits"]["id"]))
    # The backup knows none of them.
    url = f"sqlite:///{ground.folder / 'old.db'}"
    empty = Ground(url, ground.s3, ground.rabbitmq, ground.folder)
    with running(empty, **place) as world:
        found = reconcile(world.services)
        assert found.restored == 4
        status = {name: world.job(job["id"]) for name, job in jobs.items()}
        assert status["done"]["status"] == "succeeded"
        assert status["runs"]["status"] == "running"
        assert status["waits"]["status"] == "queued"
        assert not any(status[name]["cancel_requested"] for name in ("done", "runs", "waits"))
        cancelled = status["cancelled"]
        assert cancelled["status"] == "cancelled" or cancelled["cancel_requested"]
        # Numbers of restored jobs are not given out again.
        assert world.order()["subject"] not in {job["subject"] for job in jobs.values()}
        assert reconcile(world.services).restored == 0


def test_a_number_whose_place_holds_a_model_is_left_out(world: World) -> None:
    taken = world.settings.api.api_style_id_start
    bucket = world.settings.storage.model_bucket_name
    key = f"models/style_{taken}/lora_weights.safetensors"
    client = world.services.s3.client
    client.put_object(Bucket=bucket, Key=key, Body=b"foreign")
    assert world.order()["subject"] == str(taken + 1)
    assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == b"foreign"


# ---- pause ---------------------------------------------------------------------------------------


def test_a_running_job_is_paused_by_its_worker_and_resumed_by_a_new_message(world: World) -> None:
    job, worker = world.order(), world.worker()
    until(lambda: _published(world, job["id"]))
    messages(world)
    worker.progress(job, 1_000_001)
    with world.client() as client:
        path = f"/v1/fine_tuning/jobs/{job['id']}"
        assert client.post(f"{path}/resume").json()["code"] == "job_not_paused"
        assert client.post(f"{path}/pause").json()["status"] == "pausing"
        assert worker.progress(job, 1_000_002) == {"status": "ok", "pause": True}
        worker.progress(job, 1_000_003, stage="paused")
        assert client.get(path).json()["status"] == "paused"
        assert client.post(f"{path}/resume").json()["status"] == "queued"
    until(lambda: [each["task_id"] for each in messages(world)] == [job["id"]])
    assert worker.progress(job, 2_000_001) == {"status": "ok"}
    assert world.job(job["id"])["status"] == "running"


def _asked(world: World, job: dict[str, Any], what: str) -> dict[str, Any]:
    with world.client() as client:
        answer = client.post(f"/v1/fine_tuning/jobs/{job['id']}/{what}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("late", [False, True])
def test_a_paused_job_that_has_started_is_ended_by_a_worker_when_it_is_cancelled(
    world: World, late: bool
) -> None:
    """`late`: the request comes before the report that the worker has put the job down."""
    job, worker = world.order(), world.worker()
    until(lambda: _published(world, job["id"]))
    messages(world)
    worker.progress(job, 1_000_001)
    _asked(world, job, "pause")
    if late:
        assert _asked(world, job, "cancel")["cancel_requested"]
        worker.progress(job, 1_000_002, stage="paused")
    else:
        worker.progress(job, 1_000_002, stage="paused")
        assert _asked(world, job, "cancel")["status"] == "queued"
    until(lambda: [each["task_id"] for each in messages(world)] == [job["id"]])
    assert worker.progress(job, 2_000_001) == {"status": "ok", "cancel": True}
    worker.failed(job, 2_000_002, code="CANCELLED")
    assert world.job(job["id"])["status"] == "cancelled"


def test_a_job_that_is_resumed_before_its_worker_has_put_it_down_is_not_left(world: World) -> None:
    job, worker = world.order(), world.worker()
    until(lambda: _published(world, job["id"]))
    messages(world)
    worker.progress(job, 1_000_001)
    _asked(world, job, "pause")
    assert _asked(world, job, "resume")["status"] == "queued"
    worker.progress(job, 1_000_002, stage="paused")
    assert world.job(job["id"])["status"] == "queued"
    until(lambda: [each["task_id"] for each in messages(world)] == [job["id"]])
    worker.progress(job, 2_000_001)
    assert world.job(job["id"])["status"] == "running"


def test_a_job_that_its_worker_never_put_down_holds_its_place_and_gets_no_second_message(
    ground: Ground,
) -> None:
    with running(ground, max_concurrent_trainings=1) as world:
        job, worker = world.order(), world.worker()
        until(lambda: _published(world, job["id"]))
        other = world.order()
        messages(world)
        worker.progress(job, 1_000_001)
        _asked(world, job, "pause")
        _asked(world, job, "resume")
        worker.progress(job, 1_000_002)
        assert world.job(job["id"])["status"] == "running"
        with world.services.database.reading() as session:
            assert session.get_one(JobRow, job["id"]).admitted_at is not None
            waiting = session.scalars(
                select(OutboxRow.job_id).where(OutboxRow.published_at.is_(None))
            ).all()
        assert job["id"] not in waiting
        assert world.job(other["id"])["status"] == "queued"


def test_a_waiting_job_is_paused_at_once_and_leaves_its_turn_to_others(world: World) -> None:
    jobs = [world.order() for _ in range(4)]
    until(lambda: _published(world, jobs[1]["id"]))
    with world.client() as client:
        paused = client.post(f"/v1/fine_tuning/jobs/{jobs[2]['id']}/pause").json()
        assert paused["status"] == "paused"
        world.worker().failed(jobs[0], 1_000_001)
        until(lambda: _published(world, jobs[3]["id"]))
        assert client.post(f"/v1/fine_tuning/jobs/{jobs[2]['id']}/cancel").json()["status"] == (
            "cancelled"
        )


# ---- the queue -----------------------------------------------------------------------------------


def test_organisations_take_turns_and_positions_are_exact(ground: Ground) -> None:
    with running(ground, broker_depth=1, max_concurrent_trainings=1) as world:
        many, few = world.new_key("org_many", "train"), world.new_key("org_few", "train")
        ordered = [world.order(key=many)["id"] for _ in range(4)]
        until(lambda: _published(world, ordered[0]))
        urgent = world.order(key=many, priority=5)["id"]
        other = world.order(key=few)["id"]
        expected = [ordered[0], other, urgent, *ordered[1:]]
        keys = dict.fromkeys([*ordered, urgent], many) | {other: few}
        positions = {each: world.job(each, keys[each])["queue_position"] for each in expected}
        assert sorted(expected, key=lambda each: positions[each]) == expected
        assert sorted(positions.values()) == [1, 2, 3, 4, 5, 6]
        ran = []
        for _ in range(6):
            message = until(lambda: messages(world))[0]
            ran.append(message["task_id"])
            job = world.job(message["task_id"], keys[message["task_id"]])
            world.worker().failed(job, 1_000_001)
        assert ran == expected


# ---- migrations ----------------------------------------------------------------------------------


def test_the_tables_are_made_from_empty_and_agree_with_the_program(database_url: str) -> None:
    database = Database(database_url)
    migrate(database)
    check(database)
    migrate(database)
    database.close()


def test_servers_that_start_together_migrate_one_after_the_other(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    versions = in_parallel(migrate, databases, at_once=4, name="migrate")
    assert len(set(versions)) == 1
    for database in databases:
        database.close()


def test_every_answer_about_a_job_carries_the_notice_of_the_server(ground: Ground) -> None:
    notice = "The base model is a stand-in: its images are noise."
    with running(ground, api_notice=notice) as world:
        job = world.order()
        assert job["notice"] == world.job(job["id"])["notice"] == notice
        for path in ("/v1/jobs", "/v1/fine_tuning/jobs", "/v1/experiments"):
            assert [each["notice"] for each in world.get(path).json()["data"]] == [notice]
