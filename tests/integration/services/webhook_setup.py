"""Tools of the webhook tests: a service with short time-outs, and samples of reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sandbox.backend import SIGNING_SECRET, TOKEN, Answer
from services.webhooks.webhook_service import EndingWebhook, RetrySchedule, WebhookService

REPORT = {"style_id": 1, "progress": {"current_epoch": 3, "total_epochs": 100}, "task_id": "t"}
ENDING = EndingWebhook(
    "failed", "msg_1", {"style_id": 1, "error_message": "no", "error_code": "X", "task_id": "t"}
)
QUICK = RetrySchedule(delays=(0.05, 0.1), slow_delays=(0.3,), jitter=0.0)


def service(url: str, **more: Any) -> WebhookService:
    """A service with the sandbox's secrets and short time-outs."""
    settings: dict[str, Any] = {
        "backend_url": url,
        "allowed_origins": (),
        "token": TOKEN,
        "signing_secrets": (SIGNING_SECRET,),
        "timeout": 2.0,
        "schedule": QUICK,
    }
    return WebhookService(**(settings | more))


def sequence(*answers: Answer) -> Callable[[Any], Answer]:
    """One answer after the other; the last one for ever."""
    left = list(answers)
    return lambda _request: left.pop(0) if len(left) > 1 else left[0]
