"""Publishing, stopped between every two requests: the style's folder is always of one run."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from consumer.life.stop_signal import StopSignal
from consumer.publishing import model_folder
from jobs.addresses import S3Location
from jobs.layout import WEIGHTS
from tests.memory_s3 import MemoryS3
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
from utils.errors import AccessDenied, Cancelled, LeaseLost, StopReason, StorageError

OLD = whole("old", OLD_FILES)
NEW = whole("new")
MODELS, STATE = "models-bucket", "state-bucket"


@pytest.fixture(name="world")
def _world(tmp_path: Path) -> World:
    return World(MemoryS3(), MODELS, STATE, tmp_path)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folder, "_PAUSES", (0.0, 0.0, 0.0))


def worker_of(world: World, stops: Stops) -> MemoryS3:
    """A worker's S3, in which the stops act."""
    assert isinstance(world.s3, MemoryS3)
    s3 = MemoryS3(world.s3.objects)
    s3.before = stops.before
    return s3


def every_request(make: Callable[[Path], World], tmp_path: Path) -> Iterator[tuple[World, int]]:
    """A fresh world for each request of a publication, with its number."""
    counting = Stops()
    world = make(tmp_path)
    with world.claim("new") as lease:
        world.publish("new", lease, worker_of(world, counting))
    assert counting.count > 15
    for number in range(1, counting.count + 1):
        yield make(tmp_path), number


def trained_before(tmp_path: Path) -> World:
    world = World(MemoryS3(), MODELS, STATE, tmp_path)
    world.has_model_of("old")
    return world


def never_trained(tmp_path: Path) -> World:
    return World(MemoryS3(), MODELS, STATE, tmp_path)


MAKERS = pytest.mark.parametrize("make", [trained_before, never_trained])


@MAKERS
def test_whenever_the_worker_dies_its_successor_finds_or_completes_the_folder(
    tmp_path: Path, make: Callable[[Path], World]
) -> None:
    before = make(tmp_path).folder()
    ends = set()
    for world, number in every_request(make, tmp_path):
        s3 = worker_of(world, killed_at(number))
        with pytest.raises(Killed), world.claim("new") as lease:
            world.publish("new", lease, s3)
        mixed = world.folder() not in (before, NEW)
        assert world.has_note() or not mixed, f"request {number}"
        world.let_the_turn_run_out()
        with world.claim("new") as lease:
            repaired = world.publisher(world.s3).repair(PLACE, "new", lease)
            assert repaired or not mixed
            assert not world.publisher(world.s3).repair(PLACE, "new", lease)
        assert world.folder() == before, f"request {number}: the job has not ended yet"
        assert not world.has_note() and not world.waits_for_its_ending()
        ends.add((mixed, world.folder() == before))
    assert ends == {(True, True), (False, True)}


@MAKERS
def test_whenever_the_worker_dies_another_run_publishes_completely_and_archives_the_last_model(
    tmp_path: Path, make: Callable[[Path], World]
) -> None:
    before = make(tmp_path).folder()
    for world, number in every_request(make, tmp_path):
        s3 = worker_of(world, killed_at(number))
        with pytest.raises(Killed), world.claim("new") as lease:
            world.publish("new", lease, s3)
        complete = not world.has_note() and world.folder() == NEW
        world.let_the_turn_run_out()
        with world.claim("other") as lease:
            world.publish("other", lease)
        assert world.folder() == whole("other"), f"request {number}"
        assert not world.has_note()
        last = (NEW, "new") if complete else (before, "old")
        assert world.archive(last[1]) == last[0], f"request {number}"


@pytest.mark.parametrize("reason", [StopReason.CANCELLED, StopReason.SHUTDOWN])
@MAKERS
def test_a_stop_leaves_the_folder_unchanged_or_comes_too_late(
    tmp_path: Path, make: Callable[[Path], World], reason: StopReason
) -> None:
    before = make(tmp_path).folder()
    stopped = finished = 0
    for world, number in every_request(make, tmp_path):
        stop = StopSignal()
        s3 = worker_of(world, Stops(number, functools.partial(stop.request, reason)))
        with world.claim("new") as lease:
            try:
                world.publish("new", lease, s3, stop=stop)
                finished += 1
                assert world.folder() == NEW, f"request {number}"
            except stop_error(reason):
                stopped += 1
                assert world.folder() == before, f"request {number}"
        assert not world.has_note()
    assert stopped > 5 and finished > 5


