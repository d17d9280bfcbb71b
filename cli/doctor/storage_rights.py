"""The worker's rights on S3: one table, tested by the doctor and printed as a policy."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from jobs.layout import ARCHIVE, CHECKPOINTS, MODELS, RECORDS, STAGING
from utils.settings.storage import StorageSettings

PROBE = ".probe-"
"""Prefix of the name of every object that a test of the storage writes and removes."""


class Right(enum.StrEnum):
    """A right on objects, by its IAM action."""

    READ = "s3:GetObject"
    WRITE = "s3:PutObject"
    DELETE = "s3:DeleteObject"


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """A prefix and the worker's rights under it. The worker may also list every bucket it uses.

    Attributes:
        of_state: The bucket is in the store of the state bucket, and that is another store.
    """

    bucket: str
    prefix: str
    rights: frozenset[Right]
    of_state: bool = False


_ALL = frozenset(Right)
_STATE: dict[str, frozenset[Right]] = {
    RECORDS: _ALL,
    CHECKPOINTS: _ALL,
    STAGING: frozenset({Right.WRITE, Right.DELETE}),
    ARCHIVE: frozenset({Right.READ, Right.WRITE}),
}


def uses(settings: StorageSettings) -> tuple[Use, ...]:
    """Every prefix that the worker uses."""
    images = [Use(bucket, "", frozenset({Right.READ})) for bucket in settings.image_buckets]
    apart = settings.state_store() != settings.main_store()
    state = [Use(settings.state_bucket_name, *item, of_state=apart) for item in _STATE.items()]
    return (*images, Use(settings.model_bucket_name, MODELS, _ALL), *state)


def least_policy(settings: StorageSettings) -> dict[str, Any]:
    """The IAM policy that allows these uses and nothing else.

    Listing is not limited to prefixes: S3 answers 403 instead of 404 for a missing object to a
    reader who may not list the bucket, and then a new job looks like a forbidden one.
    """
    table = uses(settings)
    arn = f"arn:{_partition(settings.aws_s3_region_name)}:s3:::"
    places: dict[frozenset[Right], list[str]] = {}
    for use in table:
        places.setdefault(use.rights, []).append(f"{arn}{use.bucket}/{use.prefix}*")
    probes = [
        f"{arn}{use.bucket}/{use.prefix}{PROBE}*"
        for use in table
        if Right.WRITE in use.rights and Right.DELETE not in use.rights
    ]
    buckets = [f"{arn}{bucket}" for bucket in dict.fromkeys(use.bucket for use in table)]
    statements = [_allow("List", "s3:ListBucket", buckets)]
    for rights, resources in places.items():
        ordered = [right for right in Right if right in rights]
        name = "".join(right.name.title() for right in ordered)
        statements.append(_allow(name, [right.value for right in ordered], resources))
    statements.append(_allow("DoctorsProbes", Right.DELETE.value, probes))
    return {"Version": "2012-10-17", "Statement": statements}


def _allow(name: str, action: str | list[str], resources: list[str]) -> dict[str, Any]:
    return {"Sid": name, "Effect": "Allow", "Action": action, "Resource": resources}


def _partition(region: str) -> str:
    partitions = (("cn-", "aws-cn"), ("us-gov-", "aws-us-gov"))
    return next((name for begin, name in partitions if region.startswith(begin)), "aws")
