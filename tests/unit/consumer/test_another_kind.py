"""A second kind of job runs from its message to its webhook.

The worker knows it by its registry line only.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from consumer.life.stop_signal import StopSignal
from consumer.pipeline import Pipeline
from consumer.publishing.model_publisher import ModelPublisher
from consumer.trainer.trainer_process import TrainerProcess
from jobs import kinds
from jobs.addresses import AddressRules, S3Location
from jobs.kinds import Kinds, Run, TrainerOptions
from services.broker.settlement import Queue, Settlement
from services.records.turns import Turns
from services.telemetry.tracing import trace_id_of
from tests.toy.work import ToyWork
from tests.unit.consumer.job_world import STATE, World, delivery
from tests.unit.jobs.message_samples import BUCKET
from training.runtime.child import Child
from training.runtime.inbox import Inbox
from utils.errors import WorkerCrashed
from utils.events import Event, Finished

TOY = "tests.toy.kind:ToyKind"
TOY_QUEUE = Queue.of_kind("toy")
OPTIONS = TrainerOptions("none", allow_cpu=True, runner="tests.toy.work:ToyWork")


class ToyTrainer:
    """A trainer process of the toy kind, without the process."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def run(
        self, run: Run, on_event: Callable[[Event], None], stop: StopSignal, **_: Any
    ) -> Finished:
        self.runs.append(run)
        runner = kinds.load(run.runner)(OPTIONS)
        finished: Finished = runner.run(runner.run_type(**run.order), on_event, lambda: stop.reason)
        return finished


@pytest.fixture(name="world")
def _world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setitem(kinds.REGISTRY, "toy", TOY)
    world = World(tmp_path / "one")
    world.s3.write(S3Location(BUCKET, "word.txt"), b"seven letters")
    yield world


def both_kinds() -> Kinds:
    """The style kind and the toy kind."""
    return Kinds({}, addresses=AddressRules(BUCKET, (BUCKET,)), served=("style", "toy"))


def pipeline_of(world: World, trainer: Any) -> Pipeline:
    """The world's pipeline, serving both kinds, with this trainer and a real publisher."""
    desk = world.pipeline._desk  # pylint: disable=protected-access
    s3 = desk.s3
    turns = Turns(s3, STATE, owner="one", lease_seconds=60.0)
    publisher = ModelPublisher(
        s3, s3, model_bucket="models", state_bucket=STATE, url_scheme="s3", turns=turns
    )
    values = {name: getattr(desk, name) for name in desk.__dataclass_fields__}
    return Pipeline(
        type(desk)(**values | {"kinds": both_kinds(), "trainer": trainer, "publisher": publisher})
    )


def toy_order(task_id: str = "toy-1", **values: Any) -> bytes:
    """A message of the toy kind."""
    data = {"name": "seven", "text": f"s3://{BUCKET}/word.txt"} | values
    return json.dumps({"task_id": task_id, "type": "toy_training", "data": data}).encode()


def test_a_job_of_another_kind_runs_from_its_message_to_its_webhook(world: World) -> None:
    trainer = ToyTrainer()
    settled = pipeline_of(world, trainer).handle(delivery(toy_order()))
    assert settled == Settlement.ack()
    (ending,) = world.backend.endings
    assert ending.body["letters"] == 13 and ending.body["of"] == "seven"
    assert (ending.body["kind"], ending.body["subject"]) == ("toy", "seven")
    model = "models/toy/seven/toy-1/letters.json"
    assert ending.body["model_url"] == f"s3://models/{model}"
    assert json.loads(world.s3.objects["models", model].body) == {"letters": 13}
    fields = trainer.runs[0].log_fields
    assert fields == {
        "kind": "toy",
        "subject": "seven",
        "trace_id": trace_id_of({}, "toy-1"),
    }


def test_its_record_names_kind_and_subject_and_comes_back_from_s3(world: World) -> None:
    pipeline_of(world, ToyTrainer()).handle(delivery(toy_order()))
    stored = json.loads(world.s3.objects[STATE, "jobs/toy-1.json"].body)
    assert (stored["kind"], stored["subject"]) == ("toy", "seven")
    assert "style_id" not in stored
    record = world.record("toy-1")
    assert (record.kind, record.subject, record.style_id) == ("toy", "seven", None)


