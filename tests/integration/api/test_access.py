"""Every route of the OpenAPI description: keys, scopes and organisations."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.api.world import Ground, World, running

JOB_PATHS = ("job_id", "experiment_id", "training_id")


@dataclasses.dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the description."""

    method: str
    path: str
    scope: str | None
    body: Any

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def operations(schema: dict[str, Any]) -> Iterator[Operation]:
    """Every operation of a description, with a body that is valid."""
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            content = operation.get("requestBody", {}).get("content", {})
            body = None
            if "application/json" in content:
                body = example(content["application/json"]["schema"], schema)
            yield Operation(method.upper(), path, operation.get("x-scope"), body)


# pylint: disable-next=too-many-return-statements  # one for each type
def example(part: dict[str, Any], schema: dict[str, Any]) -> Any:
    """A value that a schema allows, with its required properties only."""
    if "$ref" in part:
        return example(schema["components"]["schemas"][part["$ref"].rpartition("/")[2]], schema)
    for choice in ("anyOf", "oneOf", "allOf"):
        if choice in part:
            return example(part[choice][0], schema)
    if "enum" in part:
        return part["enum"][0]
    match part.get("type"):
        case "object":
            required = part.get("required", [])
            return {name: example(part["properties"][name], schema) for name in required}
        case "array":
            item = example(part["items"], schema)
            return [item] * part.get("minItems", 0)
        case "integer":
            return part.get("minimum", 1)
        case "number":
            return part.get("minimum", 1.0)
        case "boolean":
            return True
        case "null":
            return None
    return "x" * max(1, part.get("minLength", 1))


@pytest.fixture(name="world", scope="module")
def _world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("api")
    ground = Ground(
        f"sqlite:///{folder / 'api.db'}",
        request.getfixturevalue("s3_server"),
        request.getfixturevalue("rabbitmq"),
        folder,
    )
    with running(ground) as world:
        yield world


@pytest.fixture(name="schema", scope="module")
def _schema(world: World) -> dict[str, Any]:
    schema = httpx.get(f"{world.url}/openapi.json").json()
    assert len(list(operations(schema))) > 60
    return dict(schema)


@dataclasses.dataclass(frozen=True, slots=True)
class Things:
    """Ids of things that an organisation owns."""

    job: str
    file: str
    upload: str
    model: str
    key: str
    endpoint: str

    def path(self, template: str) -> str:
        """A path with these ids."""
        values = dict.fromkeys(JOB_PATHS, self.job) | {
            "file_id": self.file,
            "upload_id": self.upload,
            "model": self.model,
            "key_id": self.key,
            "endpoint_id": self.endpoint,
            "org_id": "org_one",
            "export_id": self.job,
            "code": "internal",
        }
        return re.sub(r"{(\w+)}", lambda match: values[match[1]], template)


@pytest.fixture(name="things", scope="module")
def _things(world: World) -> Things:
    """A job that has ended with a model, a file, an upload and a key of the first organisation."""
    job = world.order()
    assert world.worker().complete(job, 1_000_001).status_code == 200
    with world.client() as client:
        upload = client.post("/v1/uploads", json={"filename": "a", "bytes": 10}).json()
        key = client.post("/v1/organization/api_keys", json={"name": "other"}).json()
        address = {"url": "https://customer.example.org/hooks"}
        endpoint = client.post("/v1/organization/webhook_endpoints", json=address).json()
        model = world.job(job["id"])["fine_tuned_model"]
    return Things(job["id"], world.upload()[0], upload["id"], model, key["id"], endpoint["id"])


def call(client: httpx.Client, operation: Operation, path: str) -> httpx.Response:
    """Call an operation with a valid body."""
    if operation.method in ("GET", "HEAD"):
        return client.request(operation.method, path, params={"org_id": "org_one"})
    if operation.path in ("/v1/files", "/v1/uploads/{upload_id}/parts"):
        return client.post(path, files={"file": ("a.txt", b"a")}, data={"purpose": "fine-tune"})
    return client.request(operation.method, path, json=operation.body, params={"org_id": "org_one"})


def test_every_operation_but_the_public_ones_refuses_a_request_without_a_key(
    world: World, schema: dict[str, Any], things: Things
) -> None:
    public = {str(each) for each in operations(schema) if each.scope is None}
    assert public == {
        "GET /health",
        "GET /ready",
        "GET /metrics",
        "GET /problems/{code}",
        "GET /api/v1/health",
        "PATCH /api/webhooks/training/progress",
        "POST /api/webhooks/training/complete",
        "POST /api/webhooks/training/failed",
    }
    with httpx.Client(base_url=world.url) as client:
        for operation in operations(schema):
            answer = call(client, operation, things.path(operation.path))
            if operation.scope is not None or "webhooks" in operation.path:
                assert answer.status_code == 401, operation
                assert answer.headers["content-type"] == "application/problem+json"


