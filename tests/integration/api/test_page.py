"""The web page: sessions, forms, jobs, organisations, texts of strangers, headers, sizes."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

import httpx
import pytest
from sqlalchemy import update

from api.gate.administration import revoke_key
from api.page.catalogue import languages
from api.page.rendering import POLICY
from api.store.tables import JobRow, PageSessionRow
from jobs.addresses import S3Location
from jobs.layout import preview_at
from tests.integration.api.visitor import Visitor, elements, text_of
from tests.integration.api.world import Ground, World, running

MAX_PAGE_BYTES = 150_000
PAGES = ("/jobs", "/compare", "/models", "/organization", "/styles/new", "/sessions")
ZOO = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}",
    "</textarea><svg/onload=alert(1)>",
    "javascript:alert(1)",
    "&lt;b&gt;",
    "\u202eevil",
)


@pytest.fixture(name="world", scope="module")
def _world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("page")
    ground = Ground(
        f"sqlite:///{folder / 'api.db'}",
        request.getfixturevalue("s3_server"),
        request.getfixturevalue("rabbitmq"),
        folder,
    )
    limits = {"api_requests_per_minute": 10**6, "api_creates_per_minute": 10**6}
    with running(ground, **limits) as world:
        yield world


@pytest.fixture(name="visitor", scope="module")
def _visitor(world: World) -> Visitor:
    return Visitor(world, world.key)


# ---- sessions and forms --------------------------------------------------------------------------


def test_a_visitor_without_a_session_is_sent_to_the_login_and_back(world: World) -> None:
    outside = Visitor(world)
    answer = outside.get("/jobs?show=failed")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/login?next=/jobs%3Fshow%3Dfailed"
    page = outside.text("/login?next=/jobs%3Fshow%3Dfailed")
    assert 'name="next" value="/jobs?show=failed"' in page
    answer = outside.submit("/login", "/login", {"key": world.key, "next": "/jobs?show=failed"})
    assert answer.headers["location"] == "/jobs?show=failed"
    assert outside.get("/jobs").status_code == 200


@pytest.mark.parametrize("key", ["", "sk-wrong", "k\xe9y", "x" * 5000, "sk-\u0001"])
def test_a_wrong_key_begins_no_session(world: World, key: str) -> None:
    outside = Visitor(world)
    answer = outside.submit("/login", "/login", {"key": key})
    assert answer.status_code == 401
    assert "unknown, expired or revoked" in answer.text
    assert "training_session" not in outside.client.cookies


@pytest.mark.parametrize(
    "target",
    ["//evil.example", "https://evil.example", "/\\evil.example", "/%0d%0aSet-Cookie:a=b\r\n"]
    + ["javascript:alert(1)", "/jobs\nx", "\\\\evil.example", "/@evil.example/..//x:y@z"],
)
def test_the_login_leads_to_no_other_site(world: World, target: str) -> None:
    outside = Visitor(world)
    answer = outside.submit("/login", "/login", {"key": world.key, "next": target})
    assert answer.status_code == 303
    place = answer.headers["location"]
    assert httpx.URL(world.url).join(place).host == httpx.URL(world.url).host
    assert place.startswith("/") and not place.startswith("//")


def test_signing_in_makes_a_new_cookie_and_ends_the_session_of_the_old_one(world: World) -> None:
    planted = Visitor(world, world.key)
    old = planted.client.cookies["training_session"]
    assert planted.get("/login").status_code == 303  # signed in already
    answer = planted.client.post(
        "/login", data={"form_token": planted.token("/jobs"), "key": world.key}
    )
    assert answer.status_code == 303
    assert planted.client.cookies["training_session"] != old
    stolen = Visitor(world)
    stolen.client.cookies.set("training_session", old)
    assert stolen.get("/jobs").status_code == 303
    chosen = Visitor(world)
    chosen.client.cookies.set("training_session", "A" * 43)
    chosen.submit("/login", "/login", {"key": world.key})
    stranger = Visitor(world)
    stranger.client.cookies.set("training_session", "A" * 43)
    assert stranger.get("/jobs").status_code == 303


def test_the_cookie_is_out_of_reach_of_scripts_and_its_value_is_not_stored(world: World) -> None:
    outside = Visitor(world)
    answer = outside.submit("/login", "/login", {"key": world.key})
    header = next(
        each for each in answer.headers.get_list("set-cookie") if "training_session" in each
    )
    assert "HttpOnly" in header and "SameSite=lax" in header and "Path=/" in header
    cookie = outside.client.cookies["training_session"]
    with world.services.database.reading() as session:
        rows = session.query(PageSessionRow).all()
    assert rows and all(cookie not in row.id for row in rows)


def test_a_session_ends_with_its_key_by_signing_out_and_from_the_list(world: World) -> None:
    key = world.new_key("org_sessions", "train")
    key_id = _key_id(world, key)
    first, second = Visitor(world, key), Visitor(world, key)
    page = first.text("/sessions")
    ids = re.findall(r"/sessions/(sess_\w+)/end", page)
    assert len(ids) == 2
    assert first.submit("/sessions", "/logout", {}).status_code == 303
    assert first.get("/jobs").status_code == 303
    third = Visitor(world, key)
    for each in re.findall(r"/sessions/(sess_\w+)/end", third.text("/sessions")):
        third.submit("/jobs", f"/sessions/{each}/end", {})
        if third.get("/jobs").status_code == 303:
            break
    assert third.get("/jobs").status_code == 303
    fourth = Visitor(world, key)
    assert fourth.get("/jobs").status_code == 200
    assert revoke_key(world.services, key_id)
    assert fourth.get("/jobs").status_code == 303
    assert second.get("/jobs").status_code == 303


def _key_id(world: World, key: str) -> str:
    caller = world.services.keys.caller(key)
    assert caller is not None
    return caller.key_id


def test_a_session_of_another_organisation_cannot_be_ended(world: World, visitor: Visitor) -> None:
    stranger = Visitor(world, world.new_key("org_two", "admin"))
    own = re.findall(r"/sessions/(sess_\w+)/end", visitor.text("/sessions"))
    for each in own:
        stranger.submit("/jobs", f"/sessions/{each}/end", {})
    assert visitor.get("/jobs").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}]
    + [{"sec-fetch-site": "same-site"}],
)
def test_a_form_of_another_site_is_refused(
    world: World, visitor: Visitor, headers: dict[str, str]
) -> None:
    job = world.order()
    answer = visitor.client.post(
        f"/jobs/{job['id']}/cancel", data={"form_token": visitor.token("/jobs")}, headers=headers
    )
    assert answer.status_code == 403
    assert world.job(job["id"])["status"] == "queued"


def test_a_form_without_the_token_of_its_session_is_refused(world: World, visitor: Visitor) -> None:
    job = world.order()
    other = Visitor(world, world.key).token("/jobs")
    for token in ("", "x", other, "\xe9"):
        for path in (f"/jobs/{job['id']}/cancel", "/styles/new", "/organization/keys", "/logout"):
            answer = visitor.client.post(path, data={"form_token": token})
            assert answer.status_code == 403, (path, token)
    assert world.job(job["id"])["status"] == "queued"
    assert visitor.get("/jobs").status_code == 200


def test_the_login_form_of_another_visitor_is_refused(world: World) -> None:
    token = Visitor(world).token("/login")
    outside = Visitor(world)
    outside.get("/login")
    answer = outside.client.post("/login", data={"form_token": token, "key": world.key})
    assert answer.status_code == 403


# ---- jobs ----------------------------------------------------------------------------------------


def test_the_list_shows_state_place_and_what_to_do_about_a_failure(world: World) -> None:
    visitor = Visitor(world, world.new_key("org_list"))
    key = world.new_key("org_list")
    waiting = world.order(key, name="harbour")
    failed = world.order(key, name="broken")
    world.worker().failed(failed, 1_000_001)
    page = text_of(visitor.text("/jobs"))
    assert re.search(r"harbour waiting Place \d+ in the queue", page)
    assert "the GPU ran out of memory" in page
    assert "smaller batch, resolution or rank" in page
    assert "harbour" not in text_of(visitor.text("/jobs?show=failed"))
    assert "broken" not in text_of(visitor.text("/jobs?show=open"))
    assert world.job(waiting["id"], key)["queue_position"] >= 1


def test_pause_resume_and_cancel_are_buttons(world: World, visitor: Visitor) -> None:
    job = world.order(name="steered")
    for act, status in (("pause", "pausing"), ("resume", "queued"), ("cancel", "cancelled")):
        where = {"next": f"/jobs/{job['id']}"}
        answer = visitor.submit(f"/jobs/{job['id']}", f"/jobs/{job['id']}/{act}", where)
        assert answer.status_code == 303, answer.text
        assert answer.headers["location"] == f"/jobs/{job['id']}"
        found = world.job(job["id"])
        assert found["status"] in (status, "paused") or found["cancel_requested"], act
    ended = world.order()
    world.worker().complete(ended, 1_000_001)
    answer = visitor.submit("/jobs", f"/jobs/{ended['id']}/pause", {})
    assert answer.status_code == 409
    assert "has ended" in answer.text


def test_a_key_that_only_reads_gets_no_buttons_and_cannot_act(world: World) -> None:
    reader = Visitor(world, world.new_key("org_one", "read"))
    job = world.order()
    assert f"/jobs/{job['id']}/cancel" not in reader.text("/jobs")
    assert reader.submit("/sessions", f"/jobs/{job['id']}/cancel", {}).status_code == 403
    assert reader.get("/styles/new").status_code == 403
    assert reader.submit("/sessions", "/organization/keys", {"name": "x"}).status_code == 403
    assert "API keys" not in reader.text("/organization")


def test_a_job_shows_curve_events_parameters_and_files(world: World, visitor: Visitor) -> None:
    job = world.order(name="curved", parameters={"epochs": 10}, tags=["sea"])
    worker = world.worker()
    for step in range(1, 4):
        worker.progress(job, 1_000_000 + step, current_epoch=step, loss=0.5 / step)
    page = visitor.text(f"/jobs/{job['id']}")
    assert 'data-points="3"' in page
    assert "Loss from 0.5000 at step 1 to 0.1667 at step 3" in page
    assert "Step 2: loss=0.25" in page
    assert "About 1 min 30 s left." in text_of(page)
    worker.complete(job, 1_000_009)
    prefix = f"models/style_{job['subject']}/"
    models = world.settings.storage.model_bucket_name
    for name in ("lora_weights.safetensors", "training_report.html", "odd name?.bin"):
        world.services.s3.write(S3Location(models, prefix + name), b"content")
    page = visitor.text(f"/jobs/{job['id']}")
    assert "The style for diffusers." in page
    for link in re.findall(rf'href="(/jobs/{job["id"]}/files/[^"]+)"', page):
        answer = visitor.get(link)
        assert answer.status_code == 307
        assert httpx.get(answer.headers["location"]).content == b"content"
    assert len(re.findall(rf'href="/jobs/{job["id"]}/files/', page)) == 3


def test_samples_of_checkpoints_come_through_this_server_and_pairs_have_a_slider(
    world: World, visitor: Visitor
) -> None:
    job = world.order(name="sampled")
    world.worker().progress(job, 1_000_001, loss=0.3)
    bucket = world.settings.storage.state_bucket_name
    for claim, step, number in ((1, 0, 0), (1, 0, 1), (1, 50, 0), (2, 50, 0), (2, 50, 1)):
        place = preview_at(bucket, job["id"], claim, step, number)
        world.services.state_s3.write(place, b"RIFF-webp", "image/webp")
    page = visitor.text(f"/jobs/{job['id']}")
    assert page.count('type="range"') == 2
    images = set(re.findall(r'src="(/jobs/[^"]+/samples/[^"]+)"', page))
    assert images == {f"/jobs/{job['id']}/samples/{rest}" for rest in ("1/0/0", "1/0/1")} | {
        f"/jobs/{job['id']}/samples/2/50/0",
        f"/jobs/{job['id']}/samples/2/50/1",
    }
    answer = visitor.get(sorted(images)[0])
    assert answer.content == b"RIFF-webp"
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert visitor.get(f"/jobs/{job['id']}/samples/9/9/9").status_code == 404


def test_new_samples_and_no_repeated_ones_are_an_event(world: World) -> None:
    job = world.order()
    worker = world.worker()
    first, second = ["previews/x/1/50/0.webp"], ["previews/x/1/100/0.webp"]
    for number, samples in enumerate((first, first, second, second), 1):
        worker.progress(job, 1_000_000 + number, samples=samples)
    with world.client() as client:
        events = client.get(f"/v1/jobs/{job['id']}/events?limit=100").json()["data"]
    said = [each["message"] for each in events]
    assert said.count("Samples of a checkpoint are ready") == 2
    assert said.count("Job started") == 1


def test_the_stream_of_a_page_begins_where_the_page_ends(world: World, visitor: Visitor) -> None:
    job = world.order(name="streamed")
    worker = world.worker()
    worker.progress(job, 1_000_001, current_epoch=1, loss=0.5)
    page = visitor.text(f"/jobs/{job['id']}")
    address = re.search(r'data-live="([^"]+)"', page)
    assert address
    shown = set(re.findall(r'id="event-(\d+)"', page))
    worker.progress(job, 1_000_002, current_epoch=2, loss=0.4)
    worker.complete(job, 1_000_003)
    with visitor.client.stream(
        "GET", address[1], headers={"accept": "text/event-stream"}
    ) as answer:
        assert answer.headers["content-security-policy"] == POLICY
        sent = re.findall(r"^id: (\d+)$", "".join(answer.iter_text()), re.MULTILINE)
    assert len(sent) == len(set(sent)) >= 2
    assert not shown & set(sent)
    later = set(re.findall(r'id="event-(\d+)"', visitor.text(f"/jobs/{job['id']}")))
    assert later == shown | set(sent)


# ---- organisations -------------------------------------------------------------------------------


def test_a_key_of_another_organisation_sees_nothing(world: World, visitor: Visitor) -> None:
    job = world.order(name="secret harbour")
    world.worker().complete(job, 1_000_001)
    model = world.job(job["id"])["fine_tuned_model"]
    stranger = Visitor(world, world.new_key("org_two", "admin"))
    for page in PAGES:
        source = stranger.text(page)
        assert "secret harbour" not in source and job["id"] not in source, page
        assert model not in source
    for path in (
        f"/jobs/{job['id']}",
        f"/jobs/{job['id']}/live",
        f"/jobs/{job['id']}/files/lora_weights.safetensors",
        f"/jobs/{job['id']}/samples/1/0/0",
        f"/compare?id={job['id']}&id={world.order()['id']}",
    ):
        assert stranger.get(path).status_code == 404, path
    for act in ("cancel", "pause", "resume"):
        assert stranger.submit("/jobs", f"/jobs/{job['id']}/{act}", {}).status_code == 404
    assert stranger.submit("/models", "/models/delete", {"model": model}).status_code == 404
    assert visitor.get(f"/jobs/{job['id']}").status_code == 200


def test_every_page_needs_a_session(world: World) -> None:
    outside = Visitor(world)
    job = world.order()
    for page in (*PAGES, f"/jobs/{job['id']}", "/language-models/new", "/live"):
        answer = outside.get(page)
        assert answer.status_code == 303 and answer.headers["location"].startswith("/login"), page
    answer = outside.client.get("/live", headers={"accept": "text/event-stream"})
    assert answer.status_code == 401


def test_compare_shows_the_numbers_of_the_database_and_parameters_that_differ(
    world: World, visitor: Visitor
) -> None:
    made = []
    for epochs, loss in ((10, 0.1234567890123), (20, 0.0987654321)):
        job = world.order(name=f"run {epochs}", parameters={"epochs": epochs, "rank": 8})
        world.worker().progress(job, 1_000_001, loss=loss)
        made.append(job["id"])
    page = visitor.text("/compare?" + "&".join(f"id={each}" for each in made))
    with world.services.database.reading() as session:
        losses = [session.get_one(JobRow, each).loss for each in made]
    assert [float(each) for each in re.findall(r'<data value="([^"]+)">', page)][:2] == losses
    assert "epochs (differs)" in text_of(page)
    assert "rank (differs)" not in text_of(page)
    assert page.count('class="line c') == 2
    assert visitor.get(f"/compare?id={made[0]}").status_code == 200
    assert "at least 2" in visitor.text(f"/compare?id={made[0]}")


def test_keys_are_made_shown_once_and_revoked(world: World) -> None:
    admin = Visitor(world, world.new_key("org_keys"))
    answer = admin.submit(
        "/organization", "/organization/keys", {"name": "robot", "scopes": ["read", "train"]}
    )
    made = re.search(r'id="new-key">(sk-[\w-]+)<', answer.text)
    assert made
    assert world.get("/v1/files", made[1]).status_code == 200
    page = admin.text("/organization")
    assert made[1] not in page and "robot" in page
    admin.submit("/organization", f"/organization/keys/{_key_id(world, made[1])}/revoke", {})
    assert world.get("/v1/files", made[1]).status_code == 401
    answer = admin.submit("/organization", "/organization/limits", {"storage_bytes": "1000000"})
    assert answer.status_code == 303
    assert 'value="1000000"' in admin.text("/organization")
    answer = admin.submit("/organization", "/organization/limits", {"storage_bytes": "9" * 30})
    assert answer.status_code == 400


# ---- texts of strangers, headers, languages ------------------------------------------------------


@pytest.mark.parametrize("text", ZOO)
def test_a_text_of_a_stranger_stays_text(world: World, visitor: Visitor, text: str) -> None:
    job = world.order(name=text, tags=[text], metadata={"note": text})
    world.worker().progress(job, 1_000_001, stage=text, loss=0.3)

    def set_error(session: object) -> None:
        values = {"error_code": "GPU_OOM", "error_message": text, "status": "failed"}
        session.execute(update(JobRow).where(JobRow.id == job["id"]).values(**values))  # type: ignore[attr-defined]

    world.services.database.write(set_error)
    second = world.order(name=text)
    for page in ("/jobs", f"/jobs/{job['id']}", f"/compare?id={job['id']}&id={second['id']}"):
        source = visitor.text(page)
        _assert_harmless(source)
        assert "49" not in re.findall(r"<h1>(.*?)</h1>", source)
        assert "\u202e" not in source


def _assert_harmless(source: str) -> None:
    """No inline script or style, and no address of another site."""
    for tag, attributes in elements(source):
        assert tag not in ("style", "iframe", "object", "embed", "base")
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        if tag == "script":
            assert attributes["src"].startswith("/page-assets/")
        for name in ("src", "href", "action", "formaction"):
            address = attributes.get(name, "/")
            assert address.startswith(("/", "?", "#")) and not address.startswith("//"), address


def test_every_page_is_confined_small_and_without_inline_scripts(
    world: World, visitor: Visitor
) -> None:
    job = world.order()
    addresses = set()
    for page in (*PAGES, f"/jobs/{job['id']}", "/jobs/none", "/login"):
        answer = visitor.client.get(page, follow_redirects=True)
        headers = answer.headers
        assert headers["content-security-policy"] == POLICY
        assert "unsafe" not in POLICY and "http" not in POLICY
        assert headers["cache-control"] == "no-store"
        assert headers["x-frame-options"] == "DENY"
        assert len(answer.content) < MAX_PAGE_BYTES
        _assert_harmless(answer.text)
        addresses |= set(re.findall(r'(?:src|href)="([^"#]+)', answer.text))
    for each in addresses:
        if each.startswith("/page-assets/"):
            answer = httpx.get(world.url + each)
            assert answer.status_code == 200
            assert "immutable" in answer.headers["cache-control"]
            assert len(answer.content) < MAX_PAGE_BYTES


def test_every_language_has_every_text_with_the_same_placeholders(
    world: World, visitor: Visitor
) -> None:
    known = languages()
    first = known["en"].texts
    for tag, each in known.items():
        assert set(each.texts) == set(first), tag
        for key, text in each.texts.items():
            assert sorted(set(re.findall(r"{\w+}", text))) == sorted(
                set(re.findall(r"{\w+}", first[key]))
            ), (tag, key)
    korean = Visitor(world, world.key, language="ko-KR,ko;q=0.9")
    page = korean.text("/jobs")
    assert '<html lang="ko">' in page and "작업" in page and "검수되지" in page
    assert '<html lang="en">' in korean.text("/jobs?lang=en")
    assert '<html lang="en">' in korean.text("/jobs")
    assert '<html lang="en">' in visitor.text("/jobs")
    link = re.search(r'href="([^"]*lang=ko)"', visitor.text("/jobs?show=failed"))
    assert link and html.unescape(link[1]) == "/jobs?show=failed&lang=ko"


def test_the_page_in_open_mode_needs_no_key_and_has_a_notice_of_it(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("open")
    ground = Ground(
        f"sqlite:///{folder / 'api.db'}", request.getfixturevalue("s3_server"), None, folder
    )
    with running(ground, api_open=True) as world:
        outside = Visitor(world)
        assert "Open mode" in outside.text("/jobs")
        answer = outside.submit(
            "/organization", "/organization/keys", {"name": "x", "scopes": "read"}
        )
        assert answer.status_code == 200
        assert outside.client.post("/organization/keys", data={"name": "x"}).status_code == 403
