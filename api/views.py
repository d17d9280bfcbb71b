"""The JSON that clients see, in OpenAI's form with this server's own fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from api.store.tables import ENDED, EventRow, FileRow, JobRow, ModelRow


@dataclasses.dataclass(frozen=True, slots=True)
class QueueTurn:
    """The place of a job in the queue.

    Attributes:
        position: From 1.
        starts_at: When it is expected to start, in seconds since 1970; None before rates are
            measured.
    """

    position: int
    starts_at: float | None


def job(row: JobRow, turn: QueueTurn | None = None, *, notice: str | None) -> dict[str, Any]:
    """A job.

    Args:
        row: The job.
        turn: Its place in the queue, if it waits.
        notice: The sentence of this server about all its jobs (`API_NOTICE`).
    """
    error = None
    if row.error_code:
        error = {"code": row.error_code, "message": row.error_message or "", "param": None}
    hyper = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    return {
        "id": row.id,
        "object": "fine_tuning.job",
        "created_at": int(row.created_at),
        "finished_at": _whole(row.finished_at),
        "estimated_finish": _finish(row),
        "model": row.base_model,
        "fine_tuned_model": row.model_id,
        "organization_id": row.org_id or "",
        "status": row.status,
        "training_file": row.training_files[0] if row.training_files else "",
        "validation_file": row.validation_files[0] if row.validation_files else None,
        "hyperparameters": hyper | row.hyperparameters,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": hyper | row.hyperparameters},
        },
        "result_files": [],
        "trained_tokens": row.result.get("trained_tokens"),
        "error": error,
        "integrations": [],
        "metadata": row.job_metadata,
        "seed": row.seed or 0,
        "user_provided_suffix": row.suffix,
        "kind": row.kind,
        "subject": row.subject,
        "name": row.name,
        "tags": row.tags,
        "parameters": row.parameters,
        "training_files": row.training_files,
        "validation_files": row.validation_files,
        "priority": row.priority,
        "stage": row.stage,
        "progress": row.progress,
        "queue_position": turn.position if turn else None,
        "estimated_start": _whole(turn.starts_at) if turn else None,
        "started_at": _whole(row.started_at),
        "cancel_requested": row.cancel_requested_at is not None,
        "pause_requested": row.pause_requested_at is not None,
        "result": row.result,
        "notice": notice,
    }


def _finish(row: JobRow) -> int | None:
    left = row.progress.get("estimated_seconds")
    if row.status in ENDED or row.status != "running" or not isinstance(left, (int, float)):
        return None
    return int(row.heard_at + left) if left else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def event(row: EventRow) -> dict[str, Any]:
    """An event of a job."""
    return {
        "id": str(row.id),
        "object": "fine_tuning.job.event",
        "created_at": int(row.at),
        "level": row.level,
        "message": row.message,
        "type": "metrics" if row.type == "metrics" else "message",
        "data": row.data | ({"job_id": row.job_id} if row.type == "state" else {}),
    }


def event_stream(row: EventRow) -> bytes:
    """An event as a server-sent event; its id is the cursor."""
    data = json.dumps(event(row) | {"job_id": row.job_id}, ensure_ascii=False)
    return f"id: {row.id}\nevent: {row.type}\ndata: {data}\n\n".encode()


def file(row: FileRow) -> dict[str, Any]:
    """An uploaded file."""
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": int(row.created_at),
        "expires_at": _whole(row.expires_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": row.status,
        "status_details": None,
        "sha256": row.sha256,
    }


def model(row: ModelRow) -> dict[str, Any]:
    """A model that a job has made."""
    return {
        "id": row.id,
        "object": "model",
        "created": int(row.created_at),
        "owned_by": row.org_id or "operator",
        "kind": row.kind,
        "base_model": row.base_model,
        "job_id": row.job_id,
    }


def page(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """A page of a list."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }
