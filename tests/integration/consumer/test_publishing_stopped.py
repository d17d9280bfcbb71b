"""A publication that is stopped between two requests to a real S3 server leaves one run's folder.

The fast tests in `tests/unit/consumer/test_publishing.py` cover many more cases.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from consumer.life.stop_signal import StopSignal
from consumer.publishing import model_folder
from jobs.addresses import S3Location
from jobs.layout import WEIGHTS
from sandbox.s3_server import S3Server
from services.s3.s3_service import S3Service
from tests.integration.services.record_world import access
from tests.integration.services.s3_proxy import S3Proxy, refusal
from tests.publishing import (
    EARLY,
    FILES,
    LATE,
    OLD_FILES,
    PLACE,
    STYLE,
    Killed,
    Stops,
    World,
    content,
    killed_at,
    whole,
)
from utils.errors import AccessDenied, Cancelled, StopReason, StorageError

OLD = whole("old", OLD_FILES)
NEW = whole("new")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "_PAUSES", (0.0, 0.0))


@pytest.fixture(name="world")
def _world(s3: S3Service, bucket: str, tmp_path: Path) -> World:
    return World(s3, bucket, bucket, tmp_path)


class Disturbed(S3Service):
    """A worker's S3.

    Attributes:
        stops: Act ahead of every HTTP request.
    """

    def __init__(self, server: S3Server) -> None:
        super().__init__(**access(server.endpoint), attempts=1)
        self.stops = Stops()
        self._client.meta.events.register("before-send.s3", self._before)

    def _before(self, request: Any, **_: Any) -> None:
        bucket, _slash, key = request.url.partition("//")[2].partition("/")[2].partition("/")
        self.stops.before(request.method, bucket, key.partition("?")[0])


def worlds(
    server: S3Server, s3: Disturbed, scratch: Path, name: str, stride: int = 1
) -> Iterator[tuple[World, int]]:
    """A style with an older model for each `stride`th request of a publication, and its number."""
    undisturbed = S3Service(**access(server.endpoint))

    def fresh(number: int) -> World:
        world = World(undisturbed, f"{name}-{number}", f"{name}-{number}", scratch)
        server.create_bucket(world.models)
        world.has_model_of("old")
        return world

    s3.stops = Stops()
    world = fresh(0)
    with world.claim("new") as lease:
        world.publish("new", lease, s3)
    assert s3.stops.count > 25
    for number in range(1, s3.stops.count + 1, stride):
        yield fresh(number), number


def test_after_a_kill_the_next_claim_finds_or_completes_the_folder(
    s3_server: S3Server, tmp_path: Path
) -> None:
    repairs = 0
    s3 = Disturbed(s3_server)
    for world, number in worlds(s3_server, s3, tmp_path, "killed"):
        s3.stops = killed_at(number)
        with pytest.raises(Killed), world.claim("new") as lease:
            world.publish("new", lease, s3)
        mixed = world.folder() not in (OLD, NEW)
        world.let_the_turn_run_out()
        with world.claim("new") as lease:
            assert world.publisher(world.s3).repair(PLACE, "new", lease) or not mixed
        repairs += mixed
        assert world.folder() in (OLD, NEW), f"request {number}"
        assert not world.has_note()
    assert repairs >= 3


def test_after_a_kill_another_run_publishes_completely_and_archives_the_last_complete_model(
    s3_server: S3Server, tmp_path: Path
) -> None:
    s3 = Disturbed(s3_server)
    for world, number in worlds(s3_server, s3, tmp_path, "followed", stride=3):
        s3.stops = killed_at(number)
        with pytest.raises(Killed), world.claim("new") as lease:
            world.publish("new", lease, s3)
        last = NEW if world.folder() == NEW and not world.has_note() else OLD
        world.let_the_turn_run_out()
        with world.claim("other") as lease:
            world.publish("other", lease)
        assert world.folder() == whole("other"), f"request {number}"
        assert world.archive("new" if last is NEW else "old") == last, f"request {number}"
        assert not world.has_note()


def test_a_cancel_leaves_the_folder_unchanged_or_comes_too_late(
    s3_server: S3Server, tmp_path: Path
) -> None:
    ends = set()
    s3 = Disturbed(s3_server)
    for world, number in worlds(s3_server, s3, tmp_path, "cancelled", stride=3):
        stop = StopSignal()
        s3.stops = Stops(number, functools.partial(stop.request, StopReason.CANCELLED))
        with world.claim("new") as lease:
            try:
                world.publish("new", lease, s3, stop=stop)
                ends.add("finished")
                assert world.folder() == NEW, f"request {number}"
            except Cancelled:
                ends.add("cancelled")
                assert world.folder() == OLD, f"request {number}"
        assert not world.has_note()
    assert ends == {"finished", "cancelled"}


@pytest.mark.parametrize("refused", [WEIGHTS, "samples.png"])
def test_if_s3_refuses_a_file_for_good_the_folder_is_rolled_back_at_once(
    s3_server: S3Server, world: World, refused: str
) -> None:
    world.has_model_of("old")
    with S3Proxy(s3_server.endpoint) as proxy:
        faults = [refusal(403, "AccessDenied")]
        proxy.fault = lambda method, path: (
            faults.pop()
            if faults and method == "PUT" and path.endswith(f"/models/style_{STYLE}/{refused}")
            else None
        )
        s3 = S3Service(**access(proxy.endpoint), attempts=1)
        with world.claim("new") as lease, pytest.raises(AccessDenied):
            world.publish("new", lease, s3)
    assert not faults
    assert world.folder() == OLD
    assert not world.has_note()


def test_a_suspended_publisher_does_not_copy_newer_files_over_older_ones_in_the_archive(
    s3_server: S3Server, world: World
) -> None:
    world.has_model_of("old")

    def overtaken() -> None:
        world.let_the_turn_run_out()
        with world.claim("other") as lease:
            world.publish("other", lease)

    copies = f"archive/style_{STYLE}/old/{WEIGHTS}"
    s3 = Disturbed(s3_server)
    s3.stops = Stops(1, overtaken, only=lambda method, _b, key: (method, key) == ("PUT", copies))
    with world.claim("slept") as lease, pytest.raises(StorageError):
        world.publish("slept", lease, s3)
    assert s3.stops.count == 1
    assert world.folder() == whole("other")
    assert world.archive("old") == OLD


def test_the_model_of_the_later_order_stays_and_the_other_is_archived(world: World) -> None:
    world.has_model_of("old", ordered_at=LATE)
    with world.claim("new") as lease:
        published = world.publish("new", lease, ordered_at=EARLY)
    assert published.superseded_by == "old"
    assert published.archived_url == f"s3://{world.state}/archive/style_{STYLE}/new/{WEIGHTS}"
    assert world.folder() == OLD and world.archive("new") == NEW


def test_a_finished_publication_leaves_a_turn_that_the_last_release_can_read(world: World) -> None:
    with world.claim("new") as lease:
        world.publish("new", lease)
        world.publisher(world.s3).confirm(PLACE, "new", lease)
    turn = json.loads(world.s3.read(S3Location(world.state, f"jobs/style_{STYLE}.turn")).body)
    assert set(turn) == {"hold", "version", "task_id"}


def test_between_two_endpoints_files_stream_to_the_archive_and_back(
    s3: S3Service, bucket: str, tmp_path: Path
) -> None:
    with S3Server() as elsewhere, S3Proxy(elsewhere.endpoint) as proxy:
        elsewhere.create_bucket("models")
        undisturbed = World(S3Service(**access(elsewhere.endpoint)), "models", bucket, tmp_path)
        undisturbed.has_model_of("old")
        here = World(s3, bucket, bucket, tmp_path)
        models = S3Service(**access(proxy.endpoint), attempts=1)
        faults = [refusal(403, "AccessDenied")]
        proxy.fault = lambda method, path: (
            faults.pop() if faults and method == "PUT" and path.endswith(WEIGHTS) else None
        )
        publisher = undisturbed.publisher(models, s3)
        for name in FILES:
            (tmp_path / name).write_text(content(name, "new"))

        def publish() -> None:
            with here.claim("new") as lease:
                publisher.publish(tmp_path, FILES, PLACE, lease, StopSignal(), ordered_at=LATE)

        with pytest.raises(AccessDenied):
            publish()
        assert undisturbed.folder() == OLD and here.archive("old") == OLD
        publish()
        assert undisturbed.folder() == NEW and not here.has_note()
