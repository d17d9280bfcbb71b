"""The least IAM policy: what the worker does on S3, and nothing else."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest

import config
from cli.doctor.storage_rights import least_policy


def _policy(**values: Any) -> dict[str, Any]:
    defaults = {
        "backend_api_url": "https://backend.example",
        "internal_api_token": "t" * 32,
        "aws_storage_bucket_name": "media",
        "model_bucket_name": "models",
        "state_bucket_name": "state",
        "image_buckets": "media,uploads",
    }
    return least_policy(config.load(_env_file=None, **(defaults | values)).storage)


def _allows(policy: dict[str, Any], action: str, resource: str) -> bool:
    """Judge a policy without denials and conditions as IAM does."""
    return any(
        action in ([said] if isinstance(said := statement["Action"], str) else said)
        and any(fnmatchcase(resource, pattern) for pattern in statement["Resource"])
        for statement in policy["Statement"]
    )


@pytest.mark.parametrize(
    ("action", "place"),
    [
        ("GetObject", "media/training/1.jpg"),
        ("GetObject", "uploads/a/b.jpg"),
        ("ListBucket", "uploads"),
        ("PutObject", "models/models/style_1/lora_weights.safetensors"),
        # Archiving copies the old model out of its bucket.
        ("GetObject", "models/models/style_1/lora_weights.safetensors"),
        ("PutObject", "state/archive/style_1/task/lora_weights.safetensors"),
        # A publication that failed is rolled back from it.
        ("GetObject", "state/archive/style_1/task/lora_weights.safetensors"),
        ("PutObject", "state/staging/task/1/lora_weights.safetensors"),
        ("DeleteObject", "state/staging/task/1/lora_weights.safetensors"),
        ("PutObject", "state/jobs/task.json"),
        ("GetObject", "state/jobs/task.cancel"),
        ("DeleteObject", "state/checkpoints/style_1/task/epoch-0010/manifest.json"),
        ("ListBucket", "state"),
        ("DeleteObject", "state/archive/.probe-1"),
    ],
)
def test_the_policy_allows_what_the_worker_does(action: str, place: str) -> None:
    assert _allows(_policy(), f"s3:{action}", f"arn:aws:s3:::{place}")


@pytest.mark.parametrize(
    ("action", "place"),
    [
        ("PutObject", "media/training/1.jpg"),
        ("DeleteObject", "uploads/a/b.jpg"),
        ("PutObject", "models/other/file"),
        ("GetObject", "models/other/file"),
        ("DeleteObject", "state/archive/style_1/task/lora_weights.safetensors"),
        ("GetObject", "other/jobs/task.json"),
        ("DeleteBucket", "state"),
        ("PutBucketPolicy", "state"),
    ],
)
def test_the_policy_allows_nothing_else(action: str, place: str) -> None:
    assert not _allows(_policy(), f"s3:{action}", f"arn:aws:s3:::{place}")


def test_china_and_the_us_government_have_their_own_names() -> None:
    for region, partition in (("cn-north-1", "aws-cn"), ("us-gov-west-1", "aws-us-gov")):
        resources = [
            each
            for statement in _policy(aws_s3_region_name=region)["Statement"]
            for each in statement["Resource"]
        ]
        assert all(each.startswith(f"arn:{partition}:s3:::") for each in resources)
