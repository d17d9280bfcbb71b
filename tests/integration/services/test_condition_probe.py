"""The probe of conditional writes, against a store that honours them and one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.addresses import S3Location
from sandbox.s3_server import S3Server
from services.records import condition_probe
from services.records.condition_probe import probe
from services.s3.s3_service import S3Service
from tests.integration.services.record_world import BUCKET, access
from utils.errors import PreconditionFailed, StorageError


@pytest.fixture(scope="module", name="endpoint", autouse=True)
def _endpoint(s3_server: S3Server) -> str:
    s3_server.create_bucket(BUCKET)
    return s3_server.endpoint


class Careless(S3Service):
    """A store that ignores the conditions."""

    def create(self, location: S3Location, body: bytes, **_how: Any) -> str:
        return self.write(location, body)

    def replace(self, location: S3Location, body: bytes, etag: str, **_how: Any) -> str:
        return self.write(location, body)


def test_the_probe_distinguishes_a_store_that_honours_conditions_from_one_that_does_not(
    s3: S3Service, endpoint: str
) -> None:
    support = probe(s3, BUCKET)
    assert support.complete
    careless = probe(Careless(**access(endpoint)), BUCKET)
    assert (careless.create, careless.replace) == (False, False)
    assert "does not honour If-None-Match and If-Match" in careless.explain()
    assert not list(s3.list_objects(BUCKET, "jobs/.probe-"))


def test_the_probe_reports_a_bucket_that_cannot_be_used(s3: S3Service) -> None:
    with pytest.raises(StorageError, match="no-such-bucket"):
        probe(s3, "no-such-bucket")


def test_a_repeated_request_is_no_sign_of_a_store_without_conditions(
    endpoint: str,
) -> None:
    """The client repeats a request whose answer was lost, and S3 answers 412 to the repetition."""

    class Repeating(S3Service):
        """A client that sends each write twice."""

        def replace(self, location: S3Location, body: bytes, etag: str, **how: Any) -> str:
            super().replace(location, body, etag, **how)
            return super().replace(location, body, etag, **how)

    assert probe(Repeating(**access(endpoint)), BUCKET).complete


@pytest.mark.parametrize(("refusals", "complete"), [(1, True), (2, True), (99, False)])
def test_a_refusal_without_a_reason_is_ignored_unless_it_comes_again_and_again(
    endpoint: str, monkeypatch: pytest.MonkeyPatch, refusals: int, complete: bool
) -> None:
    class Refusing(S3Service):
        """A store that refuses the first writes."""

        left = refusals

        def replace(self, location: S3Location, body: bytes, etag: str, **how: Any) -> str:
            self.left -= 1
            if self.left >= 0:
                raise PreconditionFailed
            return super().replace(location, body, etag, **how)

    monkeypatch.setattr(condition_probe, "PAUSE_SECONDS", 0.0)
    assert probe(Refusing(**access(endpoint)), BUCKET).complete is complete
