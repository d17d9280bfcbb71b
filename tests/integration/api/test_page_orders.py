"""Orders from the page: images are judged before anything is spent, captions kept, one job made."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from PIL import Image
from skimage import data

from api.store.tables import DraftRow, JobRow
from tests.integration.api.test_page import ZOO, _assert_harmless
from tests.integration.api.visitor import Visitor, text_of
from tests.integration.api.world import Ground, World, running

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")


@pytest.fixture(name="world", scope="module")
def _world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("orders")
    ground = Ground(
        f"sqlite:///{folder / 'api.db'}",
        request.getfixturevalue("s3_server"),
        request.getfixturevalue("rabbitmq"),
        folder,
    )
    limits = {"api_requests_per_minute": 10**6, "api_creates_per_minute": 10**6}
    values = {"gpu_price_per_hour": 3.0, "llm_base_models": "owner/tiny"}
    with running(ground, **limits, **values) as world:
        yield world


@pytest.fixture(name="visitor", scope="module")
def _visitor(world: World) -> Visitor:
    return Visitor(world, world.key)


def png(pixels: np.ndarray) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def photographs(names: tuple[str, ...] = PHOTOGRAPHS) -> list[tuple[str, bytes, str]]:
    """Photographs as files of a form."""
    return [(f"{name}.png", png(getattr(data, name)()), "image/png") for name in names]


def draft_of(visitor: Visitor, files: list[tuple[str, bytes, str]]) -> str:
    """The address of a new draft with these images."""
    answer = visitor.upload("/styles/new", "/styles/new", files)
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


def test_each_image_is_judged_before_anything_is_spent(world: World, visitor: Visitor) -> None:
    blank = png(np.full((600, 600, 3), 90, np.uint8))
    files = photographs() + [
        ("again.png", photographs(("coffee",))[0][1], "image/png"),
        ("blank.png", blank, "image/png"),
        ("page.png", b"<!DOCTYPE html><p>", "image/png"),
        ("tiny.png", png(data.astronaut()[:64, :64]), "image/png"),
    ]
    before = _count(world)
    address = draft_of(visitor, files)
    source = visitor.text(address)
    page = text_of(source)
    for sentence in (
        "is the same image as coffee.png",
        "shows nothing: it is a single colour",
        "is a web page, not an image",
        "is too small (64 x 64 pixels",
        "Only 3 images can be trained on",
        "left out: 4",
    ):
        assert sentence in page, page
    assert _count(world) == before
    crops = re.findall(rf'src="({address}/images/file-\w+/crop)"', source)
    # The copy of an image has a crop, too; it is left out because of the other one.
    assert len(crops) == 4
    for each in re.findall(rf'src="({address}/images/[^"]+)"', source):
        answer = visitor.get(each)
        assert answer.headers["content-type"] == "image/jpeg"
        Image.open(io.BytesIO(answer.content)).verify()
    stranger = Visitor(world, world.new_key("org_two", "admin"))
    assert stranger.get(address).status_code == 404
    assert stranger.get(crops[0]).status_code == 404
    assert stranger.submit("/styles/new", f"{address}/start", {}).status_code == 404


def _count(world: World) -> int:
    with world.services.database.reading() as session:
        return session.query(JobRow).count()


def test_captions_and_settings_are_kept_and_the_order_has_them_once(
    world: World, visitor: Visitor
) -> None:
    address = draft_of(visitor, photographs())
    source = visitor.text(address)
    ids = re.findall(r'name="caption\.(file-\w+)"', source)
    assert len(ids) == 3
    fields = {
        "name": "harbour",
        "trigger_word": "harbourstyle",
        "preset": "quick",
        "tags": "sea, test",
        "prompts": "a boat\n\na pier",
        f"caption.{ids[0]}": "an astronaut",
        f"caption.{ids[2]}": "a cat",
    }
    assert visitor.submit(address, address, fields).status_code == 303
    source = visitor.text(address)
    assert ">\nan astronaut</textarea>" in source and 'value="harbourstyle"' in source
    first = visitor.submit(address, f"{address}/start", fields)
    second = visitor.submit("/jobs", f"{address}/start", fields)
    assert first.status_code == second.status_code == 303, first.text
    assert first.headers["location"] == second.headers["location"]
    assert visitor.get(address).headers["location"] == first.headers["location"]
    job = world.job(first.headers["location"].rpartition("/")[2])
    assert job["name"] == "harbour" and job["tags"] == ["sea", "test"]
    assert job["training_files"] == ids
    with world.services.database.reading() as session:
        message = json.loads(session.get_one(JobRow, job["id"]).message)["data"]
    assert message["captions"] == ["an astronaut", None, "a cat"]
    assert message["trigger_word"] == "harbourstyle"
    assert message["sample_prompts"] == ["a boat", "a pier"]
    assert message["parameters"]["epochs"] == round(500 / 3)


def test_an_image_can_be_taken_out_and_others_added(world: World, visitor: Visitor) -> None:
    address = draft_of(visitor, photographs(("astronaut", "coffee")))
    assert "at least 3 are needed" in text_of(visitor.text(address))
    answer = visitor.submit(address, f"{address}/start", {"preset": "quick"})
    assert answer.status_code == 422
    visitor.upload(address, f"{address}/images", photographs(("chelsea", "rocket")))
    ids = re.findall(r'name="caption\.(file-\w+)"', visitor.text(address))
    assert len(ids) == 4
    visitor.submit(address, address, {"remove": ids[0]})
    assert re.findall(r'name="caption\.(file-\w+)"', visitor.text(address)) == ids[1:]
    assert visitor.submit(address, address, {"preset": "no"}).status_code == 400
    assert _count(world) >= 0


def test_the_estimate_follows_measured_trainings_and_the_price(
    world: World, visitor: Visitor
) -> None:
    own = Visitor(world, world.new_key("org_estimate"))
    address = draft_of(own, photographs())
    assert "no time measured on this server yet" in own.text(address)
    job = world.order()
    world.worker().progress(job, 1_000_001)
    world.worker().complete(job, 1_000_002)

    def set_times(session: object) -> None:
        row = session.get_one(JobRow, job["id"])  # type: ignore[attr-defined]
        row.started_at, row.finished_at = 1000.0, 1000.0 + 36.0

    world.services.database.write(set_times)
    # 36 s for 10 epochs of one image, so 3.6 s a view: balanced are 500 epochs of 3 images.
    page = text_of(own.text(address))
    assert "Balanced: 500 passes, 1500 image views, about 1 h 30 min" in page
    assert "about 4.50 at the GPU's price" in page
    assert visitor.get("/jobs").status_code == 200


@pytest.mark.parametrize("text", ZOO)
def test_names_of_files_captions_and_prompts_stay_text(visitor: Visitor, text: str) -> None:
    name = text.replace("/", "⁄").replace('"', "%22")
    address = draft_of(visitor, [(name, photographs(("coffee",))[0][1], "image/png")])
    ids = re.findall(r'name="caption\.(file-\w+)"', visitor.text(address))
    fields = {"name": text, "trigger_word": text, "prompts": text, "tags": text, "model": text}
    visitor.submit(address, address, fields | {f"caption.{ids[0]}": text})
    for page in (address, "/styles/new"):
        _assert_harmless(visitor.text(page))


def test_a_form_with_files_is_refused_before_its_body_is_read(
    world: World, visitor: Visitor
) -> None:
    before = _files(world)
    parts = [("file", each) for each in photographs()]
    for query in ("", "?form_token=x"):
        assert visitor.client.post(f"/styles/new{query}", files=parts).status_code == 403
    token = visitor.token("/jobs")
    evil = {"origin": "https://evil.example"}
    answer = visitor.client.post(f"/styles/new?form_token={token}", files=parts, headers=evil)
    assert answer.status_code == 403
    assert visitor.client.post(f"/styles/new?form_token={token}", data={}).status_code == 415
    assert _files(world) == before


def _files(world: World) -> int:
    with world.services.database.reading() as session:
        return session.query(DraftRow).count()


def test_a_language_model_is_ordered_from_a_file_with_an_account_of_its_rows(
    world: World, visitor: Visitor
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"q{n}"},
                {"role": "assistant", "content": f"a{n}"},
            ]
        }
        for n in range(20)
    ]
    lines = [json.dumps(each) for each in [*rows, rows[0], {"odd": 1}]]
    content = "\n".join(lines).encode()
    answer = visitor.upload(
        "/language-models/new", "/language-models/new", [("chats.jsonl", content, "text/plain")]
    )
    assert answer.status_code == 303, answer.text
    address = answer.headers["location"]
    page = text_of(visitor.text(address))
    assert "Rows 22" in page and "is a duplicate of another row" in page
    assert "has no known form" in page
    fields = {"model": "owner/tiny", "preset": "balanced", "name": "helper"}
    answer = visitor.submit(address, f"{address}/start", fields)
    assert answer.status_code == 303, answer.text
    job = world.job(answer.headers["location"].rpartition("/")[2])
    assert job["kind"] == "llm" and job["parameters"] == {"epochs": 3.0}
    assert (
        visitor.submit("/jobs", f"{address}/start", fields).headers["location"].endswith(job["id"])
    )


def test_a_file_without_rows_is_named_as_such(visitor: Visitor) -> None:
    answer = visitor.upload(
        "/language-models/new", "/language-models/new", [("x.jsonl", b"   ", "text/plain")]
    )
    page = visitor.text(answer.headers["location"])
    assert "the file is empty" in page
    assert "/start" not in page


def test_the_style_sheet_and_the_script_are_small(world: World, visitor: Visitor) -> None:
    page = visitor.text("/jobs")
    script = re.search(r'<script src="([^"]+)"', page)
    assert script
    lines = httpx.get(world.url + script[1]).text.splitlines()
    assert len(lines) <= 300
