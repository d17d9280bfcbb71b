"""The settings and the storage of the commands about jobs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import config
from utils import logger

if TYPE_CHECKING:
    from jobs.kinds import Kinds
    from services.s3.s3_service import S3Service


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """The settings, and the storage that they name.

    Attributes:
        settings: The settings.
        s3: The storage of inputs and models.
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
        from services.s3.s3_service import open_store

        settings = config.load(file=config_file)
        storage = settings.storage
        logger.configure(level="ERROR", log_format="text", secrets=settings.secrets())
        return cls(settings, open_store(storage.main_store()), open_store(storage.state_store()))

    @property
    def kinds(self) -> Kinds:
        """All kinds of job, also those that this machine's worker does not serve."""
        return self.settings.kinds(every=True)

    @property
    def state(self) -> str:
        """The state bucket."""
        return self.settings.storage.state_bucket_name

    @property
    def models(self) -> str:
        """The bucket of the models."""
        return self.settings.storage.model_bucket_name
