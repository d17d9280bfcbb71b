"""Tests the state bucket: no job is taken unless its store honours conditional writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from services.records.condition_probe import ConditionalSupport, probe
from services.s3.s3_service import S3Service
from utils.errors import ConfigurationError, StorageError
from utils.logger import get_logger

log = get_logger(__name__)

Report = Callable[[str | None, str], None]

RETRY_SECONDS = 3.0
_REMARK = (
    "ok, but unguarded: the state bucket does not honour conditional writes, and "
    "ALLOW_UNGUARDED_STATE=true; run this worker only"
)


class StateGuard:
    """Tests the state bucket before the first job.

    Args:
        s3: The store of the state bucket.
        bucket: The state bucket.
        allow_unguarded: `ALLOW_UNGUARDED_STATE`: a store without conditional writes is taken.
        report: Receives the problem, or None, and a remark, after each test.
    """

    def __init__(
        self, s3: S3Service, bucket: str, *, allow_unguarded: bool, report: Report
    ) -> None:
        self._s3 = s3
        self._bucket = bucket
        self._allow_unguarded = allow_unguarded
        self._report = report
        self._remark = ""
        self._reason: str | None = None
        self._tested = False

    def test(self) -> bool:
        """Test the bucket unless it was tested. Returns False if S3 does not answer now.

        Raises:
            ConfigurationError: The store does not honour conditional writes, and no setting allows
                that.
        """
        if self._tested:
            return True
        try:
            support = probe(self._s3, self._bucket)
        except StorageError as error:
            self._could_not_test(str(error))
            return False
        self._judge(support)
        self._report(None, self._remark)
        self._tested = True
        return True

    def wait(self, stop: threading.Event, *, at_most: float | None = None) -> bool:
        """Wait until the bucket has been tested.

        Args:
            stop: Ends the waiting.
            at_most: Seconds to wait; None for any time.

        Returns:
            Whether jobs may be taken.

        Raises:
            ConfigurationError: As `test`.
        """
        end = None if at_most is None else time.monotonic() + at_most
        while not stop.is_set():
            if self.test():
                return True
            if end is not None and time.monotonic() >= end:
                return False
            stop.wait(RETRY_SECONDS)
        return False

    def _could_not_test(self, reason: str) -> None:
        if reason != self._reason:
            log.error("state_bucket_unusable", bucket=self._bucket, reason=reason)
        self._reason = reason
        self._report(f"the state bucket could not be tested for conditional writes: {reason}", "")

    def _judge(self, support: ConditionalSupport) -> None:
        if support.complete:
            log.info("state_bucket_tested", bucket=self._bucket, result=support.explain())
        elif self._allow_unguarded:
            log.warning(
                "state_bucket_unsafe",
                bucket=self._bucket,
                reason=support.explain(),
                allowed_by="ALLOW_UNGUARDED_STATE",
            )
            self._remark = _REMARK
        else:
            log.error("state_bucket_unsafe", bucket=self._bucket, reason=support.explain())
            raise ConfigurationError(
                f"STATE_BUCKET_NAME {self._bucket}: {support.explain()} To use this store with "
                "exactly one worker, set ALLOW_UNGUARDED_STATE=true. To keep images and models "
                "there and the state elsewhere, set STATE_BUCKET_NAME and "
                "STATE_AWS_ENDPOINT_URL_S3."
            )
