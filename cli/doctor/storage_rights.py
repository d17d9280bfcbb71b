"""What the worker does where on S3: one table, tested by the doctor and printed as a policy."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from config import Settings

PROBE = ".probe-"
"""Begins the name of every object that a test of the storage writes, and removes."""


class Right(enum.StrEnum):
    """What may be done to objects, each as one of IAM's actions."""

    READ = "s3:GetObject"
    WRITE = "s3:PutObject"
    DELETE = "s3:DeleteObject"


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """One prefix and what the worker does under it. It may list every bucket that it uses.

    Attributes:
        of_state: Whether the bucket is in the store of the state bucket, where that is another one.
    """

    bucket: str
    prefix: str
    rights: frozenset[Right]
    of_state: bool = False


_ALL = frozenset(Right)
_STATE: dict[str, frozenset[Right]] = {
    "jobs/": _ALL,
    "checkpoints/": _ALL,
    "staging/": frozenset({Right.WRITE, Right.DELETE}),
    "archive/": frozenset({Right.READ, Right.WRITE}),
}


def uses(settings: Settings) -> tuple[Use, ...]:
    """Everything that the worker does on S3."""
    images = [Use(bucket, "", frozenset({Right.READ})) for bucket in settings.image_buckets]
    apart = settings.state_store() != settings.main_store()
    state = [Use(settings.state_bucket_name, *item, of_state=apart) for item in _STATE.items()]
    return (*images, Use(settings.model_bucket_name, "models/", _ALL), *state)


def least_policy(settings: Settings) -> dict[str, Any]:
    """The IAM policy that allows these uses and nothing else.

    Listing is not narrowed to prefixes: to a reader who may not list the bucket, S3 answers 403
    instead of 404 for what is not there, and then a new job cannot be told from a forbidden one.
    """
    partition = _partition(settings.aws_s3_region_name)
    places: dict[frozenset[Right], list[str]] = {}
    for use in uses(settings):
        places.setdefault(use.rights, []).append(f"{partition}{use.bucket}/{use.prefix}*")
    statements: list[dict[str, Any]] = [
        {
            "Sid": "List",
            "Effect": "Allow",
            "Action": "s3:ListBucket",
            "Resource": [
                f"{partition}{bucket}"
                for bucket in dict.fromkeys(use.bucket for use in uses(settings))
            ],
        }
    ]
    statements += [
        {
            "Sid": "".join(right.name.title() for right in Right if right in rights),
            "Effect": "Allow",
            "Action": [right.value for right in Right if right in rights],
            "Resource": resources,
        }
        for rights, resources in places.items()
    ]
    statements.append(
        {
            "Sid": "DoctorsProbes",
            "Effect": "Allow",
            "Action": Right.DELETE.value,
            "Resource": [
                f"{partition}{use.bucket}/{use.prefix}{PROBE}*"
                for use in uses(settings)
                if Right.WRITE in use.rights and Right.DELETE not in use.rights
            ],
        }
    )
    return {"Version": "2012-10-17", "Statement": statements}


def _partition(region: str) -> str:
    for begin, name in (("cn-", "aws-cn"), ("us-gov-", "aws-us-gov")):
        if region.startswith(begin):
            return f"arn:{name}:s3:::"
    return "arn:aws:s3:::"
