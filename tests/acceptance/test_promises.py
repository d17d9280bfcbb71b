"""Promises about queue and time, on real servers.

The cost of duplicates, messages for a newer worker, and the time limit of a job.
"""

from __future__ import annotations

import time

from jobs.record import PROTOCOL_LEVEL
from services.broker.settlement import MIN_LEVEL
from tests.acceptance.world import World, log_lines, until


def test_a_duplicate_of_a_running_job_stays_off_the_training_queue(apart: World) -> None:
    message = apart.envelope(style_id=81, parameters={"epochs": 200})
    task_id = message["task_id"]
    with apart.worker() as one, apart.worker() as two:
        until(lambda: log_lines(one, "consuming") and log_lines(two, "consuming"))
        apart.publish(message)
        until(lambda: apart.keys(apart.state, f"jobs/{task_id}.json"))
        apart.publish(message)
        until(lambda: log_lines(one, "job_held_elsewhere") + log_lines(two, "job_held_elsewhere"))
        deadline = time.monotonic() + 7  # longer than a lease
        while time.monotonic() < deadline and not apart.backend.endings(task_id):
            assert apart.waiting(apart.queue) <= 1, "the job's own message, in its worker's hands"
            time.sleep(0.5)
        apart.s3.put_object(Bucket=apart.state, Key=f"jobs/{task_id}.cancel", Body=b"")
        assert apart.ending(task_id)[1]["error_code"] == "CANCELLED"
        until(lambda: apart.waiting(f"{apart.queue}.endings") == 0)
        until(lambda: apart.waiting(apart.queue) == 0)
        held = log_lines(one, "job_held_elsewhere") + log_lines(two, "job_held_elsewhere")
        # The duplicate, and perhaps the job's own message, which this broker takes back after 5 s.
        assert len(held) <= 2
        assert len(apart.backend.endings(task_id)) == 1


def test_a_message_that_needs_a_newer_worker_waits_for_one(apart: World) -> None:
    message = apart.envelope(style_id=82, parameters={"only_the_new_version_knows": 1})
    task_id = message["task_id"]
    with apart.worker() as worker:
        apart.publish(message, headers={MIN_LEVEL: PROTOCOL_LEVEL + 1})
        until(lambda: len(log_lines(worker, "message_put_off")) >= 2)
        next_job = apart.envelope(style_id=83)
        apart.publish(next_job)
        assert apart.ending(next_job["task_id"])[0] == "complete"
        told = log_lines(worker, "message_put_off")
        assert {each["why"] for each in told} == {"newer_message"}
        assert [each["put_offs"] for each in told] == list(range(1, len(told) + 1))
        assert apart.take(f"{apart.queue}.dead") is None
        assert not apart.backend.endings(task_id)


def test_the_time_limit_counts_what_all_workers_have_spent(apart: World) -> None:
    message = apart.envelope(style_id=85, parameters={"epochs": 40})
    task_id = message["task_id"]
    with apart.worker() as first:
        apart.publish(message)
        until(lambda: apart.keys(apart.state, f"jobs/{task_id}.json"))
        until(lambda: apart.record(task_id)["checkpoints"])
        time.sleep(1.5)
        assert first.stop() == 0
    spent = apart.s3.head_object(Bucket=apart.state, Key=f"jobs/{task_id}.json")["Metadata"]
    assert float(spent["seconds-run"]) >= 1.5
    with apart.worker(MAX_JOB_SECONDS="1.5") as second:
        kind, ending = apart.ending(task_id)
        assert (kind, ending["error_code"]) == ("failed", "TIME_LIMIT")
        assert not log_lines(second, "training_started")
