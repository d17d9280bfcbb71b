"""News of workers: each changes a job once, and never back.

A job's `sequence` is that of its newest news. Older news is dropped, and so is progress after an
ending. A higher ending replaces a lower one: an operator has sent the job back, and it has ended
again.
"""

from __future__ import annotations

import math
from typing import Any

from sqlalchemy import delete, select

from api.gate.cleaning import cleaned
from api.life import ledger
from api.life.orders import model_id_of
from api.services import Services
from api.store import jobs as store
from api.store.database import Writing, now
from api.store.tables import ENDED, EventRow, JobRow, MetricRow, ModelRow, ReceiptRow
from jobs.layout import place_of
from jobs.record import SEQUENCES_PER_CLAIM, JobRecord
from utils.logger import get_logger

log = get_logger(__name__)

PROGRESS, COMPLETE, FAILED = "progress", "complete", "failed"
MAX_MESSAGE = 4000
PAUSED_STAGE = "paused"
_NUMBERS = ("loss", "learning_rate", "validation_loss", "perplexity", "rate", "accuracy")


def take(services: Services, kind: str, body: dict[str, Any], webhook_id: str) -> dict[str, Any]:
    """Apply news of a job, once.

    Args:
        kind: `PROGRESS`, `COMPLETE` or `FAILED`.
        body: The webhook's body.
        webhook_id: The same for each repetition of the news.

    Returns:
        The answer: `{"cancel": true}` and `{"pause": true}` are for the worker.

    Raises:
        DatabaseAway, StorageError: The worker sends it again.
    """
    body = cleaned(body)
    task_id = body.get("task_id")
    if not isinstance(task_id, str):
        return {"status": "ok"}

    def apply(session: Writing) -> dict[str, Any] | None:
        row = store.locked(session, task_id)
        if row is None:
            return None
        sequence = body.get("sequence")
        sequence = sequence if isinstance(sequence, int) else 0
        if session.get(ReceiptRow, webhook_id) is None:
            applied = change(session, services, row, kind, body, sequence)
            session.add(
                ReceiptRow(
                    webhook_id=webhook_id,
                    job_id=task_id,
                    kind=kind,
                    sequence=sequence,
                    received_at=now(),
                    applied=int(applied),
                )
            )
            row.heard_at = now()
        return wishes(row)

    answer = services.database.write(apply)
    if answer is None and adopt(services, task_id):
        answer = services.database.write(apply)
    if answer is None:
        log.warning("news_of_unknown_job", task_id=task_id, kind=kind)
    services.wake.set()
    return {"status": "ok"} | (answer or {})


def wishes(row: JobRow) -> dict[str, Any]:
    """The requests that the answer to a worker carries."""
    if row.status in ENDED:
        return {}
    asked: dict[str, Any] = {}
    if row.cancel_requested_at is not None:
        asked["cancel"] = True
    elif row.pause_requested_at is not None:
        asked["pause"] = True
    return asked


def adopt(services: Services, job_id: str) -> bool:
    """Add a job that the database does not know, from S3. Returns whether it is known now.

    Raises:
        StorageError: S3 cannot be used.
    """
    row, record = ledger.restored(services, job_id)
    if row is None:
        return False

    def add(session: Writing) -> None:
        if store.locked(session, job_id) is not None:
            return
        claimed = record is not None
        row.admitted_at = now() if claimed else None
        session.add(row)
        session.note(store.event(row.id, row.org_id, "Job restored from its record", level="warn"))
        if not claimed:
            store.put_out(session, row)

    services.database.write(add)
    log.warning("job_adopted", task_id=job_id, org_id=row.org_id, claimed=record is not None)
    if record is not None:
        follow_record(services, job_id, record)
    return True


def follow_record(services: Services, job_id: str, record: JobRecord) -> bool:
    """Give a job the state of its record. Returns whether the ending was news."""
    ending = ledger.ending_of(record)
    if ending is not None:
        kind, body, webhook_id = ending
        before = _status(services, job_id)
        take(services, kind, body | {"task_id": job_id}, webhook_id)
        return _status(services, job_id) != before

    def hear(session: Writing) -> None:
        row = store.locked(session, job_id)
        if row is None or row.status in ENDED:
            return
        row.heard_at = now()
        if record.is_paused:
            if row.status != "paused" and row.pause_requested_at is not None:
                rest(session, row)
        elif row.status == "queued" and record.hold.claim:
            row.status, row.started_at = "running", row.started_at or now()
            row.admitted_at = row.admitted_at or now()
            store.note_state(session, row.id, row.org_id, "running", "Job started")

    services.database.write(hear)
    return False


def _status(services: Services, job_id: str) -> str | None:
    with services.database.reading() as session:
        return session.scalar(select(JobRow.status).where(JobRow.id == job_id))


def change(
    session: Writing,
    services: Services,
    row: JobRow,
    kind: str,
    body: dict[str, Any],
    sequence: int,
) -> bool:
    """Apply one piece of news to a locked job. Returns whether it was news."""
    if sequence <= row.sequence:
        return False
    if kind == PROGRESS:
        if row.status in ENDED:
            return False
        _progress(session, row, body, sequence)
    elif kind == COMPLETE:
        _complete(session, services, row, body)
    else:
        _failed(session, row, body)
    row.sequence = sequence
    return True


