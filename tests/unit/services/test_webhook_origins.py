"""An origin that a message names and no setting allows: one log line per job."""

from __future__ import annotations

from structlog.testing import capture_logs

from services.webhooks.webhook_service import WebhookService
from utils import logger

BACKEND = "https://backend.example"
NAMED = "http://10.0.0.5:8443/api/webhooks/training/1/status?token=secret"


def _service() -> WebhookService:
    return WebhookService(
        backend_url=BACKEND,
        allowed_origins=(),
        token="t" * 32,
        signing_secrets=("whsec_" + "A" * 32,),
    )


def test_a_refused_origin_is_reported_once_a_job_with_its_port() -> None:
    webhooks = _service()
    with capture_logs() as lines:
        for task_id in ("one", "one", "two"):
            with logger.bound(task_id=task_id):
                assert webhooks.origin_for(NAMED) == BACKEND
        with logger.bound(task_id="one"):
            webhooks.origin_for("http://10.0.0.5:9000")
    assert [line["named"] for line in lines] == [
        "http://10.0.0.5:8443",
        "http://10.0.0.5:8443",
        "http://10.0.0.5:9000",
    ]
    assert "secret" not in repr(lines)


def test_a_worker_remembers_a_limited_number_of_jobs() -> None:
    webhooks = _service()
    for number in range(1000):
        webhooks.origin_for(f"http://10.0.0.5:{number + 1}")
    assert len(webhooks._warned) <= 100  # pylint: disable=protected-access
