"""The messages between the two processes cross the pipe unchanged, and nothing else passes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters, TrainingImage, TrainingRun
from utils.errors import REPORTABLE, StopReason
from utils.events import (
    EVENTS,
    CheckpointSaved,
    Failed,
    Finished,
    Progress,
    Stage,
    Started,
    Stop,
    decode,
    encode,
    from_dict,
)

FACTS: tuple[Any, ...] = (
    Started(
        "job", 100, 300, facts={"epoch": 10}, warnings=("two images are alike", "ä „sentence“")
    ),
    Started("job", 0, 300, "token"),
    Progress("job", Stage.PREPARING, 0, 300),
    Progress("job", Stage.TRAINING, 123, 300, per_second=9.5, facts={"loss": 0.125}),
    CheckpointSaved("job", "epoch-0012-step-0123", 12, 123, "/tmp/job/epoch-0012-step-0123", 0.2),
    Finished("job", "/tmp/job/model", ("a.safetensors", "b.png"), 300, 60.0),
    Finished("job", "", (), 31, 6.0, stopped=StopReason.SHUTDOWN),
    Finished(
        "job",
        "/m",
        ("a",),
        1,
        1.0,
        facts={"epoch": 1},
        summary={"pictures": {"used": 9}, "list": [1]},
    ),
    *(Failed("job", name, "a sentence", trainer_usable=False) for name in REPORTABLE),
)
RUN = TrainingRun(
    task_id="job",
    style_id=123,
    claim=2,
    images=(
        TrainingImage("s3://b/a.jpg", "/tmp/job/0.jpg", "a harbour"),
        TrainingImage("s3://b/b.jpg", None, problem="it is not there"),
    ),
    parameters=HyperParameters(epochs=3, learning_rate=5e-4, alpha=8.0),
    work_folder="/tmp/job",
    resume_from="/tmp/job/epoch-0010",
)
INWARD = (TrainingRun, Stop, TrainerOptions)


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: type(fact).__name__)
def test_every_event_is_decoded_as_it_was_encoded(fact: Any) -> None:
    again = decode(encode(fact), EVENTS)
    assert again == fact
    assert type(again) is type(fact)


@pytest.mark.parametrize(
    "fact",
    [RUN, TrainerOptions("folder"), *(Stop(reason, "task-1", 2) for reason in StopReason)],
    ids=lambda fact: type(fact).__name__,
)
def test_every_request_is_decoded_as_it_was_encoded(fact: Any) -> None:
    assert decode(encode(fact), INWARD) == fact


def test_every_kind_of_event_is_tried_here() -> None:
    assert {type(fact) for fact in FACTS} == set(EVENTS)


@pytest.mark.parametrize("fact", [*FACTS, RUN], ids=lambda fact: type(fact).__name__)
def test_a_fact_is_one_line_and_cannot_be_changed(fact: Any) -> None:
    line = encode(fact)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        fact.task_id = "another"


def test_a_float_that_json_writes_as_an_integer_stays_a_float() -> None:
    values = json.loads(encode(FACTS[3])) | {"per_second": 1}
    rate = decode(json.dumps(values).encode(), EVENTS).per_second
    assert isinstance(rate, float) and rate == 1.0


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json\n",
        b"[]\n",
        b"{}\n",
        b'{"kind": "Reboot"}\n',
        b'{"kind": ["Stop"]}\n',
        encode(Stop(StopReason.CANCELLED, "task-1", 1)),
        b"\xff\xfe\n",
    ],
)
def test_an_unknown_kind_is_refused(line: bytes) -> None:
    with pytest.raises(ValueError, match="not one of"):
        decode(line, EVENTS)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"colour": "blue"}, "colour"),
        ({"stage": "dreaming"}, "dreaming"),
        ({"step": "12"}, "step"),
        ({"step": True}, "step"),
        ({"step": 1.5}, "step"),
        ({"task_id": None}, "task_id"),
        ({"loss": "low"}, "loss"),
        ({"loss": True}, "loss"),
    ],
)
def test_an_unknown_field_or_a_value_of_another_type_is_refused_by_name(
    changed: dict[str, Any], named: str
) -> None:
    values = json.loads(encode(FACTS[3])) | changed
    with pytest.raises(ValueError, match=named):
        decode(json.dumps(values).encode(), EVENTS)


def test_a_missing_field_is_refused_by_name() -> None:
    values = json.loads(encode(FACTS[3]))
    del values["total"]
    with pytest.raises(ValueError, match="total"):
        decode(json.dumps(values).encode(), EVENTS)


def test_the_limits_of_values_hold_for_messages_of_the_pipe_too() -> None:
    values = dataclasses.asdict(RUN) | {"images": []}
    values["parameters"]["epochs"] = 0
    with pytest.raises(ValueError, match="epochs is 0"):
        from_dict(TrainingRun, values)
