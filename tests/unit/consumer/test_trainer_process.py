"""The trainer process, fast: runs, deaths and replacements, with a stand-in for the child."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from consumer.life.stop_signal import StopSignal
from consumer.trainer import trainer_process
from consumer.trainer.trainer_process import TrainerProcess
from jobs.kinds import Run, TrainerOptions
from jobs.style import HyperParameters, StyleKind, TrainingRun
from utils.confined import Confinement
from utils.errors import (
    Cancelled,
    GpuBroken,
    LeaseLost,
    LowQualityData,
    Stopped,
    StopReason,
    TrainingFailed,
    WorkerCrashed,
)
from utils.events import Event, Failed, Finished, Progress, Stage, Stop, decode
from utils.metrics import Metrics

RUN = TrainingRun(
    task_id="task-1",
    style_id=1,
    claim=3,
    images=(),
    parameters=HyperParameters(),
    work_folder="/work",
)
SENT = Run.of(RUN, StyleKind.runner, {})
DONE = Finished("task-1", "/scratch/output", ("lora.safetensors",), 3, 1.0)


class Child:
    """Stands in for the process: sends the events of a test, then lives on or dies."""

    made: list[Child] = []
    says: list[Event | Callable[[], None]] = []
    hangs = False

    def __init__(self, command: Any, *_: Any) -> None:
        self.command = command
        self.process = SimpleNamespace(pid=1000 + len(Child.made), poll=lambda: self.code)
        self.code: int | None = None
        self.sent: list[Any] = []
        self.base_model_ready = True
        self.closed = self.killed = False
        Child.made.append(self)

    def send(self, line: bytes) -> None:
        """As of the real one."""
        self.sent.append(decode(line, (Run, Stop)))

    def events(self, watch: Any) -> Iterator[Event]:
        """The events of the test; afterwards it hangs, or it is dead."""
        for said in Child.says:
            if callable(said):
                said()
            else:
                yield said
        if Child.hangs:
            watch.verdict = "the trainer hangs"
        else:
            self.code = -9

    def cause_of_death(self) -> str:
        """As of the real one."""
        return "the trainer died"

    def kill(self) -> None:
        """As of the real one."""
        self.killed, self.code = True, -9

    def close(self) -> None:
        """As of the real one."""
        self.closed, self.code = True, 0


@pytest.fixture(name="trainer")
def _trainer(monkeypatch: pytest.MonkeyPatch) -> TrainerProcess:
    Child.made, Child.says, Child.hangs = [], [], False
    monkeypatch.setattr(trainer_process, "_Child", Child)
    monkeypatch.setattr(trainer_process, "hide_own_memory", lambda: hidden.append(len(Child.made)))
    hidden.clear()
    return TrainerProcess(TrainerOptions("model"), {}, stall_seconds=60, metrics=Metrics())


hidden: list[int] = []
"""How many children there were at each call that hides this process's memory."""


def run(
    trainer: TrainerProcess, stop: StopSignal | None = None, heard: list[Event] | None = None
) -> Finished:
    """Train."""
    events = heard if heard is not None else []
    return trainer.run(SENT, events.append, stop or StopSignal(), max_seconds=60)


def restarts(trainer: TrainerProcess) -> float | None:
    """Children that were started after the first."""
    registry = trainer._metrics.registry  # pylint: disable=protected-access
    return registry.get_sample_value("training_server_trainer_restarts_total")


def test_a_child_is_started_once_and_kept_across_runs(trainer: TrainerProcess) -> None:
    Child.says = [DONE]
    trainer.start()
    assert run(trainer) == DONE and run(trainer) == DONE
    assert [child.sent for child in Child.made] == [[SENT, SENT]]
    assert not Child.made[0].closed
    assert trainer.pid == 1000 and restarts(trainer) == 0


def test_the_memory_is_hidden_before_each_child_is_started(trainer: TrainerProcess) -> None:
    trainer.start()
    Child.made[0].code = -9
    trainer.start()
    assert hidden == [0, 1]


def test_the_child_is_started_inside_the_confinement(trainer: TrainerProcess) -> None:
    trainer.start()
    program = (sys.executable, "-m", "training")
    assert Child.made[0].command == tuple(Confinement().command(program))


def test_every_event_of_the_run_is_received_in_order_and_none_of_an_earlier_run(
    trainer: TrainerProcess,
) -> None:
    own = Progress("task-1", Stage.TRAINING, 1, 3)
    other = Finished("task-0", "", (), 0, 1.0)
    Child.says = [other, own, DONE]
    heard: list[Event] = []
    assert run(trainer, heard=heard) == DONE
    assert heard == [own, DONE]


