"""The tables. The job records on S3 are the truth; this database is a projection with an outbox.

Times are seconds since 1970 in UTC. Ids are random and carry a prefix. Every row that belongs to an
organisation has its id, and every query for a caller filters by it.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Json = JSON().with_variant(JSONB(), "postgresql")
Identity = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite counts only in columns of the type INTEGER."""

OPEN = ("validating_files", "queued", "running", "pausing", "paused")
"""Statuses of jobs that have not ended."""
ENDED = ("succeeded", "failed", "cancelled")
WITH_WORKERS = ("queued", "running", "pausing")
"""Statuses of jobs that hold a slot of their organisation, once they are admitted."""


class Table(DeclarativeBase):
    """The base of all tables."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {
        str: String(255),
        float: Double(),
        dict[str, Any]: Json,
        list[Any]: Json,
        bytes: LargeBinary(),
    }


class OrganizationRow(Table):
    """An organisation: the owner of keys, files, jobs and models.

    `last_turn_at` is the time of its last admitted job; 0 before the first.
    """

    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    created_at: Mapped[float]
    limits: Mapped[dict[str, Any]]
    last_turn_at: Mapped[float]
    deleted_at: Mapped[float | None]


class ApiKeyRow(Table):
    """An API key, as a hash."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(index=True)
    prefix: Mapped[str]
    hash: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    scopes: Mapped[list[Any]]
    created_by: Mapped[str | None]
    created_at: Mapped[float]
    last_used_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]


class FileRow(Table):
    """An uploaded file."""

    __tablename__ = "files"
    __table_args__ = (Index("ix_files_org_id_created_at_id", "org_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str]
    filename: Mapped[str] = mapped_column(Text())
    bytes: Mapped[int] = mapped_column(BigInteger())
    sha256: Mapped[str | None]
    content_type: Mapped[str]
    purpose: Mapped[str]
    bucket: Mapped[str]
    key: Mapped[str]
    status: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    deleted_at: Mapped[float | None]


class UploadRow(Table):
    """A file that is uploaded in parts."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(index=True)
    file_id: Mapped[str]
    filename: Mapped[str] = mapped_column(Text())
    bytes: Mapped[int] = mapped_column(BigInteger())
    purpose: Mapped[str]
    content_type: Mapped[str]
    bucket: Mapped[str]
    key: Mapped[str]
    s3_upload_id: Mapped[str] = mapped_column(Text())
    part_bytes: Mapped[int] = mapped_column(BigInteger())
    status: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float]


class UploadPartRow(Table):
    """A part that came through the API; parts that went straight to S3 have no row."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(index=True)
    number: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger())
    etag: Mapped[str]
    created_at: Mapped[float]


class JobRow(Table):
    """A job, as far as the API has heard of it.

    `sequence` is that of the newest news, `admitted_at` the time when its message was given to the
    outbox, and `subject` the thing that the job makes, as the job's record names it.
    `trace_headers` name the trace of the request that ordered it.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_org_id_created_at_id", "org_id", "created_at", "id"),
        Index("ix_jobs_open", "status", "admitted_at", "org_id"),
        Index("ix_jobs_heard_at", "status", "heard_at"),
        # The queue's position and admission read only these rows, so the history costs nothing.
        Index(
            "ix_jobs_waiting",
            "org_id",
            "created_at",
            postgresql_where=text("status IN ('queued', 'running', 'pausing')"),
            sqlite_where=text("status IN ('queued', 'running', 'pausing')"),
        ),
        UniqueConstraint("kind", "subject_number"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str | None]
    kind: Mapped[str]
    subject: Mapped[str]
    subject_number: Mapped[int | None] = mapped_column(BigInteger())
    name: Mapped[str | None] = mapped_column(Text())
    tags: Mapped[list[Any]]
    job_metadata: Mapped[dict[str, Any]] = mapped_column("metadata")
    base_model: Mapped[str] = mapped_column(Text())
    training_files: Mapped[list[Any]]
    validation_files: Mapped[list[Any]]
    parameters: Mapped[dict[str, Any]]
    hyperparameters: Mapped[dict[str, Any]]
    seed: Mapped[int | None] = mapped_column(BigInteger())
    suffix: Mapped[str | None]
    message: Mapped[bytes]
    min_level: Mapped[int]
    trace_headers: Mapped[dict[str, Any]]
    status: Mapped[str]
    stage: Mapped[str | None]
    priority: Mapped[int]
    admitted_at: Mapped[float | None]
    sequence: Mapped[int] = mapped_column(BigInteger())
    progress: Mapped[dict[str, Any]]
    cancel_requested_at: Mapped[float | None]
    pause_requested_at: Mapped[float | None]
    attempts: Mapped[int]
    loss: Mapped[float | None]
    best_validation_loss: Mapped[float | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text())
    model_id: Mapped[str | None]
    result: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]
    heard_at: Mapped[float]
    order_kept_at: Mapped[float | None]
    deleted_at: Mapped[float | None]


class EventRow(Table):
    """Something that happened to a job. Ids follow the order of the commits; see `Writing`."""

    __tablename__ = "job_events"
    __table_args__ = (
        Index("ix_job_events_job_id_id", "job_id", "id"),
        Index("ix_job_events_org_id_id", "org_id", "id"),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(Identity, primary_key=True, autoincrement=True)
    job_id: Mapped[str]
    org_id: Mapped[str | None]
    at: Mapped[float]
    level: Mapped[str]
    type: Mapped[str]
    message: Mapped[str] = mapped_column(Text())
    data: Mapped[dict[str, Any]]


class MetricRow(Table):
    """The numbers of one step, as a progress report had them."""

    __tablename__ = "metric_points"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    claim: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger(), primary_key=True)
    epoch: Mapped[float | None]
    at: Mapped[float]
    numbers: Mapped[dict[str, Any]]


class OutboxRow(Table):
    """A message for the broker. `due_at` is empty until its job is admitted."""

    __tablename__ = "outbox"
    __table_args__ = (Index("ix_outbox_published_at_due_at", "published_at", "due_at"),)

    id: Mapped[int] = mapped_column(Identity, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    body: Mapped[bytes]
    headers: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    due_at: Mapped[float | None]
    attempts: Mapped[int]
    published_at: Mapped[float | None]


class ReceiptRow(Table):
    """A webhook that came in."""

    __tablename__ = "webhook_receipts"

    webhook_id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    sequence: Mapped[int] = mapped_column(BigInteger())
    received_at: Mapped[float] = mapped_column(index=True)
    applied: Mapped[int]


class AnswerRow(Table):
    """The answer to a request that created something, kept for a day for its repetitions."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        UniqueConstraint("org_id", "key"),
        Index("ix_idempotency_keys_api_key_id_request_hash", "api_key_id", "request_hash"),
    )

    id: Mapped[int] = mapped_column(Identity, primary_key=True, autoincrement=True)
    org_id: Mapped[str]
    api_key_id: Mapped[str]
    key: Mapped[str | None]
    request_hash: Mapped[str]
    body: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(index=True)


