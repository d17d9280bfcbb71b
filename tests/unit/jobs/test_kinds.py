"""The facts that every kind of job gives of itself, and those that the record keeps of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jobs.hold import decode, encode, values_beside
from jobs.kinds import FIRST_KIND, REGISTRY, JobKind, Kinds, TrainerOptions, load
from jobs.record import JobRecord, JobRequest
from tests.toy.kind import ToyKind
from tests.unit.jobs.message_samples import SETTINGS, all_kinds, envelope, read, style_kind
from utils.metrics import Metrics

FACTS: dict[str, dict[str, Any]] = {
    "style": {"epoch": 17, "total_epochs": 200, "loss": 0.25},
    "llm": {"epoch": 2.375, "loss": 0.25, "held_out_loss": 0.5},
}
SUBJECTS = {"style": "7", "llm": "support"}


@pytest.fixture(name="kind", params=list(REGISTRY))
def _kind(request: pytest.FixtureRequest) -> JobKind:
    return all_kinds().of(request.param)


def record_of(kind: JobKind, message: dict[str, Any] | None = None) -> JobRecord:
    """The record of a new job."""
    request = JobRequest("task", kind.name, SUBJECTS[kind.name], "abc", message or {})
    return JobRecord.new(request, "one", 60.0)


def test_every_kind_has_all_members_of_the_interface() -> None:
    wanted = {*JobKind.__annotations__, *(n for n in vars(JobKind) if not n.startswith("_"))}
    for cls in (*map(load, REGISTRY.values()), ToyKind):
        assert not {name for name in wanted if not hasattr(cls, name)} - {"max_input_bytes"}
    assert isinstance(style_kind().max_input_bytes, int)


def test_the_labels_of_a_kind_are_the_names_of_its_identity(kind: JobKind) -> None:
    assert tuple(kind.identity_fields(SUBJECTS[kind.name])) == kind.labels


def test_the_labels_of_all_served_kinds_are_named_once() -> None:
    assert all_kinds().labels == ("style_id", "kind", "subject")


def test_a_kind_declares_each_metric_that_it_fills(kind: JobKind) -> None:
    metrics = Metrics()
    metrics.declare(kind.counters, kind.gauges)
    metrics.declare(kind.counters, kind.gauges)  # of a second job
    shown = kind.shown(FACTS[kind.name])
    assert set(shown.counts) == set(metrics.counters_of_kinds)
    assert set(shown.gauges) == set(metrics.gauges_of_kinds)
    assert shown.gauges["loss"] == 0.25


def test_a_record_with_the_facts_of_a_run_can_be_read_again(kind: JobKind) -> None:
    fields = kind.shown(FACTS[kind.name]).record
    record = dataclasses.replace(record_of(kind), **fields)
    restored = decode(JobRecord, encode(record), "jobs/task.json", values_beside(record))
    assert restored == record
    assert kind.standing(record).done == int(FACTS[kind.name]["epoch"])


def test_the_total_of_a_job_is_that_of_its_order() -> None:
    kinds = all_kinds()
    style = record_of(kinds.of("style"), {"hyper_parameters": {"epochs": 200}})
    assert kinds.standing(style).total == 200
    llm = record_of(kinds.of("llm"), {"llm_parameters": {"epochs": 2.5, "max_steps": 0}})
    assert kinds.standing(llm).total == 2.5
    of_steps = record_of(kinds.of("llm"), {"llm_parameters": {"epochs": 2.5, "max_steps": 9}})
    assert kinds.standing(of_steps).total is None


def test_a_job_without_a_record_has_the_standing_of_the_first_kind() -> None:
    standing = all_kinds().standing(None)
    assert (standing.done, standing.total, standing.unit) == (0, None, "epoch")


def test_only_an_order_with_a_new_feature_needs_a_newer_worker() -> None:
    kind = style_kind()
    assert kind.min_level(read(envelope()).spec) == 0
    assert kind.min_level(read(envelope(parameters={"epochs": "auto"})).spec) == 1


def test_without_other_words_a_worker_serves_the_first_kind() -> None:
    addresses = SETTINGS.kinds()._addresses  # pylint: disable=protected-access
    assert Kinds({}, addresses=addresses).served == (FIRST_KIND,) == SETTINGS.worker.kinds
    assert TrainerOptions("base").runner == style_kind().runner