def test_every_operation_refuses_a_key_without_its_scope(
    world: World, schema: dict[str, Any], things: Things
) -> None:
    lacking = {"read": "none", "train": "read", "infer": "train", "admin": "train"}
    keys = {scope: world.new_key("org_one", scope) for scope in ("read", "train")}
    keys["none"] = _key_without_scopes(world)
    for operation in operations(schema):
        if operation.scope is None:
            continue
        with world.client(keys[lacking[str(operation.scope)]]) as client:
            answer = call(client, operation, things.path(operation.path))
        assert answer.status_code == 403, (operation, answer.text)
        assert answer.json()["code"] == "scope_missing"


def _key_without_scopes(world: World) -> str:
    """No command makes such a key."""
    keys = world.services.keys
    return world.services.database.write(
        lambda session: keys.create(session, "org_one", name="none", scopes=[])[1]
    )


def test_ids_in_a_body_or_a_query_do_not_reach_another_organisation(
    world: World, things: Things
) -> None:
    stranger = world.new_key("org_two", "admin")
    own = world.order(key=stranger)["id"]
    pair = [own, things.job]
    with world.client(stranger) as client:
        answers = {
            "compare": client.post("/v1/experiments/compare", json={"ids": pair}),
            "dialect": client.post("/api/experiments/compare", json={"experiment_ids": pair}),
            "estimate": client.post(
                "/v1/fine_tuning/jobs/estimate",
                json={"kind": "style", "training_files": [things.file]},
            ),
            "experiments": client.get("/v1/experiments", params={"after": things.job}),
        }
        lists = ("jobs", "files", "models", "fine_tuning/jobs", "organization/api_keys")
        ids = (things.job, things.file, things.model, things.job, things.key)
        pages = {
            name: client.get(f"/v1/{name}", params={"after": each})
            for name, each in zip(lists, ids, strict=True)
        }
    assert {name: each.status_code for name, each in answers.items()} == dict.fromkeys(answers, 404)
    assert {name: each.status_code for name, each in pages.items()} == dict.fromkeys(lists, 400)


def test_no_operation_shows_or_changes_what_another_organisation_owns(
    world: World, schema: dict[str, Any], things: Things
) -> None:
    stranger = world.new_key("org_two", "admin")
    ours = json.dumps([things.job, things.file, things.upload, things.model, things.key])
    with_ids = [each for each in operations(schema) if "{" in each.path and each.scope]
    assert len(with_ids) > 40
    for operation in with_ids:
        with world.client(stranger) as client:
            answer = call(client, operation, things.path(operation.path))
        expected = 403 if "{org_id}" in operation.path else 404
        assert answer.status_code == expected, (operation, answer.text)
    for operation in operations(schema):
        if "{" in operation.path or operation.method != "GET" or operation.scope is None:
            continue
        if operation.path in ("/v1/events",):
            continue
        with world.client(stranger) as client:
            answer = client.get(operation.path)
        assert not any(each in answer.text for each in json.loads(ours)), operation
    # Nothing has changed.
    assert world.job(things.job)["status"] == "succeeded"
    with world.client() as client:
        assert client.get(f"/v1/files/{things.file}").status_code == 200
        assert client.get(f"/v1/models/{things.model}").status_code == 200


def test_an_order_cannot_name_a_file_of_another_organisation(world: World, things: Things) -> None:
    stranger = world.new_key("org_two", "train")
    own = world.upload(key=stranger)
    orders: list[dict[str, Any]] = [
        {"training_files": [things.file]},
        {"training_file": things.file},
        {"training_files": own, "validation_files": [things.file]},
        {"training_files": own, "options": {"validation_images": [things.file]}},
    ]
    bucket = world.settings.storage.aws_storage_bucket_name
    key = f"orgs/org_one/files/{things.file}"
    with world.client(stranger) as client:
        for order in orders:
            answer = client.post("/v1/fine_tuning/jobs", json={"kind": "style"} | order)
            assert answer.status_code == 404, answer.text
        for address in (f"s3://{bucket}/{key}", key, f"https://{bucket}.s3.amazonaws.com/{key}"):
            order = {"training_files": own, "options": {"validation_images": [address]}}
            answer = client.post("/v1/fine_tuning/jobs", json={"kind": "style"} | order)
            assert answer.status_code == 400, answer.text


def test_a_revoked_key_is_refused_at_once_and_an_expired_one_too(world: World) -> None:
    with world.client() as client:
        made = client.post("/v1/organization/api_keys", json={"name": "x", "scopes": ["read"]})
        value, key_id = made.json()["value"], made.json()["id"]
        with world.client(value) as other:
            assert other.get("/v1/files").status_code == 200
            assert client.delete(f"/v1/organization/api_keys/{key_id}").status_code == 200
            assert other.get("/v1/files").status_code == 401
        shown = client.get("/v1/organization/api_keys").text
    assert value not in shown


@pytest.mark.parametrize(
    "header", [b"Bearer k\xe9y", b"Bearer x", b"Basic abc", b"Bearer \xf0\x9f\x98", b"sk-abc"]
)
def test_a_malformed_key_is_refused_with_401(world: World, header: bytes) -> None:
    answer = httpx.get(f"{world.url}/v1/files", headers=[(b"authorization", header)])
    assert answer.status_code == 401
    assert answer.json()["code"] == "unknown_key"
