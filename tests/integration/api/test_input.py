"""Awkward input: refused with the field's name, and never stored."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.api.world import Ground, World, running

BAD_TEXT = ('"a\\u0000b"', '"\\ud83d"')
BAD_NUMBERS = ("NaN", "1e400", "99999999999999999999", "-Infinity")


@pytest.fixture(name="world", params=["sqlite", "postgresql"], scope="module")
def _world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("api")
    url = f"sqlite:///{folder / 'api.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").create_database("awkward_input")
    s3, broker = request.getfixturevalue("s3_server"), request.getfixturevalue("rabbitmq")
    with running(Ground(url, s3, broker, folder), api_max_file_bytes=4 * 1024**2) as world:
        yield world


def post(world: World, path: str, raw: str) -> httpx.Response:
    """Send a body as it is."""
    with world.client(headers_more={"Content-Type": "application/json"}) as client:
        return client.post(path, content=raw.encode())


BODIES = (
    *('{"metadata": {"a": %s}, "training_files": []}', '{"name": %s}', '{"tags": [%s]}'),
    *('{"model": %s}', '{"options": {"x": {"y": [%s]}}}', '{"metadata": {%s: "x"}}'),
)
NUMBERS = ('{"seed": %s}', '{"parameters": {"epochs": %s}}', '{"priority": %s}')


@pytest.mark.parametrize("value", BAD_TEXT)
@pytest.mark.parametrize("body", BODIES)
def test_text_that_cannot_be_stored_is_refused(world: World, body: str, value: str) -> None:
    for path in ("/v1/fine_tuning/jobs", "/v1/jobs/estimate"):
        answer = post(world, path, body % value)
        assert answer.status_code == 400, answer.text
        assert answer.json()["code"] == "invalid_parameter"
        assert answer.json()["error"]["param"]
    assert world.get("/v1/jobs?metadata[a]=x").status_code == 200


@pytest.mark.parametrize("value", BAD_NUMBERS)
@pytest.mark.parametrize("body", NUMBERS)
def test_numbers_that_cannot_be_stored_are_refused(world: World, body: str, value: str) -> None:
    answer = post(world, "/v1/fine_tuning/jobs", body % value)
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] in ("invalid_parameter", "invalid_json")


@pytest.mark.parametrize(
    "query",
    [
        "/v1/jobs?limit=99999999999999999999",
        "/v1/jobs?limit=x",
        "/v1/jobs?after=%00",
        "/v1/jobs?kind=a%00b",
        "/v1/jobs?metadata[a%00]=x",
        "/v1/jobs?metadata[a]=%00",
        "/v1/jobs/x%00y",
        "/v1/files/%00",
        "/v1/models/%00",
        "/v1/organization/audit_log?after=99999999999999999999",
    ],
)
def test_a_query_or_path_that_cannot_be_stored_is_refused(world: World, query: str) -> None:
    answer = world.get(query)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("raw", ["{", "[1", "\xff", '{"a": ' * 100_000])
def test_a_body_that_is_no_json_is_refused(world: World, raw: str) -> None:
    with world.client(headers_more={"Content-Type": "application/json"}) as client:
        answer = client.post("/v1/jobs", content=raw.encode("latin-1"))
    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_json"


def test_all_wrong_parameters_are_named_at_once(world: World) -> None:
    answer = post(world, "/v1/jobs", '{"seed": "x", "priority": 99, "unknown": 1}')
    assert {each["param"] for each in answer.json()["errors"]} == {"seed", "priority", "unknown"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"parameters": {"epochs": 0}}, "parameters.epochs"),
        ({"parameters": {"epoch": 5}}, "parameters.epoch"),
        ({"options": {"captions": ["a", "b"]}}, "options.captions"),
        ({"options": {"triger_word": "x"}}, "options.triger_word"),
        ({"training_files": ["/etc/passwd"]}, "training_file"),
        ({"kind": "unheard"}, "kind"),
        ({"method": {"type": "dpo"}}, "method"),
    ],
)
def test_a_wrong_order_names_the_parameter(
    world: World, fields: dict[str, Any], param: str
) -> None:
    order = {"kind": "style", "training_files": world.upload()} | fields
    with world.client() as client:
        answer = client.post("/v1/jobs", json=order)
        assert answer.status_code in (400, 501), answer.text
        assert answer.json()["error"]["param"] == param
        assert client.post("/v1/jobs", json=order | {"validate_only": True}).status_code in (
            400,
            501,
        )
        assert answer.json()["error"]["message"]


# ---- uploads -------------------------------------------------------------------------------------


def form(disposition: bytes, content: bytes = b"hello") -> bytes:
    """A form with one file."""
    return (
        b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b"--b\r\nContent-Disposition: form-data; "
        + disposition
        + b"\r\n\r\n"
        + content
        + b"\r\n--b--\r\n"
    )


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b"name=file; filename*=utf-8''%ED%8C%8C%EC%9D%BC.jsonl", "파일.jsonl"),
        (
            b"name=file; filename=\"_.jsonl\"; filename*=utf-8''%ED%8C%8C%EC%9D%BC.jsonl",
            "파일.jsonl",
        ),
        ('name="file"; filename="파일.jsonl"'.encode(), "파일.jsonl"),
        (b'name="file"; filename="a%22b.jsonl"', 'a"b.jsonl'),
        (b'name="file"; filename="a\\"b.jsonl"', 'a"b.jsonl'),
        (b'name="file"; filename="../../x.jsonl"', "x.jsonl"),
        (b'name="file"; filename="C:\\dir\\x.jsonl"', "x.jsonl"),
        (b'name="file"; filename=".."', "file"),
        (b'name="file"; filename="a%0D%0Ab"', "a  b"),
    ],
)
def test_a_file_has_the_name_that_its_client_meant(
    world: World, disposition: bytes, name: str
) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    with world.client(headers_more=kind) as client:
        made = client.post("/v1/files", content=form(disposition))
        assert made.status_code == 200, made.text
        shown = client.get(f"/v1/files/{made.json()['id']}").json()
        assert made.json()["filename"] == shown["filename"] == name
        link = client.get(f"/v1/files/{shown['id']}/content")
    assert link.status_code == 307
    content = httpx.get(link.headers["location"])
    assert content.content == b"hello"
    header = content.headers["content-disposition"]
    assert header.startswith('attachment; filename="')
    assert "\r" not in header and "\n" not in header


def test_many_images_come_in_one_form(world: World) -> None:
    ids = world.upload(25)
    assert len(set(ids)) == 25
    job = world.order(training_files=ids)
    assert job["training_files"] == ids


class HalfSent:
    """A request of which only the beginning is sent."""

    def __init__(self, world: World, headers: dict[str, str], body: bytes) -> None:
        host, port = world.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=20)
        lines = ["POST /v1/files HTTP/1.1", f"Host: {host}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.socket.sendall("\r\n".join([*lines, "", ""]).encode() + body)

    def answer(self) -> bytes:
        """The beginning of the answer."""
        return self.socket.recv(65536)

    def close(self) -> None:
        """Vanish."""
        self.socket.close()


def test_a_wrong_key_and_a_declared_size_are_refused_before_the_body(world: World) -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    begin = form(b'name="file"; filename="a"', b"x" * 1024**2)[:-20]
    common = {"Content-Type": "multipart/form-data; boundary=b", "Expect": "100-continue"}
    wrong = HalfSent(
        world, common | {"Authorization": "Bearer sk-x", "Content-Length": str(64 * 1024**2)}, b""
    )
    assert wrong.answer().startswith(b"HTTP/1.1 401")
    wrong.close()
    chunked = HalfSent(
        world,
        {
            "Content-Type": "multipart/form-data; boundary=b",
            "Authorization": f"Bearer {world.key}",
            "Content-Length": str(64 * 1024**2),
        },
        begin * 1,
    )
    assert b"413" in chunked.answer().split(b"\r\n")[0]
    chunked.close()
    assert not {name for name in set(os.listdir(tempfile.gettempdir())) - before if "tmp" in name}


def test_a_client_that_vanishes_leaves_nothing(world: World) -> None:
    bucket = world.settings.storage.aws_storage_bucket_name
    client = world.services.s3.client
    objects = {each["Key"] for each in client.list_objects_v2(Bucket=bucket).get("Contents", ())}
    files = world.get("/v1/files?limit=100").json()
    begin = form(b'name="file"; filename="a"', b"x" * 3 * 1024**2)[:-20]
    gone = HalfSent(
        world,
        {
            "Content-Type": "multipart/form-data; boundary=b",
            "Authorization": f"Bearer {world.key}",
            "Content-Length": str(3 * 1024**2 + 100_000),
        },
        begin,
    )
    time.sleep(0.5)
    gone.close()
    time.sleep(1.0)
    after = {each["Key"] for each in client.list_objects_v2(Bucket=bucket).get("Contents", ())}
    assert after == objects
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")
    assert world.get("/v1/files?limit=100").json() == files


def test_a_large_file_goes_straight_to_s3_in_parts(world: World) -> None:
    body = os.urandom(1024) * 70 * 1024
    with world.client() as client:
        upload = client.post(
            "/v1/uploads",
            json={
                "filename": "../big.bin",
                "bytes": len(body),
                "mime_type": "application/octet-stream",
                "purpose": "fine-tune",
            },
        ).json()
        size = upload["part_bytes"]
        assert len(upload["parts"]) == 2
        early = client.post(f"/v1/uploads/{upload['id']}/complete")
        assert early.status_code == 400
        for part in upload["parts"]:
            piece = body[(part["number"] - 1) * size : part["number"] * size]
            assert httpx.put(part["url"], content=piece, timeout=60).status_code == 200
        done = client.post(f"/v1/uploads/{upload['id']}/complete").json()
        assert done["status"] == "completed"
        assert done["file"]["bytes"] == len(body)
        assert done["file"]["filename"] == "big.bin"
        again = client.post(f"/v1/uploads/{upload['id']}/complete")
        assert again.json()["code"] == "upload_has_ended"
    world.order(training_files=[done["file"]["id"]])


def test_every_id_of_every_list_works_in_its_routes_encoded_or_not(world: World) -> None:
    job = world.order(suffix="A B/c%d#e?f", model="owner/Base Model#1")
    world.worker().complete(job, 1_000_001)
    with world.client() as client:
        for name in ("models", "files", "jobs", "experiments"):
            page = client.get(f"/v1/{name}?limit=100").json()
            assert page["data"], name
            for each in page["data"]:
                for spelt in (each["id"], each["id"].replace(":", "%3A").replace("-", "%2D")):
                    answer = client.get(f"/v1/{name}/{spelt}")
                    assert answer.status_code == 200, (name, spelt)
                    assert answer.json()["id"] == each["id"]


def test_a_page_of_problems_lists_what_the_answer_points_to(world: World) -> None:
    missing = world.get("/v1/jobs/ftjob-000000000000000000000000").json()
    assert missing["type"] == "/problems/job_not_found"
    assert world.get(missing["type"]).status_code == 200
    assert httpx.head(f"{world.url}/health").status_code == 200
    assert world.get("/no/such/route").json()["code"] == "not_found"
    with world.client() as client:
        assert client.put("/v1/jobs").json()["code"] == "method_not_allowed"


def test_the_reference_pages_load_nothing_from_elsewhere(world: World) -> None:
    for page in ("/docs", "/redoc"):
        text = world.get(page).text
        assert "https://" not in text.replace("https://tiangolo.com", "")
    assert world.get("/reference-assets/swagger-ui-bundle.js").status_code == 200
    assert world.get("/reference-assets/redoc.standalone.js").status_code == 200
    text = world.get("/metrics").text
    assert "training_server_api_requests_total" in text
    assert json.loads(world.get("/openapi.json").text)["openapi"]
