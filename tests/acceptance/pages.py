"""A worker's HTTP pages as a platform's probes and scrapers ask for them."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from sandbox.worker_process import WorkerProcess
from tests.acceptance.world import log_lines, until
from utils.metrics import PREFIX


class Pages:
    """The pages of a worker, at the address in its log."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.port: int = until(lambda: log_lines(worker, "http_listening"))[-1]["port"]

    def ask(
        self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request(method, path, headers=dict(headers or {}))
            answer = connection.getresponse()
            head = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, head, answer.read()
        finally:
            connection.close()

    def json(self, path: str) -> dict[str, Any]:
        """A page's content."""
        content: dict[str, Any] = json.loads(self.ask(path)[2])
        return content

    def status(self, path: str) -> int:
        """A page's status."""
        return self.ask(path)[0]

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series, by its name without the prefix; 0 while there is none of it.

        Raises:
            KeyError: Nothing of that name is exported.
        """
        text = self.ask("/metrics", headers={"Accept": "text/plain"})[2].decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"{PREFIX}_{name}" and sample.labels == labels:
                    return float(sample.value)
            if labels and re.fullmatch(family.name + "(_total|_count|_sum)?", f"{PREFIX}_{name}"):
                return 0.0  # a series with labels appears with its first count
        raise KeyError(name)
