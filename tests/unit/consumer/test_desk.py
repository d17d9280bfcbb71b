"""The worker opens one store where images, models and state are in one, and two where not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from consumer import worker as desk
from consumer.life.stop_signal import Shutdown
from consumer.pages.observer import Observer
from consumer.pipeline import Desk
from services.broker.outbox import Outbox
from tests.unit.environment import settings

pytestmark = pytest.mark.usefixtures("own_settings")

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


def _desk_of(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Desk:
    nothing = cast(Any, SimpleNamespace())
    loaded = settings(monkeypatch, **KEYS | environment)
    # pylint: disable-next=protected-access
    return desk._desk(
        loaded,
        desk.open_state_s3(loaded),
        nothing,
        nothing,
        Shutdown(1.0),
        lambda error: None,
        Observer(),
        Outbox(),
    )


def test_models_are_archived_inside_the_storage_where_there_is_one_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = _desk_of(monkeypatch)
    assert one.s3 is one.state_s3


def test_two_stores_are_two_services(monkeypatch: pytest.MonkeyPatch) -> None:
    two = _desk_of(monkeypatch, STATE_AWS_ENDPOINT_URL_S3="https://state.example.com")
    assert two.s3 is not two.state_s3
