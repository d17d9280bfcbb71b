"""Orders and records on S3: from them the API restores jobs that its database does not know.

Every accepted order is kept as `orders/{id}.json` before its creation is answered. The
worker's record (`jobs/{id}.json`) is the truth about everything after that.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from api.gate.cleaning import cleaned
from api.services import Services
from api.store.database import now
from api.store.tables import JobRow
from jobs import message as messages
from jobs.layout import ORDERS, RECORD_SUFFIX, cancel_file_at, order_at, pause_file_at, record_at
from jobs.record import EndingKind, JobRecord, State
from services.records.record_object import RecordObject
from services.telemetry.tracing import carried
from utils.errors import DamagedRecord, NewerRecord, ObjectNotFound, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

_KEPT = (
    *("id", "org_id", "kind", "subject", "subject_number", "name", "tags", "job_metadata"),
    *("base_model", "training_files", "validation_files", "parameters", "hyperparameters", "seed"),
    *("suffix", "min_level", "priority", "created_at", "deleted_at"),
)


def keep_order(services: Services, row: JobRow) -> bool:
    """Write the order of a job to S3. Returns whether it is there."""
    values = {name: getattr(row, name) for name in _KEPT}
    values["trace_headers"] = row.trace_headers
    values["message"] = base64.b64encode(row.message).decode()
    try:
        services.state_s3.write(
            order_at(services.buckets.state, row.id), json.dumps(values).encode()
        )
    except StorageError as error:
        log.warning("order_not_kept", task_id=row.id, reason=str(error))
        return False
    return True


def kept_orders(services: Services) -> list[str]:
    """The ids of all orders on S3. Raises `StorageError`."""
    found = services.state_s3.list_objects(services.buckets.state, ORDERS)
    return [info.key.removeprefix(ORDERS).removesuffix(RECORD_SUFFIX) for info in found]


def record_of(services: Services, job_id: str) -> JobRecord | None:
    """The record of a job; None before a worker has claimed it, or if it cannot be read.

    Raises:
        StorageError: S3 cannot be used.
    """
    try:
        version = RecordObject(
            services.state_s3, record_at(services.buckets.state, job_id), JobRecord
        ).read()
    except (DamagedRecord, NewerRecord) as error:
        log.warning("record_not_read", task_id=job_id, reason=str(error))
        return None
    return version.record if version else None


def is_cancelled(services: Services, job_id: str) -> bool:
    """Whether a request to cancel the job is there. Raises `StorageError`."""
    return services.state_s3.exists(cancel_file_at(services.buckets.state, job_id))


def is_paused(services: Services, job_id: str) -> bool:
    """Whether a request to pause the job is there. Raises `StorageError`."""
    return services.state_s3.exists(pause_file_at(services.buckets.state, job_id))


def restored(services: Services, job_id: str) -> tuple[JobRow | None, JobRecord | None]:
    """A job that the database does not know, from its order and its record.

    The row is not in the database yet. A job without an order of this API has the organisation that
    its record names; without one it belongs to the operator.

    Raises:
        StorageError: S3 cannot be used.
    """
    record = record_of(services, job_id)
    row = _from_order(services, job_id) or _from_record(services, record)
    return row, record


def _from_order(services: Services, job_id: str) -> JobRow | None:
    try:
        stored = services.state_s3.read(order_at(services.buckets.state, job_id))
        values: dict[str, Any] = json.loads(stored.body)
        kept = {name: values[name] for name in _KEPT}
        body = base64.b64decode(values["message"])
    except ObjectNotFound:
        return None
    except (ValueError, LookupError, TypeError) as error:
        log.warning("order_not_read", task_id=job_id, reason=repr(error))
        return None
    trace = carried(values.get("trace_headers") or {})
    return new_row(message=body, status="queued", order_kept_at=now(), trace_headers=trace, **kept)


def _from_record(services: Services, record: JobRecord | None) -> JobRow | None:
    if record is None:
        return None
    try:
        job = messages.from_understood(services.kinds.of(record.kind), record.message)
    except (ValueError, NewerRecord) as error:
        log.warning("record_not_understood", task_id=record.task_id, reason=str(error))
        return None
    return new_row(
        id=record.task_id,
        org_id=job.org_id,
        kind=record.kind,
        subject=record.subject,
        message=job.body,
        min_level=record.min_level,
        status="queued",
        created_at=now(),
        order_kept_at=now(),
    )


def new_row(**values: Any) -> JobRow:
    """A row with the values that a job has at its beginning."""
    begin: dict[str, Any] = {
        "org_id": None,
        "tags": [],
        "job_metadata": {},
        "base_model": "",
        "training_files": [],
        "validation_files": [],
        "parameters": {},
        "hyperparameters": {},
        "min_level": 0,
        "trace_headers": {},
        "priority": 0,
        "sequence": 0,
        "progress": {},
        "attempts": 0,
        "result": {},
        "heard_at": now(),
    }
    return JobRow(**(begin | values))


def ending_of(record: JobRecord) -> tuple[str, dict[str, Any], str] | None:
    """The ending of a record as news: `complete` or `failed`, its body, and its webhook id."""
    ending = record.ending
    if record.state is not State.ENDED or ending is None:
        return None
    kind = "complete" if ending.kind is EndingKind.COMPLETE else "failed"
    return kind, cleaned(ending.body), ending.webhook_id
