"""Files that an ended job no longer needs are deleted, also if its worker could not do it."""

from __future__ import annotations

import functools

from consumer.life.checkpoint_uploads import clear_up
from jobs.addresses import S3Location
from sandbox.s3_server import S3Server
from services.records.sweep import RecordSweep
from services.s3.s3_service import S3Service
from tests.integration.services.record_world import (
    BUCKET,
    access,
    claimed,
    request,
    settle,
    worker,
)
from tests.integration.services.s3_proxy import S3Proxy, impatient, once, refusal
from tests.unit.jobs.message_samples import all_kinds


def test_files_that_remained_after_the_ending_are_removed_by_a_later_sweep() -> None:
    with S3Server() as server, S3Proxy(server.endpoint) as proxy:
        server.create_bucket(BUCKET)
        s3 = S3Service(**access(server.endpoint))
        job = request()
        settle(claimed(worker(s3), job))
        weights = f"checkpoints/style_7/{job.task_id}/epoch-0002/lora.safetensors"
        mark = f"jobs/{job.task_id}.settled"
        unneeded = (weights.replace("lora", "optimizer"), f"staging/{job.task_id}/1/samples.png")
        for key in (weights, *unneeded):
            s3.write(S3Location(BUCKET, key), b"of a checkpoint")
        through_proxy = impatient(proxy.endpoint, attempts=1)
        sweep = RecordSweep(
            through_proxy,
            BUCKET,
            lease_seconds=1.0,
            clear_up=functools.partial(clear_up, through_proxy, BUCKET, kinds=all_kinds()),
        )
        proxy.fault = once(refusal(503, "SlowDown"), "POST")  # S3 deletes several by a POST
        assert not list(sweep.abandoned())
        assert {weights, *unneeded} < _keys(s3) and mark not in _keys(s3)
        assert not list(sweep.abandoned())
        assert {weights, mark} < _keys(s3) and not _keys(s3).intersection(unneeded)


def _keys(s3: S3Service) -> set[str]:
    return {found.key for found in s3.list_objects(BUCKET, "")}
