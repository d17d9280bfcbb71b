"""The worker opens one store if images, models and state share it, and two if not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumer.desk import Desk, open_desk
from consumer.life.stop_signal import Shutdown
from consumer.pages.observer import Observer
from services.broker.outbox import Outbox
from services.s3.s3_service import open_store
from tests.unit.environment import settings

pytestmark = pytest.mark.usefixtures("own_settings")

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


def _desk_of(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Desk:
    nothing = cast(Any, SimpleNamespace())
    loaded = settings(monkeypatch, **KEYS | environment)
    return open_desk(
        limits=loaded.limits,
        storage=loaded.storage,
        webhooks=loaded.webhooks,
        kinds=loaded.kinds(),
        state_s3=open_store(loaded.storage.state_store()),
        trainer=nothing,
        folders=nothing,
        shutdown=Shutdown(1.0),
        test_machine=lambda: None,
        machine_fails=lambda error: None,
        observer=Observer(),
        outbox=Outbox(),
    )


def test_models_are_archived_inside_the_store_if_there_is_only_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = _desk_of(monkeypatch)
    assert one.s3 is one.state_s3


def test_two_stores_are_two_services(monkeypatch: pytest.MonkeyPatch) -> None:
    two = _desk_of(monkeypatch, STATE_AWS_ENDPOINT_URL_S3="https://state.example.com")
    assert two.s3 is not two.state_s3
