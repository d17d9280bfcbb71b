"""An S3 server behind a proxy with the faults of a test; webhooks to a backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sandbox.backend import Backend
from sandbox.s3_server import S3Server
from services.s3.s3_service import S3Service
from services.webhooks.webhook_service import WebhookService
from tests.integration.services.s3_proxy import S3Proxy, impatient
from tests.integration.services.webhook_setup import service


@pytest.fixture(name="behind_proxy", scope="module")
def _behind_proxy(s3_server: S3Server) -> Iterator[tuple[S3Proxy, S3Service]]:
    with S3Proxy(s3_server.endpoint) as running:
        yield running, impatient(running.endpoint)


@pytest.fixture(name="proxy")
def _proxy(behind_proxy: tuple[S3Proxy, S3Service]) -> S3Proxy:
    """A proxy without faults until a test sets some."""
    behind_proxy[0].reset()
    return behind_proxy[0]


@pytest.fixture(name="proxied")
def _proxied(behind_proxy: tuple[S3Proxy, S3Service]) -> S3Service:
    """A service with short time-outs that reaches S3 through the proxy."""
    return behind_proxy[1]


@pytest.fixture(name="webhooks")
def _webhooks(backend: Backend) -> WebhookService:
    """A service that sends webhooks to the backend."""
    return service(backend.url)
