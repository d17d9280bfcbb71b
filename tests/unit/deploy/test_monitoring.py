"""Dashboards and alerts use metrics that worker and API export; the runbook has every alert."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from api.gate.problems import CODES
from api.routes import webhooks
from services.broker.settlement import Queue
from tests.metric_names import exported_names
from utils.errors import ErrorCode, Refusal
from utils.gpu_monitor import THROTTLE_REASONS
from utils.metrics import NO_CODE, PREFIX, PUT_OFFS, WASTE, ApiMetrics, Metrics
from utils.settings.groups import BrokerSettings

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
DASHBOARDS = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json")
}
RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text("utf-8"))["groups"]
    for rule in group["rules"]
]
PROMETHEUS_OWN = {"up"}
# tests/integration/deploy asks a real RabbitMQ for these.
BROKERS_OWN = {"rabbitmq_detailed_queue_messages_ready": {"queue", "vhost"}}
SCRAPED = {
    each["job_name"]
    for each in yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))[
        "scrape_configs"
    ]
}
# Labels that Prometheus or a histogram adds to a series.
LABELS_FROM_OUTSIDE = {"instance", "job", "le"}

STATUSES = {"2xx", "3xx", "4xx", "5xx", "no_answer"}
VALUES: dict[str, set[str]] = {
    "job": SCRAPED,
    "queue": {str(queue) for queue in (Queue.TRAINING, Queue.ENDINGS, Queue.DEAD)},
    "ending": {"complete", "failed"},
    "code": {*ErrorCode, NO_CODE},
    "outcome": STATUSES,
    "refusal": set(Refusal),
    "status": {str(status) for status, _ in CODES.values()},
    "route": {getattr(route, "path") for route in webhooks.router.routes},
}
"""What a label can say."""

REASONS: dict[str, set[str]] = {
    "wasted_gpu_seconds_total": set(WASTE),
    "messages_put_off_total": set(PUT_OFFS),
    "gpu_throttled": set(THROTTLE_REASONS),
}
"""What the label `reason` can say, by metric."""


def _queries() -> list[str]:
    queries = [
        target["expr"]
        for dashboard in DASHBOARDS.values()
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    queries += [rule["expr"] for rule in RULES]
    # Grafana fills in its variables before Prometheus reads them.
    return [query.replace("$instance", ".*") for query in queries]


def _nodes(node: Any) -> Iterator[Any]:
    yield node
    for name in ("lhs", "rhs", "expr", "vector_selector"):
        if (inner := getattr(node, name, None)) is not None and not isinstance(inner, str):
            yield from _nodes(inner)
    for inner in getattr(node, "args", None) or ():
        yield from _nodes(inner)


def _selectors(query: str) -> list[Any]:
    nodes = _nodes(promql_parser.parse(query))
    return [node for node in nodes if isinstance(node, promql_parser.VectorSelector)]


def _named(metrics: Metrics | ApiMetrics) -> dict[str, Any]:
    """The metrics of an object, by their names without the prefix."""
    return {
        str(getattr(metric, "_name")).removeprefix(f"{PREFIX}_"): metric
        for metric in vars(metrics).values()
        if hasattr(metric, "_labelnames")
    }


def _labels() -> dict[str, set[str]]:
    """The labels that each metric is made with, by its series' names."""
    return {
        f"{PREFIX}_{name}{ending}": set(getattr(metric, "_labelnames"))
        for metrics in (Metrics(), ApiMetrics())
        for name, metric in _named(metrics).items()
        for ending in ("", "_total", "_bucket", "_sum", "_count", "_info")
    }


@pytest.mark.parametrize("query", sorted(set(_queries())))
def test_a_query_uses_exported_metrics(query: str) -> None:
    selectors = _selectors(query)
    assert selectors, "a query names a series"
    labels = _labels()
    for selector in selectors:
        assert selector.name in exported_names() | PROMETHEUS_OWN | set(BROKERS_OWN)
        asked = {matcher.name for matcher in selector.matchers.matchers}
        own = labels.get(selector.name, set()) | BROKERS_OWN.get(selector.name, set())
        assert asked <= own | LABELS_FROM_OUTSIDE


@pytest.mark.parametrize("query", sorted(set(_queries())))
def test_a_query_uses_values_that_a_label_can_have(query: str) -> None:
    for selector in _selectors(query):
        for matcher in selector.matchers.matchers:
            if matcher.name != "instance":
                metric = selector.name.removeprefix(f"{PREFIX}_")
                possible = REASONS[metric] if matcher.name == "reason" else VALUES[matcher.name]
                if selector.name in BROKERS_OWN:
                    possible = {BrokerSettings().training_queue}
                assert set(matcher.value.split("|")) <= possible, str(selector)


def test_the_parser_refuses_an_invalid_query() -> None:
    with pytest.raises(ValueError):
        promql_parser.parse("sum(rate(x_total[5m])")


def test_the_dashboards_show_all_metrics() -> None:
    shown = {selector.name for query in _queries() for selector in _selectors(query)}
    stems = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    own = {name for name in exported_names() if name.startswith("training_server_")}
    missing = {re.sub("_(bucket|sum|count)$", "", name) for name in own} - stems
    assert not missing


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_do_not_overlap(name: str) -> None:
    dashboard = DASHBOARDS[name]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for place in (panel["gridPos"],)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_the_runbook_has_exactly_the_alerts_of_the_rules() -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = runbook.partition("## Alerts")[2].partition("\n## ")[0]
    described = re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)
    assert sorted(described) == sorted(rule["alert"] for rule in RULES)


def test_an_alert_has_a_delay_and_a_severity() -> None:
    for rule in RULES:
        assert re.fullmatch(r"\d+[mh]", rule["for"])
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
