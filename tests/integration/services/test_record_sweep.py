"""The sweep against a real S3 server: each abandoned job is found once, and nothing else."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from jobs.addresses import S3Location
from sandbox.s3_server import S3Server
from services.records.sweep import RecordSweep
from services.s3.s3_service import S3Service
from tests.integration.services.record_world import (
    BUCKET,
    Faulty,
    access,
    adopted,
    claimed,
    ending,
    request,
    settle,
    where,
    worker,
)


def test_the_sweep_finds_each_abandoned_job_once_and_nothing_else() -> None:
    with S3Server() as server:
        server.create_bucket(BUCKET)
        s3 = S3Service(**access(server.endpoint))
        counting = Faulty(server.endpoint)
        short = worker(s3, lease=0.5)
        abandoned, undelivered, finished, retrying, alive = (request() for _ in range(5))
        claimed(short, abandoned)
        claimed(short, undelivered).end(ending())
        settle(claimed(short, finished))
        claimed(short, retrying).release(count_attempt=True, quiet_seconds=60.0)
        s3.write(where("damaged"), b"{")
        # Were it not renewed, the live one would be found as well.
        with claimed(worker(s3, lease=1.5), alive):
            time.sleep(3 * 1.5 + 1.1)
            expected = {abandoned.task_id, undelivered.task_id}
            sweeps = [RecordSweep(one, BUCKET, lease_seconds=0.5) for one in (s3, counting)]
            with ThreadPoolExecutor(2) as pool:
                found = [
                    record
                    for part in pool.map(lambda one: list(one.abandoned()), sweeps)
                    for record in part
                ]
            assert {record.task_id for record in found} == expected
            assert len(found) == 2  # two sweeps at once share them
            counting.reads.clear()
            assert not list(sweeps[1].abandoned())
            assert where(finished.task_id).key not in counting.reads
        assert s3.exists(S3Location(BUCKET, f"jobs/{finished.task_id}.settled"))
        # A found job is free for any worker that gets its message, and the dead holder's attempt
        # counts.
        lease = claimed(worker(s3, "two"), abandoned)
        assert (lease.claim_number, lease.record.attempts) == (2, 1)
        assert adopted(worker(s3, "two"), undelivered.task_id).record.attempts == 0
