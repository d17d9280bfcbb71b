"""Settings of the object storage: a store for images and models, and a store for state."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from utils.settings import values as setting_values

GOOGLE_HOST = "storage.googleapis.com"

Bucket = Annotated[str, AfterValidator(setting_values.bucket_name)]
Endpoint = Annotated[str, AfterValidator(setting_values.endpoint)]
Region = Annotated[str, AfterValidator(setting_values.region)]
Buckets = Annotated[tuple[Bucket, ...], BeforeValidator(setting_values.split), Field(min_length=1)]
Checksums = Literal["sha256", "md5"]


def is_google(endpoint: str | None) -> bool:
    """Whether an endpoint is the S3-compatible one of Google Cloud Storage."""
    host = (urlsplit(endpoint).hostname or "") if endpoint else ""
    return host == GOOGLE_HOST or host.endswith(f".{GOOGLE_HOST}")


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """Address and credentials of a store.

    Attributes:
        endpoint: The address; None for AWS, or for the address in boto3's own configuration files.
        ignore_configured_endpoints: Whether addresses in boto3's own configuration are ignored.
        region: The region of the buckets.
        access_key_id, secret_access_key, session_token: None for boto3's own chain.
        checksums: The checksum of uploads.
        conditional_writes: False if the store is documented to ignore `If-Match` and
            `If-None-Match` of a PUT.
    """

    endpoint: str | None
    ignore_configured_endpoints: bool
    region: str
    access_key_id: str | None
    secret_access_key: str | None = dataclasses.field(repr=False)
    session_token: str | None = dataclasses.field(repr=False)
    checksums: Checksums
    conditional_writes: bool


class StorageSettings(setting_values.Group):
    """The stores and the buckets."""

    aws_access_key_id: str | None = None
    aws_secret_access_key: SecretStr | None = None
    aws_session_token: SecretStr | None = None
    aws_s3_region_name: Region = "ap-northeast-2"
    aws_endpoint_url_s3: Endpoint | None = None
    aws_endpoint_url: Endpoint | None = None
    aws_ignore_configured_endpoint_urls: bool = False
    s3_checksums: Literal["auto", "sha256", "md5"] = "auto"

    aws_storage_bucket_name: Bucket = Field(description="the bucket of the images and models")
    model_bucket_name: Bucket = Field(default_factory=lambda data: data["aws_storage_bucket_name"])
    state_bucket_name: Bucket = Field(default_factory=lambda data: data["model_bucket_name"])
    image_buckets: Buckets = Field(
        default_factory=lambda data: tuple(
            dict.fromkeys((data["aws_storage_bucket_name"], data["model_bucket_name"]))
        )
    )
    model_url_scheme: Literal["s3", "gs"] = "s3"

    state_aws_access_key_id: str | None = None
    state_aws_secret_access_key: SecretStr | None = None
    state_aws_session_token: SecretStr | None = None
    state_aws_s3_region_name: Region | None = None
    state_aws_endpoint_url_s3: Endpoint | None = None
    allow_unguarded_state: bool = False

    @field_validator("aws_secret_access_key", "state_aws_secret_access_key")
    @classmethod
    def _keys_come_in_pairs(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        key = str(info.field_name).replace("secret_access_key", "access_key_id")
        if (value is None) != (info.data.get(key) is None):
            raise ValueError(f"belongs to {key.upper()}. Set both or neither")
        return value

    @field_validator("aws_session_token", "state_aws_session_token")
    @classmethod
    def _a_token_needs_its_key(
        cls, value: SecretStr | None, info: ValidationInfo
    ) -> SecretStr | None:
        name = str(info.field_name)
        key = name.replace("session_token", "access_key_id")
        secret = name.replace("session_token", "secret_access_key")
        if value is not None and info.data.get(key) is None:
            raise ValueError(
                f"is part of temporary credentials. Set {key.upper()} and {secret.upper()} with "
                "it, or none of the three"
            )
        return value

    @property
    def s3_endpoint(self) -> str | None:
        """The endpoint of images and models, in botocore's order of the names; None for AWS."""
        if self.aws_ignore_configured_endpoint_urls:
            return None
        return self.aws_endpoint_url_s3 or self.aws_endpoint_url

    def main_store(self) -> Store:
        """The store of images and models."""
        return self._store(
            self.s3_endpoint,
            self.aws_s3_region_name,
            self.aws_access_key_id,
            self.aws_secret_access_key,
            self.aws_session_token,
        )

    def state_store(self) -> Store:
        """The store of the state bucket; values that are not set are those of `main_store`."""
        # Key, secret and token are one credential, so all three come from the same settings.
        own_key = self.state_aws_access_key_id is not None
        return self._store(
            self.state_aws_endpoint_url_s3 or self.s3_endpoint,
            self.state_aws_s3_region_name or self.aws_s3_region_name,
            self.state_aws_access_key_id if own_key else self.aws_access_key_id,
            self.state_aws_secret_access_key if own_key else self.aws_secret_access_key,
            self.state_aws_session_token if own_key else self.aws_session_token,
        )

    def _store(
        self,
        endpoint: str | None,
        region: str,
        access_key_id: str | None,
        secret: SecretStr | None,
        token: SecretStr | None,
    ) -> Store:
        google = is_google(endpoint)
        chosen: Checksums = "md5" if google else "sha256"
        return Store(
            endpoint=endpoint,
            ignore_configured_endpoints=self.aws_ignore_configured_endpoint_urls,
            region=region,
            access_key_id=access_key_id,
            secret_access_key=secret.get_secret_value() if secret else None,
            session_token=token.get_secret_value() if token else None,
            checksums=chosen if self.s3_checksums == "auto" else self.s3_checksums,
            conditional_writes=not google,
        )
