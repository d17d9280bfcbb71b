"""The worker and a state bucket that does not honour conditional writes."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import pytest

from sandbox.worker_process import WorkerProcess
from tests.acceptance.world import World, log_lines, until
from tests.integration.services.s3_proxy import Fault, S3Proxy, always

CARELESS = Fault(careless=True)
DOWN = Fault(reset=True, forward=False)


def _ready(worker: WorkerProcess) -> dict[str, Any]:
    """The page `/ready`, with any status."""
    line = until(lambda: log_lines(worker, "http_listening"))[0]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{line['port']}/ready", timeout=5) as page:
            return dict(json.load(page))
    except urllib.error.HTTPError as error:
        with error:
            return dict(json.load(error))


def test_a_worker_refuses_a_state_bucket_without_conditional_writes(apart: World) -> None:
    with S3Proxy(apart.s3_server.endpoint) as store:
        store.fault = always(CARELESS)
        with apart.worker(STATE_AWS_ENDPOINT_URL_S3=store.endpoint) as worker:
            until(lambda: worker.exit_code is not None)
            assert worker.exit_code == 2, worker.last_words(20)
            words = " ".join(worker.last_words(10).split())
    assert "ALLOW_UNGUARDED_STATE=true" in words and "Traceback" not in words
    assert not log_lines(
        worker, "trainer_started"
    ), "nothing is loaded for a worker that may not run"


@pytest.mark.parametrize("allowed", [False, True])
def test_no_job_is_taken_before_a_store_that_was_down_has_been_tested(
    apart: World, allowed: bool
) -> None:
    message = apart.envelope(style_id=91)
    apart.publish(message)
    with S3Proxy(apart.s3_server.endpoint) as store:
        store.fault = always(DOWN)
        with apart.worker(
            STATE_AWS_ENDPOINT_URL_S3=store.endpoint,
            ALLOW_UNGUARDED_STATE=str(allowed).lower(),
        ) as worker:
            until(lambda: log_lines(worker, "base_model_loaded"))
            assert "S3 could not be reached" in _ready(worker)["checks"]["s3"]
            assert not log_lines(worker, "consuming")
            store.fault = always(CARELESS)
            if allowed:
                until(lambda: log_lines(worker, "job_claimed"))
                assert "run this worker only" in until(
                    lambda: _ready(worker)["ready"] and _ready(worker)["checks"]["s3"]
                )
                assert log_lines(worker, "state_bucket_unsafe")[0]["level"] == "warning"
                assert worker.stop() == 0
                return
            until(lambda: worker.exit_code is not None)
            assert worker.exit_code == 2, worker.last_words(20)
            assert not log_lines(worker, "job_claimed")
    assert apart.waiting(apart.queue) == 1


def test_a_job_runs_with_images_and_models_in_one_store_and_its_state_in_another(
    apart: World,
) -> None:
    """Proxies in front of one server see the requests to each store."""
    message = apart.envelope(style_id=92, parameters={"epochs": 2})
    server = apart.s3_server.endpoint
    with S3Proxy(server) as images, S3Proxy(server) as state:
        with apart.worker(
            AWS_ENDPOINT_URL_S3=images.endpoint, STATE_AWS_ENDPOINT_URL_S3=state.endpoint
        ) as worker:
            apart.publish(message)
            kind, ending = apart.ending(message["task_id"])
            assert kind == "complete", ending
            assert worker.stop() == 0
        assert any(f"/{apart.state}/jobs/" in each for each in state.requests)
        assert any(f"/{apart.state}/checkpoints/" in each for each in state.requests)
        assert not [each for each in state.requests if f"/{apart.media}/training/" in each]
        assert any(f"/{apart.media}/training/" in each for each in images.requests)
        assert any(f"/{apart.media}/models/" in each for each in images.requests)
        for prefix in ("jobs", "checkpoints"):
            assert not [each for each in images.requests if f"/{apart.state}/{prefix}/" in each]
