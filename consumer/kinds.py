"""The kinds of job, configured by the settings."""

from __future__ import annotations

import dataclasses

from config import Settings
from jobs.addresses import AddressRules
from jobs.kinds import Kinds, KindSettings
from jobs.style import StyleOptions


def configured_kinds(settings: Settings) -> Kinds:
    """All kinds, with the defaults of these settings."""
    addresses = AddressRules(
        default_bucket=settings.aws_storage_bucket_name,
        allowed=settings.image_buckets,
        endpoint=settings.s3_endpoint,
    )
    options = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(StyleOptions)
    }
    style = KindSettings(addresses, dataclasses.asdict(settings.hyper_parameters()), options)
    return Kinds({"style": style}, addresses=addresses)
