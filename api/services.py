"""The services of the routes: settings, database, storage, kinds, and background threads."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable

from api.duties.hub import Hub
from api.gate.keys import Keyring
from api.gate.limits import Rates
from api.life.line import WaitingLine
from api.store.database import Database
from jobs.addresses import S3Location
from jobs.kinds import Kinds
from services.s3.s3_service import S3Service
from services.s3.uploads import Uploads
from services.telemetry.tracing import Tracing
from services.webhooks.customers import CustomerWebhooks
from services.webhooks.verification import WebhookVerifier
from utils.metrics import ApiMetrics
from utils.settings.groups import ApiSettings


@dataclasses.dataclass(frozen=True, slots=True)
class Buckets:
    """Names of the buckets.

    Attributes:
        files: Uploaded files, which workers read.
        models: Published models.
        state: Records, checkpoints and orders.
    """

    files: str
    models: str
    state: str


@dataclasses.dataclass(frozen=True, slots=True)
class Services:
    """The services of one application.

    Attributes:
        settings: The API's settings.
        database: The database.
        metrics: Metrics of this process.
        keys: API keys.
        rates: The limit of requests per key.
        kinds: All registered kinds of job.
        s3: The storage of files and models.
        state_s3: The storage of the state bucket.
        uploads: Uploads and signed addresses of files and models.
        buckets: Names of the buckets.
        verifier: Verifies webhooks.
        line: The places of waiting jobs.
        hub: Hands new events to open streams.
        backend_url: The address that messages name for webhooks.
        wake: Set to have the relay look at the outbox at once.
        broker_state: Returns why the broker cannot be used; empty if it can.
        customers: Sends webhooks to organisations.
        tracing: Spans of requests that order jobs, and of webhooks.
        is_open: Whether callers without a key are served.
    """

    settings: ApiSettings
    database: Database
    metrics: ApiMetrics
    keys: Keyring
    rates: Rates
    kinds: Kinds
    s3: S3Service
    state_s3: S3Service
    uploads: Uploads
    buckets: Buckets
    verifier: WebhookVerifier
    line: WaitingLine
    hub: Hub
    backend_url: str
    wake: threading.Event
    broker_state: Callable[[], str]
    customers: CustomerWebhooks
    tracing: Tracing
    is_open: bool

    def cost(self, seconds: float | None) -> float | None:
        """The cost of so much GPU time; None without a price or a time."""
        price = self.settings.gpu_price_per_hour
        if price is None or seconds is None:
            return None
        return round(price * seconds / 3600, 4)

    def file_at(self, org_id: str, file_id: str) -> S3Location:
        """Location of an uploaded file. Its name is no part of it."""
        return S3Location(self.buckets.files, f"orgs/{org_id}/files/{file_id}")
