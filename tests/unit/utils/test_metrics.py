"""The metrics: names and units by Prometheus' rules, and text that its parsers read."""

from __future__ import annotations

import re

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as classic

from tests.metric_names import exported_names
from utils.errors import ErrorCode
from utils.metrics import PREFIX, READINESS, Metrics, formats

SCRAPER = (
    "application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


def test_every_name_is_of_this_program_or_of_its_process() -> None:
    own = {name for name in exported_names() if name.startswith(f"{PREFIX}_")}
    assert len(own) > 50
    assert all(name.startswith("process_") for name in exported_names() - own)


def test_names_of_counters_end_in_total_and_names_have_their_unit() -> None:
    for family in Metrics().registry.collect():
        if family.name.startswith("process_"):
            continue
        assert not family.name.endswith(("_total", "_count", "_sum", "_bucket", "_info"))
        assert not re.search("millisecond|_ms|_kb|_mb|percent|_bytes_|_celsius_", family.name)
        if family.type == "histogram":
            assert family.name.endswith("_seconds"), family.name
        assert family.documentation, family.name


@pytest.mark.parametrize(("accept", "parse"), [("text/plain", classic), (SCRAPER, open_metrics)])
def test_a_scraper_can_read_the_metrics(accept: str, parse: type) -> None:
    metrics = Metrics()
    metrics.jobs.labels("failed", ErrorCode.GPU_OOM).inc(2)
    text, content_type = metrics.render(accept)
    assert content_type.partition(";")[0] == accept.partition(";")[0]
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parse(text.decode())
        for sample in family.samples
    }
    label = (("code", "GPU_OOM"), ("ending", "failed"))
    assert samples[f"{PREFIX}_jobs_total", label] == 2
    assert not [name for name, _ in samples if name.endswith("_created")]


def test_the_first_failure_of_a_kind_is_an_increase_and_not_a_new_series() -> None:
    text = Metrics().render("text/plain")[0].decode()
    for code in ErrorCode:
        assert f'{PREFIX}_jobs_total{{code="{code}",ending="failed"}} 0.0' in text
    for check in READINESS:
        assert f'{PREFIX}_ready_check{{check="{check}"}} 0.0' in text


def test_all_names_are_those_of_a_running_worker() -> None:
    metrics = Metrics()
    metrics.gpu_throttled.labels("0", "heat").set(1)
    metrics.worker.info({"device": "cpu", "base_model": "b"})
    text = metrics.render("text/plain")[0].decode()
    used = {re.split("[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")}
    assert used <= exported_names()


@pytest.mark.parametrize(
    ("accept", "text"),
    [
        (SCRAPER, True),
        ("text/plain", True),
        ("TEXT/PLAIN; version=0.0.4", True),
        ("application/json, text/plain;q=0.5", True),
        ("application/openmetrics-text;version=abc;escaping=%0d%0a", True),
        ("*/*", False),
        ("", False),
        ("text/html,application/xhtml+xml", False),
    ],
)
def test_a_client_that_accepts_a_format_of_prometheus_gets_it(accept: str, text: bool) -> None:
    assert bool(formats(accept)) is text
    assert Metrics().render(accept)[0]
