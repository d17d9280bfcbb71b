"""No job is taken before the state bucket has passed the test for conditional writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from consumer.life import state_guard
from consumer.life.state_guard import StateGuard
from consumer.pages.condition import Condition
from consumer.pages.observer import Observer
from sandbox.s3_server import S3Server
from tests.integration.services.s3_proxy import Fault, S3Proxy, always, impatient
from tests.unit.jobs.message_samples import style_kind
from utils.errors import ConfigurationError

CARELESS = Fault(careless=True)
DOWN = Fault(reset=True, forward=False)


@pytest.fixture(name="store")
def _store(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Proxy]:
    monkeypatch.setattr(state_guard, "RETRY_SECONDS", 0.05)
    with S3Proxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture(name="condition")
def _condition() -> Condition:
    condition = Condition(
        Observer(), threading.Event(), first_kind=style_kind(), base_model="base", queue="training"
    )
    condition.storage_tested(None)
    return condition


def _guard(
    store: S3Proxy, bucket: str, condition: Condition, *, allow_unguarded: bool = False
) -> StateGuard:
    return StateGuard(
        impatient(store.endpoint, attempts=1),
        bucket,
        allow_unguarded=allow_unguarded,
        report=condition.state_tested,
    )


def test_a_store_that_honours_conditions_is_taken_and_tested_once(
    store: S3Proxy, bucket: str, condition: Condition
) -> None:
    guard = _guard(store, bucket, condition)
    assert guard.wait(threading.Event())
    asked = len(store.requests)
    assert guard.test() and len(store.requests) == asked
    assert condition.ready()["checks"]["s3"] == "ok"


def test_an_unguarded_store_is_refused_with_a_remedy(
    store: S3Proxy, bucket: str, condition: Condition
) -> None:
    store.fault = always(CARELESS)
    with pytest.raises(ConfigurationError) as caught:
        _guard(store, bucket, condition).test()
    told = str(caught.value)
    assert "If-None-Match and If-Match" in told and bucket in told
    assert "ALLOW_UNGUARDED_STATE=true" in told and "STATE_AWS_ENDPOINT_URL_S3" in told


def test_an_allowed_unguarded_store_is_shown_on_the_status_pages(
    store: S3Proxy, bucket: str, condition: Condition
) -> None:
    store.fault = always(CARELESS)
    assert _guard(store, bucket, condition, allow_unguarded=True).wait(threading.Event())
    assert "s3" not in condition.problems()
    assert "run this worker only" in condition.ready()["checks"]["s3"]


def test_a_store_that_is_down_at_the_start_is_tested_once_it_answers(
    store: S3Proxy, bucket: str, condition: Condition
) -> None:
    store.fault = always(DOWN)
    guard = _guard(store, bucket, condition)
    assert guard.test() is False
    assert "could not be tested" in condition.problems()["s3"]
    back = threading.Timer(0.3, store.reset)
    back.start()
    assert guard.wait(threading.Event())
    back.join()
    assert "s3" not in condition.problems()


def test_a_store_that_returns_without_conditions_is_refused_then(
    store: S3Proxy, bucket: str, condition: Condition
) -> None:
    store.fault = always(DOWN)
    guard = _guard(store, bucket, condition)
    assert guard.test() is False
    store.fault = always(CARELESS)
    with pytest.raises(ConfigurationError):
        guard.wait(threading.Event())


def test_the_wait_ends_at_a_shutdown_and_at_its_time_limit(
    store: S3Proxy, bucket: str, condition: Condition
) -> None:
    store.fault = always(DOWN)
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    assert _guard(store, bucket, condition).wait(stop) is False
    assert _guard(store, bucket, condition).wait(threading.Event(), at_most=0.1) is False