def stop_error(reason: StopReason) -> type[Exception]:
    stop = StopSignal()
    stop.request(reason)
    return type(stop.error())  # type: ignore[return-value]


@MAKERS
def test_a_lost_lease_stops_a_publication_and_the_next_claim_rolls_it_back(
    tmp_path: Path, make: Callable[[Path], World]
) -> None:
    before = make(tmp_path).folder()
    for world, number in every_request(make, tmp_path):
        with world.claim("new") as lease:
            stops = Stops(number, lease.lost.set)
            try:
                world.publish("new", lease, worker_of(world, stops))
                assert world.folder() == NEW
                continue
            except LeaseLost:
                pass
        with world.claim("new") as lease:
            world.publisher(world.s3).repair(PLACE, "new", lease)
        assert world.folder() in (before, NEW), f"request {number}"
        assert not world.has_note()


def test_after_the_lease_is_lost_no_further_file_is_begun(tmp_path: Path) -> None:
    for world, number in every_request(trained_before, tmp_path):
        after: list[str] = []
        with world.claim("new") as lease:
            stops = Stops(number, lease.lost.set)
            s3 = worker_of(world, stops)

            s3.before = functools.partial(_note_after, stops, after)
            with contextlib.suppress(LeaseLost):
                world.publish("new", lease, s3)
        assert f"PUT {place(WEIGHTS)}" not in after, f"request {number}"


def _note_after(stops: Stops, after: list[str], method: str, bucket: str, key: str) -> None:
    if stops.at <= stops.count:
        after.append(f"{method} {key}")
    stops.before(method, bucket, key)


def test_a_publisher_that_is_suspended_at_any_request_changes_nothing_of_a_later_run(
    tmp_path: Path,
) -> None:
    """Its clock may have stopped as well, so that it considers its lease valid."""
    for world, number in every_request(trained_before, tmp_path):

        def overtaken(world: World = world) -> None:
            world.let_the_turn_run_out()
            with world.claim("other") as lease:
                world.publish("other", lease)

        s3 = worker_of(world, Stops(number, overtaken))
        finished = False
        with world.claim("slept") as lease, contextlib.suppress(StorageError):
            world.publish("slept", lease, s3)
            finished = True
        contents = {name: text for name, (text, _) in world.folder().items()}
        runs = ("other", "slept") if finished else ("other",)
        wholes = [{name: content(name, run) for name in FILES} for run in runs]
        assert contents in wholes, f"request {number}"
        if not finished:
            assert world.archive("old") == OLD


def test_a_repair_that_is_suspended_at_any_request_changes_nothing_of_a_later_run(
    tmp_path: Path,
) -> None:
    """Except for a name that the later run does not use.

    See docs/operations.md, What is not promised.
    """
    for number in itertools.count(1):
        world = never_trained(tmp_path)
        world.has_model_of("old", files=FILES)
        with pytest.raises(Killed), world.claim("new") as lease:
            world.publish("new", lease, worker_of(world, killed_at(1, writes(place(WEIGHTS)))))
        world.let_the_turn_run_out()

        def overtaken(world: World = world) -> None:
            world.let_the_turn_run_out()
            with world.claim("other") as lease:
                world.publish("other", lease)

        stops = Stops(number, overtaken)
        with world.claim("new") as lease, contextlib.suppress(StorageError):
            world.publisher(worker_of(world, stops)).repair(PLACE, "new", lease)
        if stops.count < number:
            assert number > 10
            return
        contents = {name: text for name, (text, _) in world.folder().items()}
        assert contents == {name: content(name, "other") for name in FILES}, f"request {number}"
        assert world.archive("old") == whole("old")


