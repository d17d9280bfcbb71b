"""Jobs that are longer than the broker's time-outs, and processes that die."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil
import pytest

from sandbox.worker_process import ROOT, WorkerProcess
from tests.acceptance.world import World, log_lines, until


def test_a_job_longer_than_the_heartbeat_and_the_delivery_ack_timeout_is_trained_once(
    world: World, worker: WorkerProcess
) -> None:
    """The broker takes the message back after 5 s, and hands it out again while the job trains."""
    message = world.envelope(style_id=21, parameters={"epochs": 1000})
    task_id = message["task_id"]
    world.publish(message)
    until(lambda: _started(worker, task_id))
    time.sleep(9)
    world.s3.put_object(Bucket=world.state, Key=f"jobs/{task_id}.cancel", Body=b"")
    kind, ending = world.ending(task_id)
    assert (kind, ending["error_code"]) == ("failed", "CANCELLED")
    until(lambda: world.waiting(world.queue) == 0)
    assert len(log_lines(worker, "broker_lost")) == 0, "heartbeats went on"
    assert len(_started(worker, task_id)) == 1
    assert len({each.webhook_id for each in world.backend.endings(task_id)}) == 1


def test_a_killed_trainer_is_reported_clearly_and_its_job_resumes_at_the_last_checkpoint(
    world: World, worker: WorkerProcess
) -> None:
    message = world.envelope(style_id=22, parameters={"epochs": 24})
    task_id = message["task_id"]
    world.publish(message)
    until(lambda: world.keys(world.state, f"checkpoints/style_22/{task_id}/"))
    until(lambda: world.record(task_id)["checkpoints"])
    trainer = _trainer(worker)
    assert trainer
    trainer.kill()
    kind, ending = world.ending(task_id)
    assert kind == "complete"
    retried = [
        each for each in log_lines(worker, "job_will_be_tried_again") if each["task_id"] == task_id
    ]
    assert len(retried) == 1
    assert retried[0]["code"] == "WORKER_CRASHED" and "SIGKILL" in retried[0]["reason"]
    assert _started(worker, task_id)[1]["epoch"] >= 2
    assert ending["training_metric"]["epochs"] == 24
    next_job = world.envelope(style_id=23)
    world.publish(next_job)
    assert world.ending(next_job["task_id"])[0] == "complete"


def test_ctrl_c_reaches_the_worker_and_not_its_trainer(apart: World) -> None:
    with apart.worker() as worker:
        trainer = until(lambda: _trainer(worker))
        time.sleep(1)
        assert os.getsid(trainer.pid) != os.getsid(worker.pid)
        trainer.send_signal(signal.SIGINT)
        trainer.send_signal(signal.SIGTERM)
        time.sleep(1)
        ended = worker.exit_code
        assert trainer.is_running() and ended is None
        os.kill(worker.pid, signal.SIGINT)
        until(lambda: worker.exit_code is not None, 20)
        assert worker.exit_code == 0
        trainer.wait(5)


def test_a_worker_under_nohup_survives_its_terminal(apart: World) -> None:
    with apart.worker_of(ROOT, launcher=["nohup"]) as worker:
        until(lambda: log_lines(worker, "consuming"))
        os.kill(worker.pid, signal.SIGHUP)
        time.sleep(1)
        assert worker.exit_code is None
        assert worker.stop() == 0


@pytest.mark.timeout(400)
def test_another_worker_continues_from_the_checkpoint(apart: World) -> None:
    """A killed worker loses what came after its last checkpoint.

    A worker that is stopped, here by its terminal, loses nothing. The trainer of both ends
    within seconds, and the job is trained to its end once.
    """
    message = apart.envelope(style_id=24, parameters={"epochs": 60})
    task_id = message["task_id"]
    with apart.worker() as first:
        apart.publish(message)
        until(lambda: apart.keys(apart.state, f"jobs/{task_id}.json"))
        until(lambda: apart.record(task_id)["checkpoints"])
        trainer = until(lambda: _trainer(first))
        os.kill(first.pid, signal.SIGKILL)
        trainer.wait(5)
    killed_at = apart.record(task_id)["checkpoints"][-1]
    with apart.worker(SHUTDOWN_GRACE_SECONDS="8") as second:
        until(lambda: apart.record(task_id)["checkpoints"][-1]["epoch"] > killed_at["epoch"])
        trainer = until(lambda: _trainer(second))
        for _ in range(2):  # from the kernel and from the shell: the second must not cut it short
            os.kill(second.pid, signal.SIGHUP)
        until(lambda: second.exit_code is not None, 20)
        assert second.exit_code == 0, second.last_words(20)
        trainer.wait(5)
        stopped_at = apart.record(task_id)["checkpoints"][-1]
        assert apart.record(task_id)["hold"]["released"] is True
        saved = [each["checkpoint"] for each in log_lines(second, "checkpoint_saved")]
        assert stopped_at["name"] == saved[-1]
    with apart.worker() as third:
        kind, ending = apart.ending(task_id)
        assert kind == "complete" and ending["training_metric"]["epochs"] == 60
        assert third.stop() == 0
    resumed = [log_lines(worker, "training_started")[0]["epoch"] for worker in (second, third)]
    assert resumed == [killed_at["epoch"], stopped_at["epoch"]]
    assert len(_started(second, task_id)) == len(_started(third, task_id)) == 1
    sequences = [
        each.body["sequence"]
        for each in (*apart.backend.progress(task_id), *apart.backend.endings(task_id))
    ]
    assert sequences == sorted(sequences)


def _started(worker: WorkerProcess, task_id: str) -> list[dict[str, Any]]:
    """The log's lines of the job's runs."""
    return [each for each in log_lines(worker, "training_started") if each["task_id"] == task_id]


def _trainer(worker: WorkerProcess) -> psutil.Process | None:
    """The worker's child that trains."""
    children = psutil.Process(worker.pid).children()
    return next((each for each in children if "--runs-fd" in each.cmdline()), None)