class ModelRow(Table):
    """A model that a job has made."""

    __tablename__ = "models"
    __table_args__ = (Index("ix_models_org_id_created_at_id", "org_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str | None]
    kind: Mapped[str]
    job_id: Mapped[str] = mapped_column(index=True)
    base_model: Mapped[str] = mapped_column(Text())
    bucket: Mapped[str]
    prefix: Mapped[str] = mapped_column(Text())
    main_file: Mapped[str]
    created_at: Mapped[float]
    deleted_at: Mapped[float | None]


class BucketRow(Table):
    """A token bucket of a rate limit."""

    __tablename__ = "rate_buckets"

    name: Mapped[str] = mapped_column(primary_key=True)
    tokens: Mapped[float]
    filled_at: Mapped[float]


class CounterRow(Table):
    """A number that only rises, such as the next number of a style."""

    __tablename__ = "counters"

    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger())


class LeaseRow(Table):
    """The process that does a duty which only one may do at a time."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    until: Mapped[float]


class PageSessionRow(Table):
    """A person who has signed in to the web page. `id` is the hash of the cookie."""

    __tablename__ = "page_sessions"

    id: Mapped[str] = mapped_column(primary_key=True)
    public_id: Mapped[str] = mapped_column(unique=True)
    org_id: Mapped[str] = mapped_column(index=True)
    api_key_id: Mapped[str] = mapped_column(index=True)
    browser: Mapped[str]
    created_at: Mapped[float]
    used_at: Mapped[float]
    expires_at: Mapped[float]
    revoked_at: Mapped[float | None]


class DraftRow(Table):
    """An order that is being put together on the web page, with what is known of its files."""

    __tablename__ = "page_drafts"

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(index=True)
    kind: Mapped[str]
    content: Mapped[dict[str, Any]]
    created_at: Mapped[float]
    job_id: Mapped[str | None]


class AuditRow(Table):
    """An act on keys, jobs or files. Rows are only added."""

    __tablename__ = "audit_log"
    __table_args__ = (Index("ix_audit_log_org_id_id", "org_id", "id"),)

    id: Mapped[int] = mapped_column(Identity, primary_key=True, autoincrement=True)
    org_id: Mapped[str | None]
    api_key_id: Mapped[str]
    at: Mapped[float]
    act: Mapped[str]
    subject: Mapped[str]
    request_id: Mapped[str]


class EndpointRow(Table):
    """An address of an organisation that webhooks are sent to.

    Its signing secret is derived from its id and `secret_version`, so no table has it. Until
    `old_secret_until` the secret of the version before signs, too.
    """

    __tablename__ = "webhook_endpoints"

    id: Mapped[str] = mapped_column(primary_key=True)
    org_id: Mapped[str] = mapped_column(index=True)
    url: Mapped[str] = mapped_column(Text())
    events: Mapped[list[Any]]
    secret_version: Mapped[int]
    old_secret_until: Mapped[float | None]
    created_at: Mapped[float]
    disabled_at: Mapped[float | None]
    deleted_at: Mapped[float | None]


class WebhookRow(Table):
    """A webhook for an endpoint: it waits, or was delivered or given up at `settled_at`."""

    __tablename__ = "webhooks"
    __table_args__ = (
        Index("ix_webhooks_settled_at_due_at", "settled_at", "due_at"),
        Index("ix_webhooks_endpoint_id_created_at_id", "endpoint_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    endpoint_id: Mapped[str]
    org_id: Mapped[str]
    job_id: Mapped[str | None]
    type: Mapped[str]
    body: Mapped[bytes]
    created_at: Mapped[float]
    due_at: Mapped[float]
    attempts: Mapped[int]
    status: Mapped[int | None]
    problem: Mapped[str | None] = mapped_column(Text())
    is_delivered: Mapped[int]
    settled_at: Mapped[float | None]
