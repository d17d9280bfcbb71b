"""A job's images: the text for an artist if too few of them could be fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from consumer.life.inputs import fetch_inputs
from consumer.life.stop_signal import StopSignal
from jobs.kinds import Claim
from tests.memory_s3 import MemoryS3
from tests.unit.jobs.message_samples import BUCKET, flat, read, style_kind
from utils.errors import ImageDownloadFailed


def test_a_reason_that_many_images_share_is_named_once(tmp_path: Path) -> None:
    job = read(flat(image_urls=[f"s3://{BUCKET}/{number}.jpg" for number in range(200)]))
    kind, stop = style_kind(), StopSignal()
    fetched = fetch_inputs(
        MemoryS3(), kind.inputs(job.spec), tmp_path, max_bytes=kind.max_input_bytes, stop=stop
    )
    with pytest.raises(ImageDownloadFailed) as error:
        kind.run(job.spec, fetched, Claim(job.task_id, 1, tmp_path, None))
    assert str(error.value).count("could not be found in storage") == 1
    assert f"s3://{BUCKET}/0.jpg" in str(error.value) and "190 more" in str(error.value)
