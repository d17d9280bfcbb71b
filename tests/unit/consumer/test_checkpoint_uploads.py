"""Checkpoints: uploads, deletions, and the limits of a worker that was suspended."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from consumer.life import checkpoint_uploads
from consumer.life.checkpoint_uploads import (
    CheckpointUploads,
    clear_up,
    delete_all_of,
    newest_usable_checkpoint,
    prune,
)
from jobs.addresses import S3Location
from jobs.hold import decode, encode, stamped
from jobs.layout import record_at
from jobs.record import Ending, EndingKind, JobRecord, StoredCheckpoint
from services.records.job_lease import JobLease
from tests.memory_s3 import MemoryS3, StoredObject, away, works
from tests.publishing import STYLE, World, job_of
from tests.unit.jobs.message_samples import all_kinds
from utils.errors import ErrorCode, StorageError
from utils.events import CheckpointSaved
from utils.manifest import MANIFEST, write_folder

STATE = "state"
PREFIX = f"checkpoints/style_{STYLE}/job/"
LORA = "lora.safetensors"
NAMES = (LORA, "optimizer.safetensors", MANIFEST)


@pytest.fixture(name="s3")
def _s3() -> MemoryS3:
    return MemoryS3()


@pytest.fixture(name="world")
def _world(s3: MemoryS3, tmp_path: Path) -> World:
    return World(s3, "models", STATE, tmp_path)


def put(s3: MemoryS3, name: str, claim: int = 1, files: tuple[str, ...] = NAMES) -> None:
    """A checkpoint as a claim uploads it."""
    mark = {"claim": str(claim), "task_id": "job"}
    for file in files:
        s3.objects[STATE, f"{PREFIX}{name}/{file}"] = StoredObject(b"content", mark, s3.now)


def checkpoint(name: str, epoch: int, claim: int = 1) -> StoredCheckpoint:
    return StoredCheckpoint(name, epoch, epoch * 10, f"{PREFIX}{name}/", claim)


def register(lease: JobLease, s3: MemoryS3, *epochs: int) -> None:
    """Checkpoints of these epochs, uploaded and registered."""
    for epoch in epochs:
        put(s3, f"epoch-{epoch:04d}", lease.claim_number)
        lease.register_checkpoint(checkpoint(f"epoch-{epoch:04d}", epoch, lease.claim_number))


def there(s3: MemoryS3) -> set[str]:
    """Names of the checkpoints' files."""
    return {found.key.removeprefix(PREFIX) for found in s3.list_objects(STATE, PREFIX)}


def full(*names: str) -> set[str]:
    return {f"{name}/{file}" for name in names for file in NAMES}


def lora(*names: str) -> set[str]:
    return {f"{name}/lora.safetensors" for name in names}


# --- pruning


def test_the_last_two_stay_in_full_and_of_older_ones_the_weights(
    s3: MemoryS3, world: World
) -> None:
    with world.claim("job") as lease:
        register(lease, s3, 10, 20, 30, 40)
        prune(s3, STATE, PREFIX, kept=["epoch-0030", "epoch-0040"], kept_file=LORA, lease=lease)
    assert there(s3) == full("epoch-0030", "epoch-0040") | lora("epoch-0010", "epoch-0020")


def test_a_worker_that_was_suspended_while_pruning_deletes_nothing_of_its_successors(
    s3: MemoryS3, world: World
) -> None:
    """The worker is suspended before each of its requests in turn."""
    for number in range(1, 12):
        s3.objects.clear()
        asleep = MemoryS3(s3.objects)
        with world.claim("job", asleep) as slept:
            register(slept, s3, 10, 20, 30)
            asleep.before = sleeping_until(number, lambda: succeed(world, s3))
            prune(
                asleep,
                STATE,
                PREFIX,
                kept=["epoch-0020", "epoch-0030"],
                kept_file=LORA,
                lease=slept,
            )
            asleep.before = lambda method, bucket, key: None
        assert full("epoch-0020", "epoch-0030") <= there(s3)
        if "epoch-0040/manifest.json" in there(s3):  # it was suspended
            assert full("epoch-0040", "epoch-0050") <= there(s3), f"request {number}"
            assert full("epoch-0005") <= there(s3), f"request {number}"


