"""The probe of conditional writes, against a store that honours them and one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox.s3_server import S3Server
from services.condition_probe import probe
from services.s3_service import S3Location, S3Service
from tests.integration.services.record_world import BUCKET, access
from utils.errors import StorageError


@pytest.fixture(scope="module", name="endpoint", autouse=True)
def _endpoint(s3_server: S3Server) -> str:
    s3_server.create_bucket(BUCKET)
    return s3_server.endpoint


class Careless(S3Service):
    """A store that ignores the conditions."""

    def create(self, location: S3Location, body: bytes, **how: Any) -> str:
        return self.write(location, body)

    def replace(self, location: S3Location, body: bytes, etag: str, **how: Any) -> str:
        return self.write(location, body)


def test_the_probe_tells_a_store_that_honours_conditions_from_one_that_does_not(
    s3: S3Service, endpoint: str
) -> None:
    support = probe(s3, BUCKET)
    assert support.complete
    careless = probe(Careless(**access(endpoint)), BUCKET)
    assert (careless.create, careless.replace) == (False, False)
    assert "does not honour If-None-Match and If-Match" in careless.explain()
    assert not list(s3.list_objects(BUCKET, "jobs/.probe-"))


def test_the_probe_says_when_the_bucket_cannot_be_used_at_all(s3: S3Service) -> None:
    with pytest.raises(StorageError, match="no-such-bucket"):
        probe(s3, "no-such-bucket")
