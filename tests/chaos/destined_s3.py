"""S3 faults for single jobs: a cancel between two files, a refused record, a late read."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

from tests.chaos.timing import MEDIA, STATE
from tests.integration.services.s3_proxy import Fault, refusal

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_LATE_SECONDS = 0.25
"""Shorter than a worker waits for a record."""


class DestinedS3:
    """Chooses faults of single requests.

    Args:
        s3: A client of the storage without faults.
        lease: `LEASE_TTL_SECONDS`.

    Attributes:
        cancel_while_publishing: Task to style: the first writes into the style's folder cancel the
            job.
        creation_refused: Task to how often S3 answers 503 when its record is to be made.
        read_late: Task to how often the answer to a read of its record comes late: two workers
            that claim it at once see the same.
    """

    def __init__(self, s3: S3Client, lease: float) -> None:
        self.cancel_while_publishing: dict[str, int] = {}
        self.creation_refused: dict[str, int] = {}
        self.read_late: dict[str, int] = {}
        self._s3 = s3
        self._lease = lease

    def cancel(self, task_id: str) -> None:
        """Write the file that cancels a job."""
        self._s3.put_object(Bucket=STATE, Key=f"jobs/{task_id}.cancel", Body=b"")

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault of a request that no other fault hits."""
        path = path.partition("?")[0]
        if method == "GET" and (task_id := _next(self.read_late, path)):
            self.read_late[task_id] -= 1
            return Fault(delay=_LATE_SECONDS)
        if method != "PUT":
            return None
        if task_id := _next(self.creation_refused, path):
            self.creation_refused[task_id] -= 1
            return refusal(503, "SlowDown")
        return self._cancel_in_mid_publication(path)

    def _cancel_in_mid_publication(self, path: str) -> Fault | None:
        """Have a job cancelled once the third file of its model is written.

        The answer comes late, so that its worker sees the cancel before it writes the next file.
        """
        if not (path.startswith(f"/{MEDIA}/models/") and path.endswith("/loss_curve.png")):
            return None
        style = path.split("/")[3]
        for task_id, style_id in tuple(self.cancel_while_publishing.items()):
            if style == f"style_{style_id}" and self._publishes(style_id) == task_id:
                del self.cancel_while_publishing[task_id]
                self.cancel(task_id)
                return Fault(delay=self._lease / 2)
        return None

    def _publishes(self, style_id: int) -> str | None:
        """The task that has the turn to publish into the style's folder."""
        with contextlib.suppress(self._s3.exceptions.NoSuchKey):
            answer = self._s3.get_object(Bucket=STATE, Key=f"jobs/style_{style_id}.turn")
            return str(json.loads(answer["Body"].read()).get("task_id"))
        return None


def _next(times: dict[str, int], path: str) -> str | None:
    """The task with a pending fault for the next request of its record."""
    for task_id, left in tuple(times.items()):
        if left > 0 and path == f"/{STATE}/jobs/{task_id}.json":
            return task_id
    return None
