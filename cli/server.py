"""The settings and the storage of the commands about jobs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import config
from utils import logger

if TYPE_CHECKING:
    from services.s3.s3_service import S3Service


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """The settings, and the storage that they name.

    Attributes:
        settings: The settings.
        s3: The storage of images and models.
        state_s3: The storage of the state bucket, which may be another one.
    """

    settings: config.Settings
    s3: S3Service
    state_s3: S3Service

    @classmethod
    def of(cls, config_file: Path | None) -> Server:
        """The server that the environment, `.env` and a file describe.

        Raises:
            ConfigurationError: The settings are wrong.
        """
        # Imported late: it brings boto3 and pika.
        # pylint: disable-next=import-outside-toplevel
        from consumer.worker import open_s3, open_state_s3

        settings: config.Settings = config.load(file=config_file)
        logger.configure(level="ERROR", log_format="text", secrets=settings.secrets())
        return cls(settings, open_s3(settings), open_state_s3(settings))

    @property
    def state(self) -> str:
        """The state bucket."""
        return self.settings.state_bucket_name
