"""The names of the metrics that a worker and the API export."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry

from tests.unit.jobs.message_samples import all_kinds
from utils.metrics import ApiMetrics, Metrics


def exported_names() -> frozenset[str]:
    """The name of every series that a worker of all kinds or the API exports, as a query has it.

    A histogram has three: `_bucket`, `_sum` and `_count`.
    """
    metrics = Metrics()
    for kind in all_kinds():
        metrics.declare(kind.counters, kind.gauges)
    return frozenset(_series(metrics.registry)) | frozenset(_series(ApiMetrics().registry))


def _series(registry: CollectorRegistry) -> Iterator[str]:
    endings = {
        "counter": ("_total",),
        "histogram": ("_bucket", "_sum", "_count"),
        "info": ("_info",),
    }
    for family in registry.collect():
        yield from (family.name + ending for ending in endings.get(family.type, ("",)))
