"""Two processes that train one language model: real processes, on the CPU, over gloo."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from jobs.kinds import Run, TrainerOptions
from jobs.llm import LlmRun
from sandbox.stand_in_language_model import write_conversations
from tests.unit.training.runtime.test_child import Process
from training.language.trainer import passes_of
from training.language.work import LanguageWork
from utils.errors import StopReason
from utils.events import CheckpointSaved, Failed, Finished, Progress, Stage, Stop

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated", "ignore:`gradient_checkpointing`"
)
MakeRun = Callable[..., LlmRun]

RUNNER = "tests.unit.training.language.awkward_work:AwkwardWork"
ROUNDING = 2e-5
"""Largest difference between the adapters of two processes and of one, after 20 steps."""


def start(log: Path, *, fsdp: bool = False) -> Process:
    """A trainer of two processes."""
    options = TrainerOptions("none", allow_cpu=True, runner=RUNNER, processes=2, fsdp=fsdp)
    return Process(dataclasses.replace(options, stall_seconds=60.0), log)


@pytest.fixture(scope="module", name="warm")
def _warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Process]]:
    kept = {"two": start(tmp_path_factory.mktemp("two") / "log")}
    yield kept
    kept["two"].close()


@pytest.fixture(name="two")
def _two(warm: dict[str, Process], tmp_path: Path) -> Process:
    """A trainer of two processes, the same for all tests until one breaks it."""
    if warm["two"].process.poll() is not None:
        warm["two"] = start(tmp_path / "log")
    return warm["two"]


@pytest.fixture(autouse=True)
def _loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.fixture(name="make_run")
def _with_one_prompt(make_run: MakeRun) -> MakeRun:
    """Makes runs that generate few answers."""

    def make(folder: str, resume_from: str | None = None, **parameters: Any) -> LlmRun:
        run = make_run(folder, resume_from, **parameters)
        return dataclasses.replace(run, prompts=("Who are you?",))

    return make


@pytest.fixture(name="data")
def _data(tmp_path: Path) -> Path:
    """Answers of very unequal length."""
    path = write_conversations(tmp_path / "data.jsonl", 40)
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    for index, row in enumerate(rows):
        row["messages"][-1]["content"] += " and so on" * (index % 9)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def done(process: Process, run: LlmRun) -> Finished | Failed:
    """The ending of a run in a trainer process."""
    process.send(Run.of(run, RUNNER, {}))
    return process.ending()


def alone(run: LlmRun) -> Finished:
    """The ending of a run in this process."""
    return LanguageWork(TrainerOptions("none", allow_cpu=True)).run(
        run, lambda _: None, lambda: None
    )


def weights(ending: Finished | Failed) -> dict[str, torch.Tensor]:
    """The exported adapter."""
    assert isinstance(ending, Finished), ending
    return safetensors.torch.load_file(Path(ending.folder) / "adapter_model.safetensors")


def report(ending: Finished | Failed) -> Any:
    """The report of a run."""
    assert isinstance(ending, Finished), ending
    return json.loads((Path(ending.folder) / "training_report.json").read_text("utf-8"))


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two adapters."""
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii")
    return [int(number) for number in text.split()]


def gone(pid: int, within: float = 5.0) -> bool:
    """Whether a process ends in time."""
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if " Z " in Path(f"/proc/{pid}/stat").read_text("ascii"):
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 16, 17])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_row_of_a_step_is_in_one_pass(rows: int, size: int, processes: int) -> None:
    passes = passes_of(rows, size, processes)
    assert [row for each in passes for row in each] == list(range(rows))
    assert all(0 < len(each) <= size for each in passes)
    if len(passes_of(rows, size)) % processes == 0:
        assert passes == passes_of(rows, size)