def test_a_stop_is_sent_with_the_name_of_its_run(trainer: TrainerProcess) -> None:
    stop = StopSignal()
    Child.says = [lambda: stop.request(StopReason.SHUTDOWN), DONE]
    run(trainer, stop)
    assert Child.made[0].sent[1:] == [Stop(StopReason.SHUTDOWN, "task-1", 3)]


def test_a_reported_failure_is_raised_by_its_name_and_the_child_is_kept(
    trainer: TrainerProcess,
) -> None:
    Child.says = [Failed("task-1", "LowQualityData", "too few")]
    with pytest.raises(LowQualityData, match="too few"):
        run(trainer)
    assert len(Child.made) == 1 and not Child.made[0].closed


def test_an_error_that_is_not_reportable_counts_as_a_failed_training(
    trainer: TrainerProcess,
) -> None:
    Child.says = [Failed("task-1", "SystemExit", "odd")]
    with pytest.raises(TrainingFailed, match="odd"):
        run(trainer)


def test_a_child_that_reports_itself_unusable_is_replaced_before_the_error_is_raised(
    trainer: TrainerProcess,
) -> None:
    Child.says = [Failed("task-1", "GpuBroken", "no CUDA", trainer_usable=False)]
    with pytest.raises(GpuBroken):
        run(trainer)
    assert [child.closed for child in Child.made] == [True, False]
    assert restarts(trainer) == 1


def test_a_child_that_dies_is_an_error_with_its_cause_and_is_replaced(
    trainer: TrainerProcess,
) -> None:
    with pytest.raises(WorkerCrashed, match="the trainer died"):
        run(trainer)
    assert len(Child.made) == 2 and not Child.made[0].killed
    assert trainer.pid == 1001


def test_a_child_that_hangs_is_killed_first_and_the_verdict_is_the_error(
    trainer: TrainerProcess,
) -> None:
    Child.hangs = True
    with pytest.raises(WorkerCrashed, match="hangs"):
        run(trainer)
    assert Child.made[0].killed and len(Child.made) == 2


@pytest.mark.parametrize(
    ("reason", "error"),
    [(StopReason.CANCELLED, Cancelled), (StopReason.LEASE_LOST, LeaseLost)],
)
def test_a_child_that_dies_during_a_stop_ends_the_run_with_the_stop_and_is_replaced(
    trainer: TrainerProcess, reason: StopReason, error: type[Exception]
) -> None:
    stop = StopSignal()
    stop.request(reason)
    with pytest.raises(error):
        run(trainer, stop)
    assert len(Child.made) == 2


def test_a_child_that_dies_during_a_shutdown_is_not_replaced(trainer: TrainerProcess) -> None:
    stop = StopSignal()
    stop.request(StopReason.SHUTDOWN)
    with pytest.raises(Stopped):
        run(trainer, stop)
    assert len(Child.made) == 1 and Child.made[0].closed
    trainer.start()
    assert len(Child.made) == 1


def test_the_base_model_is_ready_as_long_as_the_child_that_loaded_it_lives(
    trainer: TrainerProcess,
) -> None:
    seen = [trainer.base_model_ready]
    trainer.start()
    seen.append(trainer.base_model_ready)
    Child.made[0].code = -9
    assert [*seen, trainer.base_model_ready] == [False, True, False]


def test_an_idle_child_that_died_is_revived_once_a_minute_at_most(
    trainer: TrainerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    trainer.start()
    for seconds, children in ((0, 2), (59, 2), (2, 3)):
        now[0] += seconds
        Child.made[-1].code = -9
        trainer.revive()
        assert len(Child.made) == children


def test_a_living_child_and_one_that_was_never_started_are_not_revived(
    trainer: TrainerProcess,
) -> None:
    trainer.revive()
    assert Child.made == []
    trainer.start()
    trainer.revive()
    assert len(Child.made) == 1


def test_nothing_is_started_after_the_end(trainer: TrainerProcess) -> None:
    trainer.start()
    trainer.close()
    trainer.start()
    trainer.revive()
    assert len(Child.made) == 1 and Child.made[0].closed and trainer.pid is None


@pytest.mark.parametrize(("version", "warnings"), [(0, 1), (1, 1), (2, 0), (7, 0)])
def test_a_kernel_that_cannot_confine_the_trainer_leads_to_one_warning(
    trainer: TrainerProcess, monkeypatch: pytest.MonkeyPatch, version: int, warnings: int
) -> None:
    monkeypatch.setattr(trainer_process, "landlock_version", lambda: version)
    with capture_logs() as logs:
        trainer.start()
        Child.made[0].code = -9
        trainer.start()
    told = [line for line in logs if line["event"] == "trainer_not_confined"]
    assert [line["log_level"] for line in told] == ["warning"] * warnings
