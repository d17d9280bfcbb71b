"""A job's event files on S3: up with its checkpoints, kept after its ending, fenced like them."""

from __future__ import annotations

from pathlib import Path

import pytest

from consumer.life.checkpoint_uploads import clear_up, prune
from consumer.life.curve_uploads import CurveUploads
from jobs.addresses import S3Location
from jobs.record import Ending, EndingKind
from sandbox.s3_server import S3Server
from services.s3.s3_service import S3Service
from tests.integration.services.record_world import (
    BUCKET,
    access,
    claimed,
    overwrite,
    request,
    worker,
)
from tests.integration.services.s3_proxy import S3Proxy, impatient, once, refusal
from tests.unit.jobs.message_samples import all_kinds
from utils.errors import ErrorCode, LeaseLost

LOCAL = "events.out.tfevents.1.host.2.0"


def keys(s3: S3Service, prefix: str) -> list[str]:
    return [found.key for found in s3.list_objects(BUCKET, prefix)]


def test_event_files_go_up_as_they_grow_until_the_claim_is_over(tmp_path: Path) -> None:
    with S3Server() as server, S3Proxy(server.endpoint) as proxy:
        server.create_bucket(BUCKET)
        s3 = S3Service(**access(server.endpoint))
        job = request()
        lease = claimed(worker(s3, lease=60.0), job)
        uploads = CurveUploads(
            tmp_path / "curves", impatient(proxy.endpoint, attempts=1), BUCKET, "here/", lease
        )
        uploads.upload()
        assert not keys(s3, "here/"), "nobody asked for any"
        (tmp_path / "curves").mkdir()
        file = tmp_path / "curves" / LOCAL
        file.write_bytes(b"one point")
        proxy.fault = once(refusal(503, "SlowDown"), "PUT")
        uploads.upload()  # fails, and no job fails of it
        uploads.upload()
        (key,) = keys(s3, "here/")
        assert key == f"here/claim-0001.{LOCAL}"
        s3.delete(BUCKET, [key])
        uploads.upload()
        assert not keys(s3, "here/"), "nothing new, nothing sent"
        file.write_bytes(b"one point, and another")
        uploads.upload()
        assert s3.read(S3Location(BUCKET, key)).body == b"one point, and another"
        overwrite(s3, job.task_id, lambda record: record.claimed("two", 60.0))
        with pytest.raises(LeaseLost):
            lease.release(count_attempt=False)
        file.write_bytes(b"what nobody may see: the job is another worker's")
        uploads.upload()
        assert s3.read(S3Location(BUCKET, key)).body == b"one point, and another"


def test_curves_are_kept_longer_than_checkpoints_unless_the_job_was_cancelled(
    s3_server: S3Server,
) -> None:
    s3_server.create_bucket(BUCKET)
    s3 = S3Service(**access(s3_server.endpoint))
    for kind, code, stay in (
        (EndingKind.COMPLETE, None, {"epoch-0002/lora.safetensors", f"tensorboard/{LOCAL}"}),
        (EndingKind.FAILED, ErrorCode.TRAINING_DIVERGED, None),
        (EndingKind.FAILED, ErrorCode.CANCELLED, set()),
    ):
        lease = claimed(worker(s3), request())
        prefix = f"checkpoints/style_7/{lease.record.task_id}/"
        names = {"epoch-0002/lora.safetensors", "epoch-0002/manifest.json", f"tensorboard/{LOCAL}"}
        for name in names:
            s3.write(S3Location(BUCKET, prefix + name), b"content")
        prune(s3, BUCKET, prefix, kept=["epoch-0002"], kept_file="lora.safetensors", lease=lease)
        assert {key.removeprefix(prefix) for key in keys(s3, prefix)} == names
        lease.end(Ending(kind, {"style_id": 7, "sequence": 1}, code))
        assert clear_up(s3, BUCKET, lease.record, kinds=all_kinds())
        left = {key.removeprefix(prefix) for key in keys(s3, prefix)}
        assert left == (names if stay is None else stay)
