"""A job's images: what an artist reads when too few of them could be fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from consumer.life import inputs as images
from consumer.life.stop_signal import StopSignal
from services.s3.s3_service import FetchedImage, ImageRequest, S3Service
from tests.unit.jobs.message_samples import BUCKET, SETTINGS, flat, read
from utils.errors import ImageDownloadFailed


class EmptyStore:
    """Stands in for `S3Service`, and has no images."""

    def fetch_images(
        self, sources: Sequence[ImageRequest], folder: Path, **_: Any
    ) -> list[FetchedImage]:
        del folder
        return [
            FetchedImage(source.source, None, problem="could not be found in storage")
            for source in sources
        ]


def test_a_reason_that_many_images_share_is_named_once(tmp_path: Path) -> None:
    job = read(flat(image_urls=[f"s3://{BUCKET}/{number}.jpg" for number in range(200)]))
    with pytest.raises(ImageDownloadFailed) as error:
        images.fetch_images(
            cast(S3Service, EmptyStore()), SETTINGS, job, tmp_path / "pictures", StopSignal()
        )
    assert str(error.value).count("could not be found in storage") == 1
    assert f"s3://{BUCKET}/0.jpg" in str(error.value) and "190 more" in str(error.value)