def test_after_a_dead_publisher_a_failing_one_brings_back_the_last_complete_model(
    world: World,
) -> None:
    world.has_model_of("old")
    with pytest.raises(Killed), world.claim("new") as lease:
        world.publish("new", lease, worker_of(world, killed_at(1, writes(place(WEIGHTS)))))
    assert world.folder() != OLD
    world.let_the_turn_run_out()

    def refuse() -> None:
        raise AccessDenied("no")

    with world.claim("other") as lease, pytest.raises(AccessDenied):
        stops = Stops(1, refuse, only=writes(place(WEIGHTS)))
        world.publish("other", lease, worker_of(world, stops))
    assert world.folder() == OLD and not world.has_note()


def test_after_a_dead_publisher_a_model_of_a_later_order_still_stays(world: World) -> None:
    world.has_model_of("old", ordered_at=EARLY)
    with pytest.raises(Killed), world.claim("new") as lease:
        world.publish("new", lease, worker_of(world, killed_at(1, writes(place(WEIGHTS)))))
    world.let_the_turn_run_out()
    with world.claim("other") as lease:
        published = world.publish("other", lease, ordered_at="2025-01-19T00:00:00Z")
    assert published.superseded_by == "old"
    assert world.folder() == OLD and world.archive("other") == whole("other")


@MAKERS
def test_if_the_models_cannot_be_written_the_folder_is_rolled_back_at_once_or_repaired_later(
    tmp_path: Path, make: Callable[[Path], World]
) -> None:
    before = make(tmp_path).folder()
    counting = Stops(only=of_models)
    world = make(tmp_path)
    with world.claim("new") as lease:
        world.publish("new", lease, worker_of(world, counting))
    for number in range(1, counting.count + 1):
        world = make(tmp_path)
        stops = Stops(number, away, forever=True, only=of_models)
        with world.claim("new") as lease:
            with pytest.raises(StorageError):
                world.publish("new", lease, worker_of(world, stops))
            assert world.has_note() or world.folder() == before
            world.publisher(world.s3).repair(PLACE, "new", lease)
        assert world.folder() == before, f"request {number}"
        assert not world.has_note()


def of_models(_method: str, bucket: str, _key: str) -> bool:
    return bucket == MODELS


def away() -> None:
    raise StorageError("S3 is away")


@MAKERS
@pytest.mark.parametrize("refused", FILES)
def test_if_one_file_is_refused_for_good_the_folder_is_as_before_when_the_job_fails(
    tmp_path: Path, make: Callable[[Path], World], refused: str
) -> None:
    world = make(tmp_path)
    before = world.folder()

    def refuse() -> None:
        raise AccessDenied("no")

    first = Stops(1, refuse, only=lambda method, _b, key: method == "PUT" and key == place(refused))
    with world.claim("new") as lease, pytest.raises(AccessDenied):
        world.publish("new", lease, worker_of(world, first))
    assert world.folder() == before and not world.has_note()


def place(name: str) -> str:
    return f"models/style_{STYLE}/{name}"


def test_passing_trouble_does_not_fail_a_publication(world: World) -> None:
    world.has_model_of("old")
    for number in itertools.count(1):
        stops = Stops(number, away, only=of_models)
        with world.claim("new") as lease:
            try:
                world.publish("new", lease, worker_of(world, stops))
            except StorageError:
                assert world.folder() == OLD  # before the first file: the job is tried again
        if world.folder() == NEW:
            return


def test_repair_costs_one_read_if_there_is_nothing_to_do(world: World) -> None:
    with world.claim("new") as lease:
        world.publish("new", lease)
        world.publisher(world.s3).confirm(PLACE, "new", lease)
        counting = Stops()
        publisher = world.publisher(worker_of(world, counting))
        assert not publisher.repair(PLACE, "new", lease)
        assert counting.count == 1


