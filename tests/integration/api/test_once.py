"""Orders that are sent twice, at once or after a failure, are done once; limits hold exactly."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import func, select

from api.gate.limits import take_create
from api.gate.problems import Problem
from api.store.tables import WITH_WORKERS, BucketRow, JobRow, ReceiptRow
from tests.integration.api.world import Ground, World, running, until
from utils.threads import in_parallel


def order_with_key(world: World, files: list[str], key: str, **fields: Any) -> httpx.Response:
    """Order with an idempotency key."""
    body = {"kind": "style", "training_files": files} | fields
    with world.client(headers_more={"Idempotency-Key": key}) as client:
        return client.post("/v1/fine_tuning/jobs", json=body)


def jobs_in(world: World) -> int:
    """The number of jobs."""
    with world.services.database.reading() as session:
        return session.scalar(select(func.count()).select_from(JobRow)) or 0


def test_a_request_with_a_known_key_gets_the_first_answer(world: World) -> None:
    files = world.upload()
    first = order_with_key(world, files, "one")
    assert order_with_key(world, files, "one").json() == first.json()
    other = order_with_key(world, files, "one", name="another order")
    assert other.status_code == 422
    assert other.json()["code"] == "idempotency_key_reused"
    assert order_with_key(world, files, "two").json()["id"] != first.json()["id"]
    assert jobs_in(world) == 2


def test_a_refused_order_frees_its_key(world: World) -> None:
    files = world.upload()
    assert order_with_key(world, files, "k", parameters={"epochs": 0}).status_code == 400
    assert order_with_key(world, files, "k").status_code == 200


def test_a_server_that_fails_in_between_frees_the_key(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = world.upload()

    def fail(*_: object) -> None:
        raise RuntimeError("the process dies here")

    with monkeypatch.context() as patched:
        patched.setattr("api.store.jobs.put_out", fail)
        assert order_with_key(world, files, "k").status_code == 500
    assert order_with_key(world, files, "k").status_code == 200
    assert jobs_in(world) == 1


def test_eight_requests_at_once_with_one_key_make_one_job(world: World) -> None:
    files = world.upload()
    answers = in_parallel(
        lambda _: order_with_key(world, files, "same"), range(8), at_once=8, name="orders"
    )
    assert {each.status_code for each in answers} == {200}
    assert len({each.json()["id"] for each in answers}) == 1
    assert jobs_in(world) == 1


@contextlib.contextmanager
def dropping_proxy(target: str) -> Iterator[str]:
    """A proxy that passes each first request on and drops its answer."""
    seen: set[bytes] = set()

    class Handler(BaseHTTPRequestHandler):
        """Passes requests on."""

        def do_POST(self) -> None:  # pylint: disable=invalid-name
            """Pass one request on, and drop the first answer to it."""
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {
                name: value for name, value in self.headers.items() if name.lower() != "host"
            }
            answer = httpx.post(target + self.path, content=body, headers=headers, timeout=30)
            if body not in seen:
                seen.add(body)
                self.close_connection = True
                return
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers["content-type"])
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, format: str, *args: Any) -> None:  # pylint: disable=redefined-builtin
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_openai_client_that_loses_the_answer_and_retries_has_one_job(world: World) -> None:
    file_id = world.upload()[0]
    with dropping_proxy(world.url) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=world.key)
        job = client.fine_tuning.jobs.create(model="sd15", training_file=file_id)
        client.close()
    assert jobs_in(world) == 1
    assert world.job(job.id)["status"] == "queued"
    # The same order on purpose is another job.
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=world.key) as client:
        again = client.fine_tuning.jobs.create(model="sd15", training_file=file_id)
    assert again.id != job.id


# ---- threads that meet ---------------------------------------------------------------------------


def test_admission_by_eight_threads_never_exceeds_the_limit(ground: Ground) -> None:
    with running(ground, max_concurrent_trainings=2, broker_depth=100) as world:
        for _ in range(5):
            world.order()
        relay = world.app.state.relay
        in_parallel(lambda _: relay.admit(), range(24), at_once=8, name="admission")
        with world.services.database.reading() as session:
            admitted = session.scalar(
                select(func.count()).where(
                    JobRow.admitted_at.is_not(None), JobRow.status.in_(WITH_WORKERS)
                )
            )
        assert admitted == 2


def test_eight_threads_take_exactly_the_tokens_that_are_there(world: World) -> None:
    def take(_: int) -> int:
        try:
            world.services.database.write(lambda session: take_create(session, "org_x", 20))
        except Problem as problem:
            assert problem.code == "rate_limited"
            assert int(problem.headers["Retry-After"]) >= 1
            return 0
        return 1

    taken = sum(in_parallel(take, range(48), at_once=8, name="tokens"))
    assert 20 <= taken <= 24  # a token comes back every three seconds
    with world.services.database.reading() as session:
        assert session.get_one(BucketRow, "create:org_x").tokens < 1


def test_webhooks_of_one_job_from_eight_threads_end_in_the_newest_state(world: World) -> None:
    job, worker = world.order(), world.worker()
    until(lambda: world.job(job["id"])["status"] == "queued")

    def send(number: int) -> int:
        sequence = 1_000_000 + number // 2  # each twice
        body = {
            "style_id": int(job["subject"]),
            "task_id": job["id"],
            "sequence": sequence,
            "progress": {"current_epoch": number // 2, "loss": 0.5, "stage": "training"},
        }
        return worker.send("progress", body, webhook_id=f"msg_{sequence}").status_code

    assert set(in_parallel(send, range(64), at_once=8, name="webhooks")) == {200}
    assert world.job(job["id"])["progress"]["current_epoch"] == 31
    with world.services.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(ReceiptRow)) == 32


def test_requests_beyond_the_limit_of_a_key_are_told_when_to_come_back(ground: Ground) -> None:
    with running(ground, api_requests_per_minute=5) as world:
        answers = [world.get("/v1/jobs") for _ in range(8)]
    assert [each.status_code for each in answers[:5]] == [200] * 5
    refused = answers[-1]
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert "r=0" in refused.headers["ratelimit"]


def test_the_quota_of_stored_bytes_holds(ground: Ground) -> None:
    with running(ground, api_max_storage_bytes=100) as world:
        world.upload()
        with world.client() as client:
            answer = client.post("/v1/files", files={"file": ("a", io.BytesIO(b"x" * 90))})
            assert answer.status_code == 507
            listed = client.get("/v1/files").json()["data"]
        assert len(listed) == 1
        assert json.loads(answer.text)["code"] == "storage_full"
