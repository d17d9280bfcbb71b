"""The state of a job in words, and what to do about a failure."""

from __future__ import annotations

from typing import Any

from api.page.catalogue import Texts
from api.page.rendering import duration
from api.store.database import now


def state_of(job: dict[str, Any]) -> str:
    """The state that decides the colour and the actions of a job."""
    status = str(job["status"])
    if job["cancel_requested"] and status in ("queued", "running", "pausing"):
        return "cancelling"
    return status


def sentence(job: dict[str, Any], texts: Texts) -> str:
    """The state of a job as a sentence.

    Args:
        job: A job as the API shows it.
        texts: The language.
    """
    state = state_of(job)
    if state == "queued" and job["queue_position"]:
        start = job["estimated_start"]
        if start is None:
            return texts("sentence.place", place=job["queue_position"])
        wait = duration(start - now(), texts)
        return texts("sentence.place_and_time", place=job["queue_position"], wait=wait)
    if state == "running":
        left = job["progress"].get("estimated_seconds") or None
        stage = texts.known(f"stage.{job['stage']}", "stage.training")
        if left is None or job["stage"] != "training":
            return stage
        return texts("sentence.stage_and_time", stage=stage, left=duration(left, texts))
    if state == "succeeded" and job["started_at"] and job["finished_at"]:
        taken = duration(job["finished_at"] - job["started_at"], texts)
        return texts("sentence.succeeded", taken=taken)
    return texts.known(f"sentence.{state}", "sentence.queued")


def percent_of(job: dict[str, Any]) -> int | None:
    """The percentage that is done of a job at work; None for any other job."""
    if job["status"] not in ("running", "pausing", "paused"):
        return None
    given = job["progress"].get("progress_percent")
    return max(0, min(100, int(given))) if isinstance(given, (int, float)) else None


def remedy(job: dict[str, Any], texts: Texts) -> str:
    """The way out of a failure; empty for a job that has not failed."""
    if job["status"] != "failed":
        return ""
    code = (job["error"] or {}).get("code", "")
    return texts.known(f"remedy.{code}", "remedy.other")


def actions(job: dict[str, Any]) -> list[str]:
    """The acts that a job allows now."""
    state = state_of(job)
    if state in ("queued", "running", "validating_files"):
        return ["pause", "cancel"]
    if state in ("paused", "pausing"):
        return ["resume", "cancel"]
    return []


def shown(job: dict[str, Any], texts: Texts) -> dict[str, Any]:
    """A job with its words."""
    return job | {
        "state": state_of(job),
        "sentence": sentence(job, texts),
        "percent": percent_of(job),
        "remedy": remedy(job, texts),
        "actions": actions(job),
        "title": job["name"] or f"{job['kind']} {job['subject']}",
    }
