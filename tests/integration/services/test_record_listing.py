"""Records found for operators on a real S3 server: by id or its beginning, style, refusal."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator

import pytest

from jobs.addresses import S3Location
from jobs.record import Ending, EndingKind, JobRequest
from sandbox.s3_server import S3Server
from services.records.index import RecordIndex
from services.records.job_records import Claimed
from services.records.listing import RecordListing, beginning_with, look_up, refusals_of
from tests.integration.services.record_world import (
    BUCKET,
    Faulty,
    claimed,
    request,
    settle,
    where,
    worker,
)


@pytest.fixture(name="server", scope="module")
def _server() -> Iterator[S3Server]:
    with S3Server() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture(name="store")
def _store(server: S3Server) -> Faulty:
    """An empty store."""
    store = Faulty(server.endpoint)
    store.delete(BUCKET, [info.key for info in store.list_objects(BUCKET, "")])
    return store


def _job(task_id: str, style_id: int = 7) -> JobRequest:
    return dataclasses.replace(request(task_id), kind="style", subject=str(style_id))


def _settled(store: Faulty, task_id: str, style_id: int = 7) -> None:
    """A job that is over, and that the sweep has found so."""
    settle(claimed(worker(store), _job(task_id, style_id)))
    RecordIndex(store, BUCKET).remove(task_id)


def _refused(store: Faulty, task_id: str) -> str:
    """A message that was refused; its record's id."""
    body = {"style_id": 7, "task_id": task_id, "error_message": "no"}
    ending = Ending(EndingKind.FAILED, body, code="INVALID_MESSAGE")
    claim = worker(store).claim_invalid(uuid.uuid4().hex, ending, kind="style", subject="7")
    assert isinstance(claim, Claimed)
    return claim.lease.record.task_id


def _ids(listing: RecordListing, style_id: int, limit: int = 500) -> tuple[set[str], int]:
    found, unread = listing.of_subject("style", str(style_id), limit=limit)
    return {each.task_id for each in found}, unread


def test_the_beginning_of_an_id_finds_every_job_that_begins_so_and_nothing_else(
    store: Faulty,
) -> None:
    for task_id in ("order-1", "order-10", "other", "live-one"):
        claimed(worker(store), _job(task_id))
    refused = _refused(store, "order-99")
    assert beginning_with(store, BUCKET, "order-1") == ["order-1", "order-10"]
    assert beginning_with(store, BUCKET, "orderx") == []
    assert beginning_with(store, BUCKET, "live") == ["live-one"], "the index holds no records"
    assert beginning_with(store, BUCKET, "inva") == []
    sha = refused.removeprefix("invalid/")
    assert beginning_with(store, BUCKET, sha[:8]) == [refused]
    assert beginning_with(store, BUCKET, f"invalid/{sha[:8]}") == [refused]


def test_a_refused_message_is_found_by_the_id_that_it_gave(store: Faulty) -> None:
    first, second = _refused(store, "wrong-one"), _refused(store, "wrong-one")
    _refused(store, "another")
    found = refusals_of(store, BUCKET, "wrong-one")
    assert {each.task_id for each in found} == {first, second}
    assert refusals_of(store, BUCKET, "nobody") == []


def test_a_styles_records_are_the_unsettled_ones_and_those_that_are_over(store: Faulty) -> None:
    claimed(worker(store), _job("live"))
    _settled(store, "done")
    _settled(store, "of-another-style", 8)
    claimed(worker(store), _job("live-of-another", 8))
    assert _ids(RecordListing(store, BUCKET), 7) == ({"live", "done"}, 0)


def test_old_records_of_a_style_are_found_by_its_checkpoints_and_archived_models(
    store: Faulty,
) -> None:
    for task_id in ("trained", "archived", "neither"):
        _settled(store, task_id)
    store.write(S3Location(BUCKET, "checkpoints/style_7/trained/epoch-0010/lora.bin"), b"x")
    store.write(S3Location(BUCKET, "archive/style_7/archived/lora_weights.safetensors"), b"x")
    assert _ids(RecordListing(store, BUCKET), 7, limit=0) == ({"trained", "archived"}, 1)


def test_the_newest_come_first_and_settled_ones_can_be_left_out(store: Faulty) -> None:
    _settled(store, "done")
    claimed(worker(store), _job("live"))
    listing = RecordListing(store, BUCKET)
    found, more = listing.newest(1)
    assert len(found) == 1 and more == 1
    assert [each.task_id for each in listing.newest(9, unsettled_only=True)[0]] == ["live"]
    assert [each.task_id for each in listing.unsettled] == ["live"]
    assert [each.task_id for each in listing.settled()] == ["done"]
    assert sorted(listing.ids) == ["done", "live"]


def test_an_unreadable_record_does_not_affect_the_others(store: Faulty) -> None:
    claimed(worker(store), _job("sound"))
    store.write(where("damaged"), b"{")
    sound, damaged, missing = look_up(store, BUCKET, ["sound", "damaged", "missing"])
    assert sound.record and sound.problem == ""
    assert damaged.record is None and "damaged" in damaged.problem
    assert missing.record is None and "no such record" in missing.problem
