"""Webhooks of organisations: signed, sent until they are taken, and to public hosts only."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from sqlalchemy import select, update
from standardwebhooks import Webhook, WebhookVerificationError

from api.duties.courier import DELAYS
from api.store.tables import EndpointRow, WebhookRow
from tests.integration.api.world import Ground, World, running, until

PATH = "/v1/organization/webhook_endpoints"


class Customer:
    """A receiver that keeps every request, and answers as it is told."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], str]] = []
        self.status, self.headers = 200, dict[str, str]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            # pylint: disable=missing-class-docstring,missing-function-docstring,invalid-name
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                head = {name.lower(): value for name, value in self.headers.items()}
                outer.requests.append((head, body))
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hooks"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def types(self) -> list[str]:
        """The types of all webhooks that came, in their order."""
        return [json.loads(body)["type"] for _, body in self.requests]


@pytest.fixture(name="customer")
def _customer() -> Iterator[Customer]:
    customer = Customer()
    yield customer
    customer.close()


@pytest.fixture(name="world")
def _world(ground: Ground) -> Iterator[World]:
    with running(ground, api_private_webhooks=True) as world:
        yield world


def endpoint_of(world: World, customer: Customer, **fields: Any) -> dict[str, Any]:
    """A new endpoint at this receiver."""
    with world.client() as client:
        answer = client.post(PATH, json={"url": customer.url, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def verified(request: tuple[dict[str, str], str], secret: str) -> dict[str, Any]:
    """The body of a request, if this secret has signed it."""
    head, body = request
    return dict(Webhook(secret).verify(body, head))


def sent(world: World, endpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The webhooks of an endpoint as the organisation sees them, newest first."""
    return list(world.get(f"{PATH}/{endpoint['id']}/webhooks").json()["data"])


def _tried(world: World, endpoint: dict[str, Any], attempts: int) -> bool:
    return bool(sent(world, endpoint)[0]["attempts"] == attempts)


def make_due(world: World) -> None:
    """Have all waiting webhooks due now."""
    world.services.database.write(
        lambda session: session.execute(update(WebhookRow).values(due_at=1.0))
    )


def test_endings_of_jobs_come_signed_and_only_to_their_organisation(
    world: World, customer: Customer
) -> None:
    endpoint = endpoint_of(world, customer)
    other = world.order(key=world.new_key("org_other", "train"))
    done, failed, cancelled = (world.order() for _ in range(3))
    with world.client() as client:
        client.post(f"/v1/jobs/{cancelled['id']}/cancel")
    worker = world.worker()
    worker.progress(done, 1_000_001)
    worker.complete(done, 1_000_002)
    worker.complete(done, 1_000_002)
    worker.failed(failed, 1_000_001)
    worker.complete(other, 1_000_001)
    until(lambda: len(customer.requests) >= 3)
    until(lambda: [each["state"] for each in sent(world, endpoint)] == ["delivered"] * 3)
    bodies = [verified(each, endpoint["secret"]) for each in customer.requests]
    assert {(each["type"], each["data"]["id"]) for each in bodies} == {
        ("fine_tuning.job.succeeded", done["id"]),
        ("fine_tuning.job.failed", failed["id"]),
        ("fine_tuning.job.cancelled", cancelled["id"]),
    }
    assert len(customer.requests) == 3
    assert all(head["webhook-id"] == json.loads(body)["id"] for head, body in customer.requests)


def test_a_webhook_is_sent_again_with_its_id_until_it_is_taken(
    world: World, customer: Customer
) -> None:
    endpoint = endpoint_of(world, customer)
    customer.status, customer.headers = 503, {"Retry-After": "600"}
    world.worker().complete(world.order(), 1_000_001)
    (first,) = until(lambda: [each for each in sent(world, endpoint) if each["attempts"] == 1])
    assert (first["state"], first["status"]) == ("waiting", 503)
    assert first["next_attempt_at"] - first["created_at"] >= 590
    customer.status = 204
    make_due(world)
    until(lambda: sent(world, endpoint)[0]["state"] == "delivered")
    ids = {head["webhook-id"] for head, _ in customer.requests}
    assert (len(ids), sent(world, endpoint)[0]["attempts"]) == (1, 2)


def test_a_webhook_that_nobody_takes_is_given_up(world: World, customer: Customer) -> None:
    endpoint = endpoint_of(world, customer)
    customer.status = 500
    world.worker().complete(world.order(), 1_000_001)
    for attempt in range(1, len(DELAYS) + 2):
        until(functools.partial(_tried, world, endpoint, attempt))
        make_due(world)
    (row,) = sent(world, endpoint)
    assert (row["state"], row["attempts"]) == ("given_up", len(DELAYS) + 1)


def test_after_a_rotation_both_secrets_sign_for_a_day(world: World, customer: Customer) -> None:
    endpoint = endpoint_of(world, customer)
    path = f"{PATH}/{endpoint['id']}"
    with world.client() as client:
        rotated = client.post(f"{path}/rotate_secret").json()
        assert rotated["secret"] != endpoint["secret"]
        assert "secret" not in client.get(path).json()
        client.post(f"{path}/test")
        until(lambda: len(customer.requests) == 1)
        for secret in (endpoint["secret"], rotated["secret"]):
            assert verified(customer.requests[0], secret)["type"] == "webhook.test"
        world.services.database.write(
            lambda session: session.execute(update(EndpointRow).values(old_secret_until=1.0))
        )
        client.post(f"{path}/test")
        until(lambda: len(customer.requests) == 2)
    assert verified(customer.requests[1], rotated["secret"])
    with pytest.raises(WebhookVerificationError):
        verified(customer.requests[1], endpoint["secret"])


def test_an_endpoint_that_answers_410_is_off_until_its_next_test(
    world: World, customer: Customer
) -> None:
    endpoint = endpoint_of(world, customer)
    path, customer.status = f"{PATH}/{endpoint['id']}", 410
    world.worker().complete(world.order(), 1_000_001)
    until(lambda: not world.get(path).json()["is_active"])
    world.worker().complete(world.order(), 1_000_001)
    customer.status = 200
    with world.client() as client:
        client.post(f"{path}/test")
        until(lambda: customer.types()[1:] == ["webhook.test"])
        assert client.get(path).json()["is_active"]


def test_selected_types_come_and_a_deleted_endpoint_gets_nothing(
    world: World, customer: Customer
) -> None:
    endpoint = endpoint_of(world, customer, events=["fine_tuning.job.running"])
    job = world.order()
    world.worker().progress(job, 1_000_001)
    until(lambda: customer.types() == ["fine_tuning.job.running"])
    with world.client() as client:
        assert client.delete(f"{PATH}/{endpoint['id']}").json()["deleted"]
        assert client.get(f"{PATH}/{endpoint['id']}").status_code == 404
    world.worker().progress(world.order(), 1_000_001)
    world.app.state.duties.courier.turn()
    assert len(customer.requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://customer.example.org/hooks",
        "https://127.0.0.1/hooks",
        "https://[::1]/hooks",
        "https://169.254.169.254/latest/meta-data",
        "https://10.0.0.1:8443/",
        "https://localhost/hooks",
        "https://minio/hooks",
        "https://user:password@customer.example.org/",
        "https://customer.example.org:99999/",
        "ftp://customer.example.org/",
        "https://customer.example.org/a b",
    ],
)
def test_an_address_that_is_not_public_is_refused(ground: Ground, url: str) -> None:
    if "postgresql" in ground.database_url:
        pytest.skip("the database has no part in it")
    with running(ground) as world, world.client() as client:
        answer = client.post(PATH, json={"url": url})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "url")


def test_a_name_that_leads_to_a_private_address_gets_nothing(
    ground: Ground, customer: Customer
) -> None:
    with running(ground) as world:
        with world.client() as client:
            endpoint = client.post(PATH, json={"url": "https://customer.example.org/"}).json()
        world.services.database.write(
            lambda session: session.execute(update(EndpointRow).values(url=customer.url))
        )
        world.worker().complete(world.order(), 1_000_001)
        (row,) = until(lambda: [each for each in sent(world, endpoint) if each["attempts"]])
        assert "private address" in row["problem"] and row["status"] is None
    assert not customer.requests


def test_no_table_has_the_secret_of_an_endpoint(world: World, customer: Customer) -> None:
    secret = endpoint_of(world, customer)["secret"].removeprefix("whsec_")
    with world.services.database.reading() as session:
        for table in (EndpointRow, WebhookRow):
            for row in session.scalars(select(table)):
                assert not any(secret in str(value) for value in vars(row).values())
