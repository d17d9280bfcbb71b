"""The page in Chromium: an order from files to download, live news, widths, names, contrast."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.addresses import S3Location
from jobs.layout import preview_at
from tests.browser.chromium import Browser, browser
from tests.integration.api.test_page_orders import photographs
from tests.integration.api.world import Ground, World, free_port, serving, settings_on

pytestmark = pytest.mark.browser
WEBP = bytes.fromhex("524946461a000000574542505650384c0d0000002f00000010071011118888fe0700")
"""A green dot."""
WIDTHS = (390, 768, 1440)

CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


@pytest.fixture(name="settings", scope="module")
def _settings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("browser")
    ground = Ground(
        f"sqlite:///{folder / 'api.db'}",
        request.getfixturevalue("s3_server"),
        request.getfixturevalue("rabbitmq"),
        folder,
    )
    limits = {"api_requests_per_minute": 10**6, "api_creates_per_minute": 10**6}
    return settings_on(ground, free_port(), **limits)


@pytest.fixture(name="tab")
def _tab(tmp_path: Path) -> Iterator[Browser]:
    with browser(tmp_path) as opened:
        yield opened


def sign_in(tab: Browser, world: World) -> None:
    """Sign in by the form."""
    tab.open(f"{world.url}/login")
    tab.run(f"document.getElementById('key').value = '{world.key}'")
    tab.run("document.querySelector('main form').requestSubmit()")
    tab.until("location.pathname === '/jobs'")


@pytest.mark.timeout(300)
def test_a_style_is_ordered_followed_through_a_restart_and_downloaded(
    settings: Any, tab: Browser, tmp_path: Path
) -> None:
    files = []
    for name, content, _ in photographs():
        files.append(tmp_path / name)
        files[-1].write_bytes(content)
    with serving(settings) as world:
        sign_in(tab, world)
        tab.open(f"{world.url}/styles/new")
        tab.choose_files("input[type=file]", files)
        tab.until("location.pathname.startsWith('/styles/draft_')")
        tab.until("document.querySelectorAll('.card.used, .card.warned').length === 3")
        tab.run("document.querySelector('[name=name]').value = 'harbour'")
        tab.run("document.querySelector('[formaction]').click()")
        tab.until("location.pathname.startsWith('/jobs/ftjob-')")
        tab.until("document.body.innerText.includes('in the queue')")
        job = world.job(str(tab.run("location.pathname.split('/').pop()")))
        worker = world.worker()
        worker.progress(job, 1_000_001, current_epoch=1, loss=0.5)
        assert tab.until("document.querySelector('#curve svg')", 10) < 2
        _put_samples(world, job, 0)
        _put_samples(world, job, 50)
        worker.progress(job, 1_000_002, current_epoch=2, loss=0.4)
        tab.until("document.querySelectorAll('.compare img').length === 2")
        tab.run("document.querySelector('.compare').scrollIntoView()")
        tab.until("[...document.querySelectorAll('.compare img')].every((one) => one.naturalWidth)")
    tab.until("!document.getElementById('connection').hidden")
    with serving(settings) as world:
        worker = world.worker()
        worker.progress(job, 1_000_003, current_epoch=3, loss=0.3)
        tab.until("document.getElementById('curve').dataset.points !== undefined")
        tab.until(
            "document.querySelector('#curve svg').getAttribute('aria-label').includes('0.3000')"
        )
        tab.until("document.getElementById('connection').hidden")
        models = world.settings.storage.model_bucket_name
        place = S3Location(models, f"models/style_{job['subject']}/lora_weights.safetensors")
        world.services.s3.write(place, b"weights")
        worker.complete(job, 1_000_004)
        tab.until("document.querySelector('#files a')")
        shown = tab.run("[...document.querySelectorAll('#events tr[id]')].map((row) => row.id)")
        assert len(shown) == len(set(shown))
        with world.client() as client:
            events = client.get(f"/v1/jobs/{job['id']}/events?limit=100").json()["data"]
        assert [f"event-{each['id']}" for each in events] == shown
    assert all(each.startswith((world.url, "about:", "data:")) for each in tab.requests)
    assert not tab.problems


def _put_samples(world: World, job: dict[str, Any], step: int) -> None:
    place = preview_at(world.settings.storage.state_bucket_name, job["id"], 1, step, 0)
    world.services.state_s3.write(place, WEBP, "image/webp")


@pytest.mark.timeout(300)
def test_every_page_fits_has_names_and_contrast_in_both_schemes(
    settings: Any, tab: Browser
) -> None:
    with serving(settings) as world:
        sign_in(tab, world)
        jobs = [world.order(name=name) for name in ("harbour " * 20, "x" * 180)]
        worker = world.worker()
        for step in range(1, 5):
            worker.progress(jobs[0], 1_000_000 + step, current_epoch=step, loss=1 / step)
        worker.failed(jobs[1], 1_000_001)
        compared = "&".join(f"id={job['id']}" for job in jobs)
        pages = ["/jobs", f"/jobs/{jobs[0]['id']}", f"/compare?{compared}", "/models"]
        pages += ["/organization", "/styles/new", "/language-models/new", "/sessions", "/jobs/none"]
        for page in pages:
            tab.open(world.url + page)
            for width in WIDTHS:
                tab.resize(width)
                needed = tab.run("document.documentElement.scrollWidth")
                assert needed <= width, (page, width, needed)
            for scheme in ("light", "dark"):
                tab.resize(1280, scheme=scheme)
                assert tab.run(CONTRAST) == [], (page, scheme)
            controls = ("button", "textbox", "link", "image", "checkbox", "slider", "radio")
            unnamed = [role for role, name in tab.names() if role in controls and not name.strip()]
            assert not unnamed, (page, unnamed)
            assert tab.run("document.querySelectorAll('h1').length") == 1, page
            assert tab.run("document.documentElement.lang"), page
            ids = tab.run("[...document.querySelectorAll('[id]')].map((each) => each.id)")
            assert len(ids) == len(set(ids)), page
        assert not tab.problems


@pytest.mark.timeout(300)
def test_two_people_watch_twenty_jobs_without_a_stall(
    settings: Any, tab: Browser, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    with serving(settings) as world, browser(tmp_path / "second") as other:
        jobs = [world.order(name=f"job {number}") for number in range(20)]
        for each in (tab, other):
            sign_in(each, world)
            each.run(
                "window.stalls = []; new PerformanceObserver((list) => "
                "window.stalls.push(...list.getEntries().map((one) => one.duration)))"
                ".observe({entryTypes: ['longtask']})"
            )
        worker, waited = world.worker(), []
        for round_ in range(1, 4):
            for job in jobs:
                values = {"progress_percent": 10 * round_, "current_epoch": round_, "loss": 0.5}
                worker.progress(job, 1_000_000 + round_, **values)
            sent = time.monotonic()
            for each in (tab, other):
                each.until(
                    f"[...document.querySelectorAll('progress')].filter((one) => "
                    f"one.value === {10 * round_}).length >= 20"
                )
                waited.append(time.monotonic() - sent)
        assert max(waited) < 3, waited
        assert max([*tab.run("window.stalls"), *other.run("window.stalls"), 0]) < 500


def test_the_keyboard_reaches_every_act_in_order(settings: Any, tab: Browser) -> None:
    with serving(settings) as world:
        sign_in(tab, world)
        world.order(name="reached")
        tab.open(f"{world.url}/jobs")
        reached = []
        for _ in range(40):
            for kind in ("keyDown", "keyUp"):
                tab.call("Input.dispatchKeyEvent", type=kind, key="Tab", windowsVirtualKeyCode=9)
            reached.append(tab.run("document.activeElement.innerText"))
        assert reached[0] == "Skip to the content"
        for name in ("Jobs", "Sign out", "reached", "Pause", "Cancel"):
            assert name in reached, reached