def sleeping_until(number: int, wake: Callable[[], None]) -> Callable[[str, str, str], None]:
    count = 0

    def before(_method: str, _bucket: str, _key: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            wake()

    return before


def succeed(world: World, s3: MemoryS3) -> None:
    """Another worker has the job now, and makes checkpoints; one has an early name."""
    with world.claim("job") as lease:
        put(s3, "epoch-0005", lease.claim_number)
        register(lease, s3, 40, 50)


def test_the_lease_is_renewed_directly_before_the_deletion(s3: MemoryS3, world: World) -> None:
    calls: list[str] = []
    with world.claim("job") as lease:
        register(lease, s3, 10, 20, 30)
        s3.before = lambda method, _bucket, key: calls.append(f"{method} {key}")
        prune(s3, STATE, PREFIX, kept=["epoch-0020", "epoch-0030"], kept_file=LORA, lease=lease)
    assert calls[-2] == "PUT jobs/job.json" and calls[-1].startswith("DELETE ")


def test_if_there_is_nothing_to_delete_nothing_is_written(s3: MemoryS3, world: World) -> None:
    with world.claim("job") as lease:
        register(lease, s3, 10, 20)
        calls: list[str] = []
        s3.before = lambda method, _bucket, key: calls.append(method)
        prune(s3, STATE, PREFIX, kept=["epoch-0010", "epoch-0020"], kept_file=LORA, lease=lease)
        prune(s3, STATE, PREFIX, kept=[], kept_file=LORA, lease=lease)
    assert set(calls) == {"LIST"} and there(s3) == full("epoch-0010", "epoch-0020")


@pytest.mark.parametrize(
    ("claims", "goes"), [((1, 1, 1), True), ((1, 2, 1), True), ((1, 3, 1), False)]
)
def test_a_checkpoint_goes_only_if_no_later_claim_has_written_a_file_of_it(
    s3: MemoryS3, world: World, claims: tuple[int, ...], goes: bool
) -> None:
    world.claim("job").close()
    with world.claim("job") as lease:
        assert lease.claim_number == 2
        register(lease, s3, 20, 30)
        for file, claim in zip(NAMES, claims, strict=True):
            put(s3, "epoch-0010", claim, (file,))
        prune(s3, STATE, PREFIX, kept=["epoch-0020", "epoch-0030"], kept_file=LORA, lease=lease)
    assert ("epoch-0010/manifest.json" not in there(s3)) == goes


def test_checkpoints_after_the_kept_ones_stay(s3: MemoryS3, world: World) -> None:
    """They are a successor's, or training went back before them: the next ones replace them."""
    with world.claim("job") as lease:
        register(lease, s3, 10, 20)
        put(s3, "epoch-0030")
        prune(s3, STATE, PREFIX, kept=["epoch-0010", "epoch-0020"], kept_file=LORA, lease=lease)
        assert full("epoch-0030") <= there(s3)
        put(s3, "epoch-0005-retake-1")
        prune(s3, STATE, PREFIX, kept=["epoch-0005-retake-1"], kept_file=LORA, lease=lease)
    assert there(s3) == full("epoch-0005-retake-1") | lora("epoch-0010", "epoch-0020", "epoch-0030")


def test_files_that_belong_to_no_checkpoint_stay(s3: MemoryS3, world: World) -> None:
    with world.claim("job") as lease:
        register(lease, s3, 20)
        for key in ("tensorboard/claim-0001.events", "notes/a.txt", "readme"):
            s3.write(S3Location(STATE, PREFIX + key), b"")
        before = there(s3)
        prune(s3, STATE, PREFIX, kept=["epoch-0020"], kept_file=LORA, lease=lease)
    assert there(s3) == before


def test_a_deletion_that_fails_does_not_fail_the_job(s3: MemoryS3, world: World) -> None:
    def fail(method: str, _bucket: str, _key: str) -> None:
        if method == "DELETE":
            raise StorageError("S3 is away")

    with world.claim("job") as lease:
        register(lease, s3, 10, 20, 30)
        s3.before = fail
        prune(s3, STATE, PREFIX, kept=["epoch-0020", "epoch-0030"], kept_file=LORA, lease=lease)
        s3.before = lambda method, bucket, key: None
        prune(s3, STATE, PREFIX, kept=["epoch-0020", "epoch-0030"], kept_file=LORA, lease=lease)
    assert "epoch-0010/manifest.json" not in there(s3)


# --- after the ending


def ended(lease: JobLease, kind: EndingKind, code: str | None = None) -> JobRecord:
    lease.end(Ending(kind, {"style_id": STYLE}, code))
    return lease.record


@pytest.mark.parametrize(
    ("kind", "code", "left"),
    [
        (EndingKind.COMPLETE, None, lora("epoch-0010", "epoch-0020")),
        (EndingKind.FAILED, ErrorCode.CANCELLED, set()),
        (EndingKind.FAILED, ErrorCode.STORAGE_FAILED, full("epoch-0020")),
    ],
)
def test_after_the_ending_files_that_are_no_longer_needed_are_deleted(
    s3: MemoryS3, world: World, kind: EndingKind, code: str | None, left: set[str]
) -> None:
    with world.claim("job") as lease:
        register(lease, s3, 10, 20)
        s3.write(S3Location(STATE, "staging/job/1/samples.png"), b"")
        assert clear_up(s3, STATE, ended(lease, kind, code), kinds=all_kinds())
    assert there(s3) == left
    assert not list(s3.list_objects(STATE, "staging/"))


def test_of_a_failed_job_the_newest_registered_checkpoint_stays(s3: MemoryS3, world: World) -> None:
    """Not a later one, before which training went back."""
    with world.claim("job") as lease:
        register(lease, s3, 10)
        put(s3, "epoch-0030")
        assert clear_up(
            s3, STATE, ended(lease, EndingKind.FAILED, ErrorCode.STORAGE_FAILED), kinds=all_kinds()
        )
    assert there(s3) == full("epoch-0010")


@pytest.mark.parametrize("remove", [functools.partial(clear_up, kinds=all_kinds()), delete_all_of])
@pytest.mark.parametrize("number", [1, 2])
def test_a_worker_that_was_suspended_after_the_ending_deletes_nothing_of_a_job_that_was_sent_back(
    s3: MemoryS3, world: World, number: int, remove: Callable[[MemoryS3, str, JobRecord], bool]
) -> None:
    asleep = MemoryS3(s3.objects)
    with world.claim("job", asleep) as slept:
        register(slept, s3, 10, 20)
        record = ended(slept, EndingKind.FAILED, ErrorCode.STORAGE_FAILED)
        slept.mark_delivered()

        def sent_back() -> None:
            where = record_at(STATE, "job")
            found = s3.read(where)
            reopened = decode(JobRecord, found.body, where.key).reopened()
            s3.replace(where, encode(stamped(reopened)), found.etag)
            with world.claim("job") as lease:
                put(s3, "epoch-0010", lease.claim_number)  # from the beginning

        asleep.before = sleeping_until(number, sent_back)
        done = remove(asleep, STATE, record)
    assert not done and full("epoch-0010", "epoch-0020") <= there(s3)


# --- uploading


def saved(folder: Path, epoch: int) -> CheckpointSaved:
    """A local checkpoint, as the trainer reports it."""
    name = f"epoch-{epoch:04d}"
    write_folder(folder / name, {file: name.encode() for file in NAMES if file != MANIFEST}, {})
    return CheckpointSaved("job", name, epoch, epoch * 10, str(folder / name), 0.0)


def uploads_of(
    world: World, s3: MemoryS3, lease: JobLease, patience: float = 5.0
) -> CheckpointUploads:
    return CheckpointUploads(
        job_of("job"),
        lease,
        s3,
        STATE,
        kept_file=LORA,
        curves=world.scratch / "curves",
        patience=lambda: patience,
        uploaded=lambda name, seconds: None,
    )


def test_a_complete_checkpoint_is_registered_and_its_local_folder_is_removed(
    s3: MemoryS3, world: World
) -> None:
    with world.claim("job") as lease:
        with uploads_of(world, s3, lease) as uploads:
            local = saved(world.scratch, 10)
            uploads.submit(local)
            assert uploads.settle()
        assert [each.name for each in lease.record.checkpoints] == ["epoch-0010"]
        assert not Path(local.folder).exists()
    assert there(s3) == full("epoch-0010")
    mark = s3.head(S3Location(STATE, f"{PREFIX}epoch-0010/{MANIFEST}")).metadata
    assert mark == {"task_id": "job", "claim": "1"}


def test_the_manifest_goes_up_last(s3: MemoryS3, world: World) -> None:
    written: list[str] = []
    with world.claim("job") as lease, uploads_of(world, s3, lease) as uploads:
        s3.before = lambda method, _bucket, key: written.append(f"{method} {key}")
        uploads.submit(saved(world.scratch, 10))
        assert uploads.settle()
    puts = [call for call in written if call.startswith(f"PUT {PREFIX}")]
    assert len(puts) == len(NAMES) and puts[-1].endswith(MANIFEST)
    after = written.index(puts[-1])
    assert "PUT jobs/job.json" in written[after:] and "PUT jobs/job.json" not in written[:after]


def test_during_an_upload_only_the_newest_checkpoint_waits(s3: MemoryS3, world: World) -> None:
    gate, begun = threading.Event(), threading.Event()

    def slow(method: str, _bucket: str, key: str) -> None:
        if method == "PUT" and "epoch-0010" in key:
            begun.set()
            assert gate.wait(10)

    with world.claim("job") as lease:
        with uploads_of(world, s3, lease) as uploads:
            s3.before = slow
            uploads.submit(saved(world.scratch, 10))
            assert begun.wait(10)
            for epoch in (20, 30):
                uploads.submit(saved(world.scratch, epoch))
            assert not (world.scratch / "epoch-0020").exists()
            gate.set()
            assert uploads.settle()
        names = [each.name for each in lease.record.checkpoints]
    assert names == ["epoch-0010", "epoch-0030"]


def test_an_upload_that_fails_is_tried_again(
    s3: MemoryS3, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_uploads, "_RETRY_SECONDS", 0.01)
    failures = iter([StorageError("S3 is away")] * 3)

    def fail(method: str, _bucket: str, key: str) -> None:
        if method == "PUT" and key.startswith(PREFIX):
            for failure in failures:
                raise failure

    with world.claim("job") as lease, uploads_of(world, s3, lease) as uploads:
        s3.before = fail
        uploads.submit(saved(world.scratch, 10))
        assert uploads.settle()
        assert lease.record.checkpoint is not None


def test_once_the_lease_is_lost_nothing_is_uploaded(s3: MemoryS3, world: World) -> None:
    with world.claim("job") as lease, uploads_of(world, s3, lease) as uploads:
        lease.lost.set()
        local = saved(world.scratch, 10)
        uploads.submit(local)
        assert not uploads.settle() or not Path(local.folder).exists()
    assert there(s3) == set()


def test_settling_takes_no_longer_than_its_limit(s3: MemoryS3, world: World) -> None:
    gate = threading.Event()

    def slow(method: str, _bucket: str, key: str) -> None:
        if method == "PUT" and key.startswith(PREFIX):
            gate.wait(10)

    with world.claim("job") as lease:
        with uploads_of(world, s3, lease, patience=0.1) as uploads:
            s3.before = slow
            uploads.submit(saved(world.scratch, 10))
            assert not uploads.settle()
            gate.set()


def test_each_upload_prunes_the_older_checkpoints(s3: MemoryS3, world: World) -> None:
    with world.claim("job") as lease, uploads_of(world, s3, lease) as uploads:
        for epoch in (10, 20, 30):
            uploads.submit(saved(world.scratch, epoch))
            assert uploads.settle()
    assert there(s3) == full("epoch-0020", "epoch-0030") | lora("epoch-0010")


# --- the thread


def threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == "checkpoint-uploads"]


