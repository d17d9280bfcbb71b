"""A worker of the last release and one of this share queues, records, checkpoints and endings."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.backend import COMPLETE, Answer
from sandbox.worker_process import ROOT
from tests.acceptance.world import World, log_lines, until
from tests.releases import LAST_RELEASE, extract


@pytest.fixture(name="releases", scope="module")
def _releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each release's program."""
    folder = extract(LAST_RELEASE, tmp_path_factory.mktemp("last-release"))
    return {"last": folder, "this": ROOT}


@pytest.mark.parametrize(("first", "second"), [("last", "this"), ("this", "last")])
def test_a_job_that_one_release_began_is_finished_by_the_other(
    apart: World, releases: dict[str, Path], first: str, second: str
) -> None:
    style_id = 61 if first == "last" else 62
    message = apart.envelope(style_id=style_id, parameters={"epochs": 24})
    task_id = message["task_id"]
    with apart.worker_of(releases[first]) as one:
        apart.publish(message)
        until(lambda: apart.keys(apart.state, f"jobs/{task_id}.json"))
        until(lambda: apart.record(task_id)["checkpoints"])
        assert one.stop() == 0
    reached = apart.record(task_id)["checkpoints"][-1]["epoch"]
    assert reached < 24
    with apart.worker_of(releases[second]) as two:
        kind, ending = apart.ending(task_id)
        assert (kind, ending["training_metric"]["epochs"]) == ("complete", 24)
        assert [each["epoch"] for each in log_lines(two, "training_started")] == [reached]
        until(lambda: apart.record(task_id)["delivery"] == "delivered")
        assert two.stop() == 0
    with apart.worker_of(releases[first]) as one:
        apart.publish(message)  # a duplicate, for the release that began
        until(lambda: log_lines(one, "job_ended_before"))
        until(lambda: apart.waiting(apart.queue) == 0)
    assert len(apart.backend.endings(task_id)) == 1


@pytest.mark.parametrize(("first", "second"), [("last", "this"), ("this", "last")])
def test_an_ending_that_one_release_parked_is_delivered_by_the_other(
    apart: World, releases: dict[str, Path], first: str, second: str
) -> None:
    style_id = 63 if first == "last" else 64
    message = apart.envelope(style_id=style_id)
    task_id = message["task_id"]
    apart.backend.answer = lambda request: (
        Answer(503) if request.path == COMPLETE and request.task_id == task_id else None
    )
    try:
        with apart.worker_of(releases[first], ENDING_RETRY_DELAYS_SECONDS="2") as one:
            apart.publish(message)
            until(lambda: apart.keys(apart.state, f"jobs/{task_id}.json"))
            until(lambda: apart.record(task_id)["delivery"] == "pending")
            assert one.stop() == 0
    finally:
        apart.backend.answer = None
    with apart.worker_of(releases[second], ENDING_RETRY_DELAYS_SECONDS="2") as two:
        assert apart.ending(task_id)[0] == "complete"
        until(lambda: apart.record(task_id)["delivery"] == "delivered")
        assert not log_lines(two, "training_started")


def test_workers_of_both_releases_take_jobs_from_one_queue(
    apart: World, releases: dict[str, Path]
) -> None:
    messages = [apart.envelope(style_id=65 + number) for number in range(4)]
    with apart.worker_of(releases["last"]) as one, apart.worker_of(releases["this"]) as two:
        until(lambda: log_lines(one, "consuming") and log_lines(two, "consuming"))
        for message in messages:
            apart.publish(message)
        for message in messages:
            assert apart.ending(message["task_id"])[0] == "complete"
        began = [len(log_lines(worker, "training_started")) for worker in (one, two)]
        assert sum(began) == 4
        assert all(began)
