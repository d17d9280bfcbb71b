"""The sandbox's S3 server behaves like S3 in the points in which moto does not."""

from __future__ import annotations

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import botocore.exceptions
import pytest

from sandbox.s3_server import OneWriterAtATime, S3Server


def test_a_body_is_refused_that_does_not_match_its_sha256(s3_server: S3Server, bucket: str) -> None:
    with pytest.raises(botocore.exceptions.ClientError, match="BadDigest"):
        s3_server.client().put_object(
            Bucket=bucket,
            Key="a",
            Body=b"body",
            ChecksumAlgorithm="SHA256",
            ChecksumSHA256="AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        )


@pytest.mark.parametrize(("method", "alone"), [("PUT", True), ("DELETE", True), ("GET", False)])
def test_requests_that_change_something_run_one_at_a_time(method: str, alone: bool) -> None:
    inside: list[int] = []
    most: list[int] = []

    def application(_environ: Any, _start: Any) -> list[bytes]:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return [b""]

    served = OneWriterAtATime(application)
    gate = threading.Barrier(4)

    def ask(_number: int) -> None:
        gate.wait()
        served({"REQUEST_METHOD": method, "wsgi.input": io.BytesIO()}, lambda *_: None)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert (max(most) == 1) == alone


def test_a_race_of_conditional_writes_has_one_winner_round_after_round(
    s3_server: S3Server, bucket: str
) -> None:
    client = s3_server.client()
    gate = threading.Barrier(6)

    def won(key: str) -> bool:
        gate.wait()
        try:
            client.put_object(Bucket=bucket, Key=key, Body=b"x" * 100_000, IfNoneMatch="*")
            return True
        except botocore.exceptions.ClientError:
            return False

    with ThreadPoolExecutor(6) as pool:
        for number in range(20):
            assert list(pool.map(won, [f"lease-{number}"] * 6)).count(True) == 1
