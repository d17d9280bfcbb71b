"""The trainer process, as the desk sees it: a real process, two pipes, and what goes over them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from jobs.kinds import Run, TrainerOptions
from jobs.style import StyleKind, TrainingImage, TrainingRun
from tests.unit.training.conftest import MakeRun
from training.runtime.child import Child, failed
from training.runtime.inbox import Inbox
from training.style.families.sd15 import BaseModel
from utils.errors import (
    REPORTABLE,
    CheckpointUnusable,
    DiskFull,
    GpuBroken,
    GpuOutOfMemory,
    LowQualityData,
    StopReason,
)
from utils.events import (
    EVENTS,
    BaseModelReady,
    CheckpointSaved,
    Failed,
    Finished,
    Progress,
    Stage,
    Started,
    Stop,
    decode,
    encode,
)

ROOT = Path(__file__).parents[3]


def sent(run: TrainingRun) -> Run:
    """A run as it crosses the pipe."""
    return Run.of(run, StyleKind.runner, {"style_id": run.style_id})


class Process:
    """One trainer process with the desk's ends of its pipes."""

    def __init__(self, options: TrainerOptions, log: Path) -> None:
        runs_in, self.runs = os.pipe()
        self.events, events_out = os.pipe()
        with log.open("ab") as errors:
            self.process = subprocess.Popen(  # pylint: disable=consider-using-with
                [
                    *(sys.executable, "-W", "ignore", "-m", "training"),
                    *("--runs-fd", str(runs_in), "--events-fd", str(events_out)),
                    json.dumps(dataclasses.asdict(options)),
                ],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                pass_fds=(runs_in, events_out),
                stderr=errors,
            )
        os.close(runs_in)
        os.close(events_out)
        self.log = log
        self.seen: list[Any] = []
        self.told_of_base: list[bool] = []
        self._facts: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def send(self, fact: Any) -> None:
        """Send a run or a stop."""
        os.write(self.runs, encode(sent(fact) if isinstance(fact, TrainingRun) else fact))

    def wait_for(self, *kinds: type[Any], within: float = 90.0) -> Any:
        """The next fact of one of `kinds`; everything before it is in `seen`."""
        end = time.monotonic() + within
        while True:
            try:
                fact = self._facts.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                tail = self.log.read_text()[-3000:]
                pytest.fail(f"no {kinds} within {within} s; saw {self.seen}; log:\n{tail}")
            self.seen.append(fact)
            if isinstance(fact, kinds):
                return fact

    def ending(self) -> Finished | Failed:
        """The run's last word."""
        ending: Finished | Failed = self.wait_for(Finished, Failed)
        return ending

    def hang_up(self) -> None:
        """Close the desk's end, as the desk's death would."""
        if self.runs >= 0:
            os.close(self.runs)
            self.runs = -1

    def close(self) -> None:
        """End it, and wait for that."""
        self.hang_up()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()

    def _read(self) -> None:
        with os.fdopen(self.events, "rb") as lines:
            for line in lines:
                fact = decode(line, (*EVENTS, BaseModelReady))
                if isinstance(fact, BaseModelReady):
                    self.told_of_base.append(fact.ready)
                else:
                    self._facts.put(fact)