def test_the_note_of_a_live_publisher_is_not_touched(world: World) -> None:
    world.has_model_of("old")
    s3 = worker_of(world, killed_at(1, writes(place(WEIGHTS))))
    with pytest.raises(Killed), world.claim("new") as lease:
        world.publish("new", lease, s3)
    seen = world.folder()
    with world.claim("other") as lease:
        assert not world.publisher(world.s3).repair(PLACE, "other", lease)
        assert world.folder() == seen and world.has_note()
        world.let_the_turn_run_out()
        assert world.publisher(world.s3).repair(PLACE, "other", lease)
        assert world.folder() == OLD


def test_a_repair_that_another_worker_was_faster_with_rolls_nothing_back(world: World) -> None:
    world.has_model_of("old")
    with pytest.raises(Killed), world.claim("new") as lease:
        world.publish("new", lease, worker_of(world, killed_at(1, writes(place(WEIGHTS)))))
    world.let_the_turn_run_out()

    def faster() -> None:
        with world.claim("other") as other:
            assert world.publisher(world.s3).repair(PLACE, "other", other)

    # The second request of a repair takes the turn; the first has read it.
    slow = worker_of(world, Stops(2, faster))
    with world.claim("third") as lease:
        assert not world.publisher(slow).repair(PLACE, "third", lease)
    assert world.folder() == OLD and not world.has_note()


def test_a_folder_that_is_rolled_back_gets_the_weights_last(world: World) -> None:
    world.has_model_of("old")
    written: list[str] = []

    def after_the_weights(method: str, _bucket: str, key: str) -> bool:
        if method == "PUT":
            written.append(key)
        return place(WEIGHTS) in written[:-1]

    with pytest.raises(Killed), world.claim("new") as lease:
        world.publish("new", lease, worker_of(world, killed_at(1, after_the_weights)))
    assert world.folder() == NEW
    world.let_the_turn_run_out()
    s3 = worker_of(world, Stops())
    with world.claim("new") as lease:
        assert world.publisher(s3).repair(PLACE, "new", lease)
    brought_back = [key for method, key in s3.requests if method == "PUT" and "models/" in key]
    assert brought_back[-1] == place(WEIGHTS) and len(brought_back) > 1
    assert world.folder() == OLD


def writes(key: str) -> Callable[[str, str, str], bool]:
    return lambda method, _bucket, of: method == "PUT" and of == key


def test_a_folder_that_cannot_be_rolled_back_is_replaced_as_a_whole(world: World) -> None:
    world.has_model_of("old")
    s3 = worker_of(world, killed_at(1, writes(place(WEIGHTS))))
    with pytest.raises(Killed), world.claim("new") as lease:
        world.publish("new", lease, s3)
    world.let_the_turn_run_out()
    kept = world.archive("old")
    assert kept == OLD
    missing = f"archive/style_{STYLE}/old/loss_curve.png"
    world.s3.delete(STATE, [missing])
    with world.claim("new") as lease, pytest.raises(StorageError, match="Train again"):
        world.publisher(world.s3).repair(PLACE, "new", lease)
    with world.claim("other") as lease:
        world.publish("other", lease)
    assert world.folder() == whole("other") and not world.has_note()


def test_files_that_no_worker_published_are_archived_and_brought_back_too(world: World) -> None:
    world.s3.write(S3Location(MODELS, place("by-hand.txt")), b"precious")
    world.has_model_of("old")
    before = world.folder()

    def refuse() -> None:
        raise AccessDenied("no")

    stops = Stops(1, refuse, only=writes(place(WEIGHTS)))
    with world.claim("new") as lease, pytest.raises(AccessDenied):
        world.publish("new", lease, worker_of(world, stops))
    assert world.folder() == before
    with world.claim("new") as lease:
        world.publish("new", lease)
    assert world.folder() == NEW
    assert world.archive("unknown.run") == {"by-hand.txt": ("precious", "")}


# --- the archive


