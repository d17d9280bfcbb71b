"""Generated requests find no failure of the server and no answer that its description lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok

from tests.integration.api.world import Ground, World, running

PER_OPERATION = 20
# They wait for events, or ask other servers.
LEFT_OUT = ("/v1/events",)


@pytest.fixture(name="world", params=["sqlite", "postgresql"], scope="module")
def _world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("api")
    url = f"sqlite:///{folder / 'api.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").create_database("generated_requests")
    s3, broker = request.getfixturevalue("s3_server"), request.getfixturevalue("rabbitmq")
    limits = {"api_requests_per_minute": 10**6, "api_creates_per_minute": 10**6}
    with running(Ground(url, s3, broker, folder), **limits) as world:
        yield world


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_no_generated_request_makes_the_server_fail(world: World) -> None:
    world.worker().complete(world.order(), 1_000_001)
    schema = schemathesis.openapi.from_url(f"{world.url}/openapi.json")
    headers = {"Authorization": f"Bearer {world.key}"}
    failures: list[str] = []
    tried = 0
    for result in schema.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()
        if operation.path in LEFT_OUT:
            continue
        tried += 1

        @settings(
            max_examples=PER_OPERATION,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def send(case: Any) -> None:
            response = case.call(headers=headers, timeout=20)
            # 501 and 503 are answers of routes whose kinds of job do not exist yet.
            if response.status_code not in (501, 503, 507):
                case.validate_response(response, checks=[not_a_server_error])

        try:
            send()  # pylint: disable=no-value-for-parameter  # Hypothesis gives it
        except (AssertionError, BaseExceptionGroup) as error:
            failures.append(f"{operation.method} {operation.path}: {error!r}"[:2000])
    assert tried > 60
    assert not failures, "\n".join(failures)