@pytest.fixture(scope="module")
def child(options: TrainerOptions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One warm process for all tests that leave it alive."""
    process = Process(options, tmp_path_factory.mktemp("child") / "log")
    yield process
    process.close()


@pytest.fixture
def own_child(options: TrainerOptions, tmp_path: Path) -> Iterator[Process]:
    """A process that the test may end."""
    process = Process(options, tmp_path / "log")
    yield process
    process.close()


def long(run: TrainingRun) -> TrainingRun:
    """The same run, long enough to be interrupted."""
    return dataclasses.replace(run, parameters=dataclasses.replace(run.parameters, epochs=1000))


def test_a_run_gives_its_facts_in_order_and_its_files_with_the_model_last(
    child: Process, make_run: MakeRun
) -> None:
    run = make_run(epochs=2, checkpoint_interval=1)
    child.seen.clear()
    child.send(run)
    ending = child.ending()
    assert isinstance(ending, Finished), ending
    assert (ending.facts["epoch"], ending.done, ending.stopped) == (2, 6, None)
    assert Path(ending.folder) == Path(run.work_folder) / "output"
    assert ending.files[-1] == "lora_weights.safetensors"
    assert set(ending.files) == {path.name for path in Path(ending.folder).iterdir()}
    assert {"samples.png", "loss_curve.png", "training_report.json", "training_report.html"} < set(
        ending.files
    )
    assert ending.summary["steps"] == 6
    kinds = list(dict.fromkeys(type(fact) for fact in child.seen))
    assert kinds[:2] == [Progress, Started] and kinds[-1] is Finished
    stages = dict.fromkeys(f.stage for f in child.seen if isinstance(f, Progress))
    assert list(stages) == [Stage.PREPARING, Stage.TRAINING, Stage.EXPORTING]
    saved = [fact.folder for fact in child.seen if isinstance(fact, CheckpointSaved)]
    assert saved == [f"{run.work_folder}/checkpoints/epoch-000{n}" for n in (1, 2)]
    report = json.loads((Path(ending.folder) / "training_report.json").read_text())
    assert report["steps"] == 6 and len(report["pictures"]) == 3


def test_every_log_line_of_a_run_carries_its_task_id_and_none_of_another(
    child: Process, make_run: MakeRun
) -> None:
    before = len(child.log.read_text())
    for task in ("task-a", "task-b"):
        child.send(make_run(epochs=1, task_id=task))
        child.ending()
    lines = [json.loads(line) for line in child.log.read_text()[before:].splitlines()]
    events = {"run_taken", "epoch_done", "checkpoint_saved", "model_exported"}
    for task in ("task-a", "task-b"):
        assert events <= {line["event"] for line in lines if line.get("task_id") == task}
    assert [line["task_id"] for line in lines] == sorted(line["task_id"] for line in lines)


def test_only_the_front_desk_logs_that_there_is_no_gpu(child: Process, make_run: MakeRun) -> None:
    child.send(make_run(epochs=1))
    child.ending()
    assert any(isinstance(fact, CheckpointSaved) for fact in child.seen)
    log = child.log.read_text()
    assert "no_nvidia_gpu" not in log and "training_on_cpu" not in log


def test_neither_training_nor_samples_that_run_out_of_memory_fail_the_run(
    base: BaseModel, options: TrainerOptions, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(unet: Any, arguments: tuple[Any, ...]) -> None:
        # In training there is room for one image; for samples, which need no gradients, none.
        if not unet.training or len(arguments[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(BaseModel, "load", lambda _: base)
    told = io.BytesIO()
    child = Child(options, Inbox(io.BytesIO()), told)
    handle = base.unet.register_forward_pre_hook(too_large)
    try:
        # pylint: disable-next=protected-access
        ending = child._do(sent(make_run(count=4, batch_size=2, epochs=1)))
    finally:
        handle.remove()
    assert isinstance(ending, Finished), ending
    assert "samples.png" not in ending.files
    assert {"loss_curve.png", "lora_weights.safetensors"} < set(ending.files)
    report = json.loads((Path(ending.folder) / "training_report.json").read_text())
    used = ("batch_size", "gradient_accumulation_steps")
    assert [report["hyperparameters"][name] for name in used] == [1, 2]
    assert [report["hyperparameters_asked"][name] for name in used] == [2, 1]
    told_of = ("a batch had 1 instead of 2", "sample images could not be made (OutOfMemoryError)")
    assert all(any(each in warning for warning in report["warnings"]) for each in told_of)
    with safe_open(Path(ending.folder) / "lora_weights_kohya.safetensors", "pt") as kohya:
        assert kohya.metadata()["ss_batch_size_per_device"] == "1"
    starts = [decode(line, EVENTS) for line in told.getvalue().splitlines() if b"Started" in line]
    assert len(starts) == 3


def test_the_same_run_on_a_warm_process_gives_the_same_model(
    child: Process, make_run: MakeRun, tmp_path: Path
) -> None:
    models: dict[str, dict[str, Any]] = {}
    for name in ("first", "second"):
        child.send(make_run(epochs=1, work_folder=str(tmp_path / name)))
        ending = child.ending()
        assert isinstance(ending, Finished), ending
        models[name] = load_file(Path(ending.folder) / "lora_weights.safetensors")
    first, second = models["first"], models["second"]
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def test_a_stop_is_obeyed_within_a_step_and_the_resumed_run_finishes(
    child: Process, make_run: MakeRun
) -> None:
    run = make_run(epochs=40)
    child.send(run)
    child.wait_for(Started)
    child.seen.clear()
    child.send(Stop(StopReason.SHUTDOWN, "task-1", 1))
    ending = child.ending()
    assert isinstance(ending, Finished) and ending.stopped is StopReason.SHUTDOWN
    assert (ending.folder, ending.files) == ("", ())
    saved = [fact for fact in child.seen if isinstance(fact, CheckpointSaved)]
    if not saved:
        assert ending.done == 0
        return
    assert saved[-1].step == ending.done < 120
    child.send(dataclasses.replace(run, claim=2, resume_from=saved[-1].folder))
    started = child.wait_for(Started)
    assert started.done == ending.done
    child.send(Stop(StopReason.CANCELLED, "task-1", 2))
    assert child.ending() == dataclasses.replace(child.seen[-1], stopped=StopReason.CANCELLED)


def test_a_stop_between_runs_does_not_stop_the_next_run(child: Process, make_run: MakeRun) -> None:
    child.send(Stop(StopReason.CANCELLED, "task-1", 1))
    time.sleep(0.3)
    child.send(make_run(epochs=1))
    ending = child.ending()
    assert isinstance(ending, Finished) and ending.stopped is None


def test_a_stop_right_behind_a_run_stops_that_run_and_not_the_one_after(
    child: Process, make_run: MakeRun, tmp_path: Path
) -> None:
    first, second = long(make_run()), make_run(epochs=1, task_id="task-2")
    second = dataclasses.replace(second, work_folder=str(tmp_path / "second"))
    stop = Stop(StopReason.CANCELLED, first.task_id, first.claim)
    os.write(child.runs, encode(sent(first)) + encode(stop) + encode(sent(second)))
    for task, stopped in (("task-1", StopReason.CANCELLED), ("task-2", None)):
        ending = child.ending()
        assert isinstance(ending, Finished), ending
        assert (ending.task_id, ending.stopped) == (task, stopped)


def test_a_failed_run_is_reported_by_name_and_the_next_one_succeeds(
    child: Process, make_run: MakeRun, tmp_path: Path
) -> None:
    page = tmp_path / "page.jpg"
    page.write_bytes(b"<html></html>")
    run = make_run(count=2)
    bad = dataclasses.replace(
        run, images=(*run.images, TrainingImage("s3://b/page.jpg", str(page)))
    )
    child.send(bad)
    ending = child.ending()
    assert isinstance(ending, Failed)
    assert (ending.error, ending.trainer_usable) == ("LowQualityData", True)
    assert "page.jpg: is a web page" in ending.message and str(tmp_path) not in ending.message
    child.send(make_run(epochs=1))
    assert isinstance(child.ending(), Finished)


def test_a_damaged_checkpoint_fails_the_run_without_a_stack_trace_or_a_path(
    child: Process, make_run: MakeRun, tmp_path: Path
) -> None:
    child.send(make_run(epochs=1, resume_from=str(tmp_path / "no-such-checkpoint")))
    ending = child.ending()
    assert isinstance(ending, Failed) and ending.error == "CheckpointUnusable"
    assert ending.message == (
        "The checkpoint no-such-checkpoint has no manifest.json: it was never finished. A worker "
        "continues without it; delete its folder before `train --resume`."
    )
    log = child.log.read_text()
    assert "run_not_possible" in log and "FileNotFoundError" in log
    assert "Traceback" not in log


def test_signals_of_the_terminal_do_not_reach_the_run(child: Process, make_run: MakeRun) -> None:
    child.send(make_run(epochs=2))
    child.wait_for(Started)
    child.process.send_signal(signal.SIGINT)
    child.process.send_signal(signal.SIGTERM)
    assert isinstance(child.ending(), Finished)


def test_the_process_ends_with_its_pipe_in_the_middle_of_training(
    own_child: Process, make_run: MakeRun
) -> None:
    own_child.send(long(make_run()))
    own_child.wait_for(Started)
    own_child.hang_up()
    assert own_child.process.wait(2.0) == 0


def test_the_process_ends_with_its_pipe_while_it_still_loads(own_child: Process) -> None:
    time.sleep(1.0)
    own_child.hang_up()
    assert own_child.process.wait(2.0) == 0


def test_a_line_that_is_no_run_ends_the_process_instead_of_leaving_the_desk_waiting(
    own_child: Process,
) -> None:
    os.write(own_child.runs, b'{"kind": "Nonsense"}\n')
    assert own_child.process.wait(20.0) == 3


def test_a_model_that_cannot_be_loaded_fails_each_run_until_it_can(
    make_run: MakeRun, stand_in: Path, tmp_path: Path
) -> None:
    late = tmp_path / "late-model"
    process = Process(TrainerOptions(str(late), allow_cpu=True), tmp_path / "log")
    try:
        for _ in range(2):
            process.send(make_run(epochs=1))
            ending = process.ending()
            assert isinstance(ending, Failed) and ending.error == "BaseModelUnavailable"
            assert "late-model" in ending.message and ending.trainer_usable
        assert not process.told_of_base
        late.symlink_to(stand_in)
        process.send(make_run(epochs=1))
        assert isinstance(process.ending(), Finished)
        assert process.told_of_base == [True]
    finally:
        process.close()


@pytest.mark.parametrize(
    ("error", "name", "usable"),
    [
        (LowQualityData("too few"), "LowQualityData", True),
        (CheckpointUnusable("old"), "CheckpointUnusable", True),
        (GpuOutOfMemory(), "GpuOutOfMemory", True),
        (GpuBroken(), "GpuBroken", False),
        (MemoryError(), "GpuOutOfMemory", True),
        (OSError(28, "No space left on device"), "DiskFull", True),
        (DiskFull(), "DiskFull", True),
        (KeyError("whatever"), "TrainingFailed", True),
    ],
)
def test_every_exception_has_a_reportable_name_and_a_sentence(
    make_run: MakeRun, error: Exception, name: str, usable: bool
) -> None:
    told = failed(sent(make_run()), error)
    assert (told.error, told.trainer_usable) == (name, usable)
    assert told.error in REPORTABLE
    assert told.message.endswith(".") or told.message in ("too few", "old")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("cannot open '/var/lib/scratch/task-1/x.bin'", "cannot open 'x.bin'"),
        ("no file at /root/models/sd", "no file at sd"),
        ("there is no folder /srv/models/base: BASE", "there is no folder base: BASE"),
        ("s3://media/a/b.png and a/b stay", "s3://media/a/b.png and a/b stay"),
        ("https://x.org/a/b stays", "https://x.org/a/b stays"),
    ],
)
def test_no_message_shows_a_path_of_this_machine(make_run: MakeRun, said: str, told: str) -> None:
    assert failed(sent(make_run()), LowQualityData(said)).message == told