def test_an_invalid_order_of_another_kind_is_reported_with_its_subject(world: World) -> None:
    pipeline_of(world, ToyTrainer()).handle(delivery(toy_order(text="/etc/passwd")))
    (ending,) = world.backend.endings
    assert (ending.body["kind"], ending.body["subject"]) == ("toy", "seven")
    assert ending.body["error_code"] == "INVALID_MESSAGE"
    assert ending.body["error_message"].startswith("data.text: is an absolute path")


class BrokenTrainer(ToyTrainer):
    """A trainer whose runs end with this error."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def run(self, *_: Any, **__: Any) -> Finished:
        raise self._error


def test_a_job_of_another_kind_waits_for_its_next_attempt_in_its_own_queue(world: World) -> None:
    handler = pipeline_of(world, BrokenTrainer(WorkerCrashed("it died")))
    (copy,) = handler.handle(delivery(toy_order(), queue=TOY_QUEUE)).publish
    assert (copy.queue, copy.delay_seconds) == (TOY_QUEUE, 10.0)
    queues = world.observer.queues
    queues.looked(TOY_QUEUE, 3, 1)
    queues.finished(100.0)
    handler.handle(delivery(toy_order(task_id="toy-2"), queue=TOY_QUEUE))
    (told,) = [one for one in world.backend.reports if one["progress"]["stage"] == "queued"]
    assert told["progress"]["queue_position"] == 4, "the style kind's queue has not been seen"


def test_the_sweep_publishes_a_job_of_another_kind_to_its_own_queue(world: World) -> None:
    with pytest.raises(KeyboardInterrupt):  # the worker is killed
        killed = pipeline_of(world, BrokenTrainer(KeyboardInterrupt()))
        killed.handle(delivery(toy_order(), queue=TOY_QUEUE))
    world.s3.pass_seconds(400.0)
    world.sweeper(both_kinds()).sweep_once()
    (copy,) = world.broker.published
    assert (copy.queue, copy.message_id) == (TOY_QUEUE, "toy-1")


def test_a_worker_that_does_not_serve_the_kind_refuses_its_type(world: World) -> None:
    settled = world.pipeline.handle(delivery(toy_order()))
    (dead,) = settled.publish
    assert "type: is not model_training" in str(dead.headers)
    assert not world.backend.endings


def test_the_real_trainer_process_does_a_run_of_another_kind_and_imports_no_torch(
    tmp_path: Path,
) -> None:
    (tmp_path / "word.txt").write_text("abc")
    order = {
        "task_id": "toy-1",
        "claim": 1,
        "path": str(tmp_path / "word.txt"),
        "folder": str(tmp_path),
        "resume_from": None,
    }
    trainer = TrainerProcess(OPTIONS, {"PATH": "/usr/bin:/bin"}, stall_seconds=60)
    events: list[Event] = []
    try:
        run = Run("toy-1", 1, OPTIONS.runner, {}, order)
        finished = trainer.run(run, events.append, StopSignal(), max_seconds=60)
    finally:
        trainer.close()
    assert finished.done == 3 and finished.files == ("letters.json",)
    code = (
        "import sys, training.runtime.child, tests.toy.work\n"
        "print(sorted({'torch', 'diffusers'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


class _Child(Child):
    """A child that shows which runner has the run, and which base model is warm."""

    def does(self, runner: str) -> tuple[Any, Any]:
        run = Run("t-1", 1, runner, {}, {})
        return self._runner_of(run), self._warm


class OtherBase(ToyWork):
    """A runner with a base model."""

    has_base = True

    def __init__(self, options: TrainerOptions) -> None:
        super().__init__(options)
        self.released = 0

    def release(self, tell: Any) -> None:
        """Count."""
        self.released += 1


def test_only_a_runner_with_a_base_model_replaces_the_warm_one(tmp_path: Path) -> None:
    here = f"{__name__}:OtherBase"
    options = dataclasses.replace(OPTIONS, runner=here)
    with (tmp_path / "runs").open("w+b") as runs, (tmp_path / "events").open("wb") as events:
        child = _Child(options, Inbox(runs), events)
        runner, warm = child.does(here)
        assert runner is warm and isinstance(warm, OtherBase)
        toy, still = child.does(OPTIONS.runner)
        assert isinstance(toy, ToyWork) and still is warm and not warm.released
        assert child.does(here)[0] is warm
        other, newest = child.does(f"{__name__}:AnotherBase")
        assert other is newest and warm.released == 1


class AnotherBase(OtherBase):
    """A runner with another base model."""
