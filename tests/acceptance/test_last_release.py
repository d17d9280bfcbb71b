"""A worker of the last release and one of this share queues, records, checkpoints and endings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox.backend import COMPLETE, Answer
from sandbox.worker_process import ROOT, WorkerProcess
from tests.acceptance.world import World, log_lines, until
from tests.releases import LAST_RELEASE, extract


@pytest.fixture(name="releases", scope="module")
def _releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each release's program."""
    folder = extract(LAST_RELEASE, tmp_path_factory.mktemp("last-release"))
    return {"last": folder, "this": ROOT}


@pytest.mark.timeout(400)
def test_each_release_finishes_and_delivers_the_jobs_of_the_other(
    apart: World, releases: dict[str, Path]
) -> None:
    """The last release, this one and again the last release work one after the other.

    This is a rolling update that is taken back.
    """
    begun = [apart.envelope(style_id=61 + each, parameters={"epochs": 24}) for each in range(2)]
    parked = [apart.envelope(style_id=63 + each) for each in range(2)]
    with apart.worker_of(releases["last"], ENDING_RETRY_DELAYS_SECONDS="2") as one:
        _leave(apart, one, parked[0], begun[0])
    with apart.worker_of(releases["this"], ENDING_RETRY_DELAYS_SECONDS="2") as two:
        _assert_finished(apart, two, parked[0], begun[0])
        _leave(apart, two, parked[1], begun[1])
    with apart.worker_of(releases["last"], ENDING_RETRY_DELAYS_SECONDS="2") as three:
        _assert_finished(apart, three, parked[1], begun[1])
        apart.publish(begun[0])  # a duplicate, for the release that began the job
        until(lambda: log_lines(three, "job_ended_before"))
        until(lambda: apart.waiting(apart.queue) == 0)
        assert three.stop() == 0
    assert all(len(apart.backend.endings(each["task_id"])) == 1 for each in begun)


def _leave(
    world: World, worker: WorkerProcess, parked: dict[str, Any], begun: dict[str, Any]
) -> None:
    """Stop the worker while the backend refuses one job's ending and another job trains."""
    world.backend.answer = lambda request: (
        Answer(503) if request.path == COMPLETE and request.task_id == parked["task_id"] else None
    )
    try:
        world.publish(parked)
        until(lambda: _record(world, parked).get("delivery") == "pending")
        world.publish(begun)
        until(lambda: _record(world, begun).get("checkpoints"))
        assert worker.stop() == 0
    finally:
        world.backend.answer = None
    assert _record(world, begun)["checkpoints"][-1]["epoch"] < 24


def _assert_finished(
    world: World, worker: WorkerProcess, parked: dict[str, Any], begun: dict[str, Any]
) -> None:
    """The parked ending is delivered, and the job goes on at its last checkpoint."""
    reached = _record(world, begun)["checkpoints"][-1]["epoch"]
    assert world.ending(parked["task_id"])[0] == "complete"
    kind, ending = world.ending(begun["task_id"])
    assert (kind, ending["training_metric"]["epochs"]) == ("complete", 24)
    until(lambda: _record(world, parked)["delivery"] == "delivered")
    until(lambda: _record(world, begun)["delivery"] == "delivered")
    started = [(each["task_id"], each["epoch"]) for each in log_lines(worker, "training_started")]
    assert started == [(begun["task_id"], reached)]


def _record(world: World, message: dict[str, Any]) -> dict[str, Any]:
    """The job's record; empty before there is one."""
    task_id = message["task_id"]
    return world.record(task_id) if world.keys(world.state, f"jobs/{task_id}.json") else {}


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