@pytest.mark.parametrize("steps", [1, 20])
def test_two_processes_train_what_one_trains(two: Process, make_run: MakeRun, steps: int) -> None:
    same = {"max_steps": steps, "dropout": 0.0, "save_steps": 3, "eval_steps": 3}
    one = alone(make_run("one", **same))
    both = done(two, make_run("two", **same))
    assert furthest(weights(one), weights(both)) < ROUNDING
    assert max(float(w.abs().max()) for w in weights(one).values()) > 1000 * ROUNDING
    before, after = report(one)["evaluation"], report(both)["evaluation"]
    assert after["before"] == before["before"]
    assert after["after"]["loss"] == pytest.approx(before["after"]["loss"], abs=1e-5)


def test_dropout_is_that_of_one_process_if_the_passes_are(two: Process, make_run: MakeRun) -> None:
    same = {"max_steps": 4, "dropout": 0.3}  # the first epoch has full steps of two passes
    one, both = alone(make_run("one", **same)), done(two, make_run("two", **same))
    assert furthest(weights(one), weights(both)) < ROUNDING


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    two: Process, make_run: MakeRun
) -> None:
    whole = done(two, make_run("whole"))
    run = make_run("begun")
    two.seen.clear()
    two.send(Run.of(run, RUNNER, {}))
    while two.wait_for(Progress).stage is not Stage.TRAINING:
        pass
    two.send(Stop(StopReason.SHUTDOWN, run.task_id, run.claim))
    stopped = two.ending()
    assert isinstance(stopped, Finished) and stopped.stopped is StopReason.SHUTDOWN
    assert 0 < stopped.done < 8
    saved = [fact for fact in two.seen if isinstance(fact, CheckpointSaved)][-1]
    assert saved.step == stopped.done
    resumed = done(two, make_run("resumed", saved.folder))
    assert furthest(weights(whole), weights(resumed)) == 0.0


def test_a_run_resumes_with_another_number_of_processes(two: Process, make_run: MakeRun) -> None:
    same = {"dropout": 0.0}
    both = done(two, make_run("both", **same))
    middle = next((Path(make_run("both").work_folder) / "checkpoints").glob("*step-0004"))
    one = alone(make_run("one", str(middle), **same))
    again = done(two, make_run("again", str(middle), **same))
    assert furthest(weights(both), weights(one)) < ROUNDING
    assert furthest(weights(both), weights(again)) == 0.0


def test_only_process_0_writes_checkpoints_and_sends_events(
    two: Process, make_run: MakeRun
) -> None:
    two.seen.clear()
    run = make_run("run")
    assert isinstance(done(two, run), Finished)
    steps = [fact.step for fact in two.seen if isinstance(fact, CheckpointSaved)]
    assert steps == [2, 4, 6, 8]
    assert len(list((Path(run.work_folder) / "checkpoints").iterdir())) == 4
    assert sum(isinstance(fact, Finished) for fact in two.seen) == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lack_of_memory_in_one_process_makes_the_passes_of_all_smaller(
    two: Process, make_run: MakeRun, rank: int
) -> None:
    same = {"dropout": 0.0, "max_steps": 6}
    whole = alone(make_run("whole", **same))
    run = dataclasses.replace(make_run("run", **same), task_id=f"memory-{rank}")
    ended = done(two, run)
    assert furthest(weights(whole), weights(ended)) < ROUNDING
    assert any("2 conversations" in line for line in report(ended)["training"]["changes"])


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_process_ends_the_run_and_the_next_run_works(
    two: Process, make_run: MakeRun, rank: int
) -> None:
    pid = two.process.pid
    failed = done(two, dataclasses.replace(make_run("run"), task_id=f"error-{rank}"))
    assert isinstance(failed, Failed)
    assert (failed.error, failed.message) == ("DiskFull", "The worker's disk is full.")
    assert failed.trainer_usable
    assert isinstance(done(two, make_run("next")), Finished)
    assert two.process.pid == pid and two.process.poll() is None


