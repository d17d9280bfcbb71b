"""The test for conditional writes, with stores that refuse without a reason."""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest

from jobs.addresses import S3Location
from services.records import condition_probe
from services.records.condition_probe import ConditionalSupport, probe
from services.s3.s3_service import S3Service
from utils.errors import PreconditionFailed


@dataclasses.dataclass(frozen=True)
class _Version:
    etag: str


class _Store:
    """One object, whose present version it refuses to replace a number of times."""

    def __init__(self, false_refusals: int) -> None:
        self._false_refusals = false_refusals
        self._body: bytes | None = None

    def create(self, _location: S3Location, body: bytes) -> str:
        if self._body is not None:
            raise PreconditionFailed("There is an object.")
        return self.write(_location, body)

    def write(self, _location: S3Location, body: bytes) -> str:
        self._body = body
        return body.hex()

    def read(self, _location: S3Location) -> _Version:
        assert self._body is not None
        return _Version(self._body.hex())

    def replace(self, location: S3Location, body: bytes, etag: str) -> str:
        if etag != self.read(location).etag:
            raise PreconditionFailed("The object has another version.")
        if self._false_refusals:
            self._false_refusals -= 1
            raise PreconditionFailed("The store is busy.")
        return self.write(location, body)

    def delete(self, _bucket: str, _keys: list[str]) -> None:
        self._body = None


def _probed(false_refusals: int) -> ConditionalSupport:
    return probe(cast(S3Service, _Store(false_refusals)), "state")


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(condition_probe, "PAUSE_SECONDS", 0.0)


def test_one_refusal_without_a_reason_does_not_disqualify_a_store() -> None:
    assert _probed(0).complete
    assert _probed(1).complete
    assert _probed(2).complete


def test_a_store_that_always_refuses_the_present_version_does_not_honour_if_match() -> None:
    assert _probed(10) == ConditionalSupport(create=True, replace=False)