def test_a_suspended_publisher_does_not_copy_newer_files_over_older_ones_in_the_archive(
    world: World,
) -> None:
    world.has_model_of("old")

    def overtaken() -> None:
        world.let_the_turn_run_out()
        with world.claim("other") as lease:
            world.publish("other", lease, ordered_at=LATE)

    copies: Callable[[str, str, str], bool] = lambda method, _b, key: (
        method == "COPY" and key.endswith(f"old/{WEIGHTS}")
    )
    s3 = worker_of(world, Stops(1, overtaken, only=copies))
    with world.claim("slept") as lease, pytest.raises(StorageError):
        world.publish("slept", lease, s3, ordered_at=LATE)
    assert world.folder() == whole("other")
    assert world.archive("old") == OLD


def test_lease_and_turn_are_renewed_before_each_copy_into_the_archive(world: World) -> None:
    world.has_model_of("old")
    calls: list[str] = []
    s3 = worker_of(world, Stops())
    s3.before = lambda method, _bucket, key: calls.append(f"{method} {key}")
    with world.claim("new", s3) as lease:
        world.publish("new", lease, s3)
    copies = [number for number, call in enumerate(calls) if call.startswith("COPY")]
    assert len(copies) == len(OLD_FILES)
    for number in copies:
        assert set(calls[number - 2 : number]) == {
            f"PUT jobs/style_{STYLE}.turn",
            "PUT jobs/new.json",
        }


def test_a_job_whose_worker_dies_before_its_ending_leaves_no_file_if_it_then_fails(
    world: World,
) -> None:
    world.has_model_of("old")
    with world.claim("new") as lease:
        world.publish("new", lease)
    assert world.folder() == NEW and world.waits_for_its_ending()
    with world.claim("new") as lease:  # it is claimed again, and cancelled
        assert world.publisher(world.s3).repair(PLACE, "new", lease)
    assert world.folder() == OLD and not world.waits_for_its_ending()


def test_a_confirmed_publication_is_never_rolled_back(world: World) -> None:
    world.has_model_of("old")
    with world.claim("new") as lease:
        world.publish("new", lease)
        world.publisher(world.s3).confirm(PLACE, "new", lease)
        assert not world.waits_for_its_ending()
        assert not world.publisher(world.s3).repair(PLACE, "new", lease)
    assert world.folder() == NEW


def test_a_publication_is_confirmed_by_its_own_job_only(world: World) -> None:
    with world.claim("new") as lease:
        world.publish("new", lease)
    with world.claim("other") as lease:
        publisher = world.publisher(world.s3)
        publisher.confirm(PLACE, "other", lease)
        assert world.waits_for_its_ending()
        assert not publisher.repair(PLACE, "other", lease)
        assert world.folder() == NEW
        world.publish("other", lease)
    assert world.folder() == whole("other") and world.archive("new") == NEW


def test_confirming_never_fails_a_job_that_has_ended(world: World) -> None:
    with world.claim("new") as lease:
        world.publish("new", lease)

        def refuse() -> None:
            raise AccessDenied("no")

        s3 = worker_of(world, Stops(1, refuse, forever=True))
        world.publisher(s3).confirm(PLACE, "new", lease)
    assert world.waits_for_its_ending()


def test_the_earlier_model_is_restored_if_a_later_claim_fails_too(
    world: World,
) -> None:
    world.has_model_of("old")
    with world.claim("new") as lease:
        world.publish("new", lease)

    def refuse() -> None:
        raise AccessDenied("no")

    with world.claim("new") as lease:
        assert lease.claim_number == 2
        with pytest.raises(AccessDenied):
            stops = Stops(2, refuse, only=writes(place(WEIGHTS)))  # the first brings back the old
            world.publish("new", lease, worker_of(world, stops))
    assert world.folder() == OLD


def test_an_archive_that_may_not_be_read_does_not_keep_a_model_from_its_place(world: World) -> None:
    world.has_model_of("old")

    def refuse() -> None:
        raise AccessDenied("the policy of an earlier release")

    reads: Callable[[str, str, str], bool] = lambda method, _bucket, key: (
        method in ("HEAD", "GET") and key.startswith("archive/")
    )
    s3 = worker_of(world, Stops(1, refuse, forever=True, only=reads))
    with world.claim("new") as lease:
        world.publish("new", lease, s3)
    assert world.folder() == NEW and world.archive("old") == OLD


# --- order


@pytest.mark.parametrize(
    ("there", "ours", "wins"),
    [
        (EARLY, LATE, "new"),
        (LATE, EARLY, "old"),
        (EARLY, EARLY, "new"),
        # Instants count: the text that sorts later is the earlier order.
        ("2025-01-20T10:30:00+00:00", "2025-01-20T11:00:00+09:00", "old"),
        ("2025-01-20T11:00:00+09:00", "2025-01-20T10:30:00+00:00", "new"),
        ("", EARLY, "new"),
        ("no date", EARLY, "new"),
    ],
)
def test_the_model_of_the_later_order_stays(world: World, there: str, ours: str, wins: str) -> None:
    world.has_model_of("old", ordered_at=there)
    with world.claim("new") as lease:
        published = world.publish("new", lease, ordered_at=ours)
    url = f"s3://{MODELS}/models/style_{STYLE}/{WEIGHTS}"
    assert published.model_url == url
    if wins == "new":
        assert (published.superseded_by, published.archived_url) == (None, None)
        assert world.folder() == NEW and world.archive("old") == OLD
    else:
        assert published.superseded_by == "old"
        assert published.archived_url == f"s3://{STATE}/archive/style_{STYLE}/new/{WEIGHTS}"
        assert world.folder() == OLD and world.archive("new") == NEW
    assert not list(world.s3.list_objects(STATE, "staging/"))


def test_published_files_carry_the_time_of_their_order(world: World) -> None:
    with world.claim("new") as lease:
        world.publish("new", lease, ordered_at="2025-01-20T19:00:00+09:00")
    for name in FILES:
        mark = world.s3.head(S3Location(MODELS, place(name))).metadata
        assert mark == {
            "task_id": "new",
            "claim": "1",
            "ordered-at": "2025-01-20T10:00:00+00:00",
        }


def test_an_order_from_the_future_does_not_keep_later_orders_out(world: World) -> None:
    with world.claim("future") as lease:
        world.publish("future", lease, ordered_at="2999-01-01T00:00:00Z")
    with world.claim("new") as lease:
        published = world.publish("new", lease, ordered_at="not a time")
    assert published.superseded_by is None and world.folder() == NEW


def test_an_incomplete_model_of_a_later_order_does_not_stay(world: World) -> None:
    world.has_model_of("old", ordered_at=LATE)
    world.s3.delete(MODELS, [place(WEIGHTS)])
    with world.claim("new") as lease:
        assert world.publish("new", lease, ordered_at=EARLY).superseded_by is None
    assert world.folder() == NEW


# --- two endpoints


def test_with_two_endpoints_files_stream_to_the_archive_and_back(tmp_path: Path) -> None:
    objects = MemoryS3()
    world = World(objects, MODELS, STATE, tmp_path)
    world.has_model_of("old")

    def refuse() -> None:
        raise AccessDenied("no")

    def foreign(bucket: str) -> Callable[[str, str, str], bool]:
        return lambda method, of, key: of != bucket or method == "COPY"

    models = worker_of(world, Stops(1, refuse, forever=True, only=foreign(MODELS)))
    state = worker_of(world, Stops(1, refuse, forever=True, only=foreign(STATE)))
    with world.claim("new") as lease:
        world.publish("new", lease, models, state=state)
    assert world.folder() == NEW and world.archive("old") == OLD
    broken = worker_of(world, Stops(1, refuse, only=writes(place(WEIGHTS))))
    with world.claim("other") as lease, pytest.raises(AccessDenied):
        world.publish("other", lease, broken, state=state)
    assert world.folder() == NEW and world.archive("new") == NEW


def test_a_stop_before_the_first_file_is_a_cancel(world: World) -> None:
    stop = StopSignal()
    stop.request(StopReason.CANCELLED)
    with world.claim("new") as lease, pytest.raises(Cancelled):
        world.publish("new", lease, stop=stop)
    assert world.folder() == {}