def test_the_thread_ends_with_its_block_also_while_an_upload_fails(
    s3: MemoryS3, world: World
) -> None:
    before = len(threads())
    with world.claim("job") as lease:

        def away(method: str, _bucket: str, key: str) -> None:
            if method == "PUT" and key.startswith("checkpoints/"):
                raise StorageError("S3 is away")

        s3.before = away
        with uploads_of(world, s3, lease, patience=0.2) as running:
            assert len(threads()) == before + 1
            running.submit(saved(world.scratch, 10))
        for thread in threads()[before:]:
            thread.join(5)
    assert len(threads()) == before


# --- resuming


def upload(s3: MemoryS3, lease: JobLease, folder: Path, *epochs: int) -> None:
    """Whole checkpoints of these epochs, each with its epoch in a file, uploaded and registered."""
    folder.mkdir(exist_ok=True)
    for epoch in epochs:
        name = f"epoch-{epoch:04d}"
        write_folder(folder / name, {"state.json": str(epoch).encode()}, {})
        s3.upload_folder(folder / name, STATE, f"{PREFIX}{name}/", last=MANIFEST)
        lease.register_checkpoint(checkpoint(name, epoch))


@pytest.mark.parametrize(
    ("damaged", "found"),
    [((), "30"), (("epoch-0030",), "20"), (("epoch-0030", "epoch-0020"), "10")],
)
def test_a_job_goes_on_from_the_newest_checkpoint_that_is_whole(
    s3: MemoryS3, world: World, tmp_path: Path, damaged: tuple[str, ...], found: str
) -> None:
    with world.claim("job") as lease:
        upload(s3, lease, tmp_path / "made", 10, 20, 30)
        for name in damaged:
            s3.change(STATE, f"{PREFIX}{name}/state.json", body=b"other")
        path = newest_usable_checkpoint(s3, STATE, lease.record, tmp_path / "job")
    assert path is not None and Path(path).is_absolute()
    assert (Path(path) / "state.json").read_text(encoding="utf-8") == found


def test_a_job_without_a_whole_checkpoint_begins_again_and_one_without_storage_waits(
    s3: MemoryS3, world: World, tmp_path: Path
) -> None:
    with world.claim("job") as lease:
        assert newest_usable_checkpoint(s3, STATE, lease.record, tmp_path / "a") is None
        upload(s3, lease, tmp_path / "made", 10)
        s3.objects.pop((STATE, f"{PREFIX}epoch-0010/{MANIFEST}"))
        assert newest_usable_checkpoint(s3, STATE, lease.record, tmp_path / "b") is None
        s3.before = away
        with pytest.raises(StorageError):
            newest_usable_checkpoint(s3, STATE, lease.record, tmp_path / "c")
        s3.before = works