def test_a_process_that_trains_apart_fails_the_run(two: Process, make_run: MakeRun) -> None:
    failed = done(two, dataclasses.replace(make_run("run"), task_id="drift-1"))
    assert isinstance(failed, Failed) and failed.error == "TrainingFailed"
    assert "different adapters" in failed.message


def test_a_stop_waits_for_the_slowest_process_and_both_stop_at_one_step(
    two: Process, make_run: MakeRun
) -> None:
    run = dataclasses.replace(make_run("run", max_steps=200, save_steps=500), task_id="slow-1")
    two.send(Run.of(run, RUNNER, {}))
    while two.wait_for(Progress).stage is not Stage.TRAINING:
        pass
    two.send(Stop(StopReason.CANCELLED, run.task_id, run.claim))
    ending = two.ending()
    assert isinstance(ending, Finished) and ending.stopped is StopReason.CANCELLED
    assert isinstance(done(two, make_run("next")), Finished)  # they are in step


def test_the_death_of_a_process_fails_the_run_and_ends_the_trainer(
    two: Process, make_run: MakeRun
) -> None:
    done(two, make_run("first"))  # starts the other process
    (follower,) = children(two.process.pid)
    failed = done(two, dataclasses.replace(make_run("run"), task_id="death-1"))
    assert isinstance(failed, Failed) and failed.error == "WorkerCrashed"
    assert "process 1 (of 0 to 1) of the trainer was killed (SIGKILL)" in failed.message
    assert not failed.trainer_usable
    assert two.process.wait(10) != 0
    assert gone(follower)


@pytest.mark.parametrize("how", ["killed", "hung up"])
def test_no_process_is_left_behind(
    make_run: MakeRun, tmp_path: Path, how: str, two: Process, warm: dict[str, Process]
) -> None:
    assert isinstance(done(two, make_run("run", max_steps=1)), Finished)
    (follower,) = children(two.process.pid)
    two.send(Run.of(make_run("long", max_steps=5000), RUNNER, {}))
    two.wait_for(Progress)
    if how == "killed":
        os.kill(two.process.pid, signal.SIGKILL)
    else:
        two.hang_up()
    two.process.wait(10)
    assert gone(follower)
    del tmp_path, warm


@pytest.fixture(scope="module", name="sharing")
def _sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A trainer whose two processes share the weights of the base out."""
    process = start(tmp_path_factory.mktemp("sharing") / "log", fsdp=True)
    yield process
    process.close()


def test_a_base_that_is_shared_out_trains_as_a_whole_one(
    sharing: Process, make_run: MakeRun
) -> None:
    same = {"dropout": 0.0, "max_steps": 10, "gradient_accumulation_steps": 1, "batch_size": 7}
    one = alone(make_run("one", **same))
    first = done(sharing, make_run("first", **same))
    again = done(sharing, make_run("again", **same))  # on the warm base
    assert furthest(weights(one), weights(first)) < ROUNDING
    assert furthest(weights(first), weights(again)) == 0.0
    assert report(first)["evaluation"]["before"]["loss"] == pytest.approx(
        report(one)["evaluation"]["before"]["loss"], abs=1e-5
    )
    assert "base_model_changed" not in sharing.log.read_text()


def test_a_quantised_base_is_not_shared_out(sharing: Process, make_run: MakeRun) -> None:
    failed = done(sharing, make_run("run", quantization="4bit"))
    assert isinstance(failed, Failed)
    assert "TRAINER_FSDP=true cannot share out a base model in 4bit" in failed.message


def test_each_process_has_its_share_of_the_base_only(sharing: Process, make_run: MakeRun) -> None:
    shown = done(sharing, dataclasses.replace(make_run("run"), task_id="shares-1"))
    assert isinstance(shown, Failed)
    whole, held = map(int, re.findall(r"\d+", shown.message))
    assert held <= 0.52 * whole
    assert not shown.trainer_usable  # the other process waits in a forward pass