def _progress(session: Writing, row: JobRow, body: dict[str, Any], sequence: int) -> None:
    progress = body.get("progress")
    progress = progress if isinstance(progress, dict) else {}
    stage = str(progress.get("stage") or "training")
    has_new_samples = progress.get("samples") not in (None, row.progress.get("samples"))
    row.progress = progress
    row.attempts = sequence // SEQUENCES_PER_CLAIM
    if stage == PAUSED_STAGE:
        rest(session, row)
    else:
        _run(session, row, "waiting" if stage == "queued" else stage)
    if has_new_samples:
        session.note(store.event(row.id, row.org_id, "Samples of a checkpoint are ready"))
    _metrics(session, row, progress, sequence // SEQUENCES_PER_CLAIM)


def rest(session: Writing, row: JobRow) -> None:
    """A worker has saved the job and put it down: no message points to it now."""
    resumed = row.status == "queued" and row.started_at is not None
    row.started_at = row.started_at or now()
    if row.cancel_requested_at is not None:
        # The request came too late for that worker. Another one ends the job.
        store.put_out_again(session, row)
    elif not resumed:  # else its next message waits or is with the broker
        row.status, row.stage, row.admitted_at = "paused", PAUSED_STAGE, None
        store.note_state(session, row.id, row.org_id, "paused", "Job paused")


def _run(session: Writing, row: JobRow, stage: str) -> None:
    """A worker has the job."""
    before, stage_before = row.status, row.stage
    if row.admitted_at is None:
        # It was resumed before its worker had put it down, and needs no further message.
        row.admitted_at = now()
        store.drop_waiting(session, row.id)
    row.status = "running" if row.pause_requested_at is None else "pausing"
    row.stage = stage
    row.started_at = row.started_at or now()
    if row.status != before:
        said = "Job is pausing" if row.status == "pausing" else "Job started"
        store.note_state(session, row.id, row.org_id, row.status, said)
    elif row.stage != stage_before:
        session.note(store.event(row.id, row.org_id, f"Stage: {row.stage}"))


def _metrics(session: Writing, row: JobRow, progress: dict[str, Any], claim: int) -> None:
    numbers = {
        name: progress[name]
        for name in _NUMBERS
        if isinstance(progress.get(name), (int, float)) and not isinstance(progress[name], bool)
    }
    step = progress.get("step", progress.get("current_epoch"))
    if not numbers or not isinstance(step, int) or isinstance(step, bool):
        return
    loss, validation = numbers.get("loss"), numbers.get("validation_loss")
    row.loss = row.loss if loss is None else float(loss)
    if validation is not None:
        best = math.inf if row.best_validation_loss is None else row.best_validation_loss
        row.best_validation_loss = min(float(validation), best)
    point = session.get(MetricRow, (row.id, claim, step))
    if point is not None:
        point.numbers = numbers
        return
    # A later claim begins at a checkpoint: points of earlier claims beyond it were done again.
    first_of_claim = session.scalar(
        select(MetricRow.step).where(MetricRow.job_id == row.id, MetricRow.claim == claim).limit(1)
    )
    if first_of_claim is None:
        session.execute(
            delete(MetricRow).where(
                MetricRow.job_id == row.id, MetricRow.claim < claim, MetricRow.step >= step
            )
        )
    epoch = progress.get("epoch", progress.get("current_epoch"))
    session.add(
        MetricRow(
            job_id=row.id,
            claim=claim,
            step=step,
            epoch=float(epoch) if isinstance(epoch, (int, float)) else None,
            at=now(),
            numbers=numbers,
        )
    )
    data = {"step": step, "total_steps": progress.get("total_steps"), **numbers}
    said = ", ".join(f"{name}={value}" for name, value in numbers.items())
    session.note(
        EventRow(
            job_id=row.id,
            org_id=row.org_id,
            at=now(),
            level="info",
            type="metrics",
            message=f"Step {step}: {said}",
            data=data,
        )
    )


def _complete(session: Writing, services: Services, row: JobRow, body: dict[str, Any]) -> None:
    at = now()
    row.status, row.stage, row.finished_at = "succeeded", None, at
    row.started_at = row.started_at or at
    row.error_code = row.error_message = None
    row.cancel_requested_at = row.pause_requested_at = None
    row.result = {
        name: value for name, value in body.items() if name not in ("task_id", "sequence")
    }
    row.model_id = model_id_of(row.base_model, row.org_id, row.suffix or row.name, row.id)
    if session.get(ModelRow, row.model_id) is None:
        kind = services.kinds.of(row.kind)
        session.add(
            ModelRow(
                id=row.model_id,
                org_id=row.org_id,
                kind=row.kind,
                job_id=row.id,
                base_model=row.base_model,
                bucket=services.buckets.models,
                prefix=place_of(row.kind, row.subject, row.id).models,
                main_file=kind.last_file,
                created_at=at,
            )
        )
    session.note(store.event(row.id, row.org_id, f"New fine-tuned model created: {row.model_id}"))
    store.note_state(session, row.id, row.org_id, "succeeded", "The job has successfully completed")


def _failed(session: Writing, row: JobRow, body: dict[str, Any]) -> None:
    code = str(body.get("error_code") or "TRAINING_FAILED")[:255]
    row.status = "cancelled" if code == "CANCELLED" else "failed"
    row.stage, row.finished_at = None, now()
    row.error_code = code
    row.error_message = str(body.get("error_message") or "")[:MAX_MESSAGE]
    row.cancel_requested_at = row.pause_requested_at = None
    row.result = {"retryable": body.get("retryable"), "attempts": body.get("attempts")}
    if row.status == "cancelled":
        store.note_state(session, row.id, row.org_id, "cancelled", "Job cancelled")
        return
    said = f"Job failed: {row.error_message} ({code})"
    store.note_state(session, row.id, row.org_id, "failed", said, level="error")
