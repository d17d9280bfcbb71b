"""The trainer process: warm across jobs, stops within a step, and ends with its worker.

It is replaced when it dies.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from config import load_local
from consumer.life.stop_signal import StopSignal
from consumer.trainer.run_watch import STOP_PATIENCE_SECONDS
from consumer.trainer.trainer_process import TrainerProcess
from jobs.kinds import Run, TrainerOptions
from jobs.style import HyperParameters, StyleKind, TrainingImage, TrainingRun
from sandbox.photographs import photographs as real_photographs
from training.style.stand_in_model import build_stand_in
from utils.errors import (
    LowQualityData,
    Stopped,
    StopReason,
    TrainingServerError,
    WorkerCrashed,
)
from utils.events import CheckpointSaved, Event, Finished, Progress, Stage, Started
from utils.metrics import Metrics

MakeRun = Callable[..., TrainingRun]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> TrainerOptions:
    model = build_stand_in(tmp_path_factory.mktemp("model") / "stand-in")
    return TrainerOptions(str(model), allow_cpu=True, log_level="WARNING")


@pytest.fixture(scope="module")
def trainer(options: TrainerOptions) -> Iterator[TrainerProcess]:
    """One real trainer process, warm across the tests of this file."""
    process = TrainerProcess(options, _environment(), stall_seconds=60)
    yield process
    process.close()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    for photograph in real_photographs():
        (folder / photograph.name).write_bytes(photograph.content)
    return sorted(folder.iterdir())


@pytest.fixture
def make_run(tmp_path: Path, photographs: list[Path]) -> MakeRun:
    def make(task_id: str = "task-1", epochs: int = 2, images: int = 3) -> TrainingRun:
        return TrainingRun(
            task_id=task_id,
            style_id=1,
            claim=1,
            images=tuple(
                TrainingImage(path.name, str(path), "an image") for path in photographs[:images]
            ),
            parameters=HyperParameters(epochs=epochs, resolution=64, rank=2),
            work_folder=str(tmp_path / task_id),
            checkpoint_interval=1,
        )

    return make


def _environment() -> dict[str, str]:
    return load_local(_env_file=None).trainer_environment()


def _run(
    trainer: TrainerProcess,
    run: TrainingRun,
    on_event: Callable[[Event], None] = lambda event: None,
    stop: StopSignal | None = None,
    max_seconds: float = 120,
    patience: float = STOP_PATIENCE_SECONDS,
) -> Finished:
    return trainer.run(
        Run.of(run, StyleKind.runner, {}),
        on_event,
        stop or StopSignal(),
        max_seconds=max_seconds,
        patience=lambda: patience,
    )


def test_a_run_reports_its_events_in_order_and_the_next_one_uses_the_same_process(
    trainer: TrainerProcess, make_run: MakeRun
) -> None:
    events: list[Event] = []
    finished = _run(trainer, make_run(), events.append)
    first_process = trainer.pid
    stages = [event.stage for event in events if isinstance(event, Progress)]
    assert stages[0] is Stage.PREPARING and stages[-1] is Stage.EXPORTING
    assert any(isinstance(event, Started) and event.facts["images_used"] == 3 for event in events)
    assert [e.name for e in events if isinstance(e, CheckpointSaved)] == [
        "epoch-0001",
        "epoch-0002",
    ]
    assert events[-1] == finished
    assert finished.files[-1] == "lora_weights.safetensors"
    assert all((Path(finished.folder) / name).is_file() for name in finished.files)

    again = _run(trainer, make_run("task-2"))
    assert trainer.pid == first_process
    weights = "lora_weights.safetensors"
    assert _tensors(Path(again.folder) / weights) == _tensors(Path(finished.folder) / weights)


def test_a_stop_is_obeyed_within_one_step_and_leaves_a_checkpoint(
    trainer: TrainerProcess, make_run: MakeRun
) -> None:
    stop = StopSignal()
    seen: list[CheckpointSaved] = []
    asked_at: list[int] = []

    def on_event(event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            seen.append(event)
        if isinstance(event, Progress) and event.done >= 4 and not asked_at:
            asked_at.append(event.done)
            stop.request(StopReason.SHUTDOWN)

    finished = _run(trainer, make_run(epochs=1000), on_event, stop)
    assert finished.stopped is StopReason.SHUTDOWN
    assert seen[-1].step == finished.done
    # The front desk's view is a little old: progress comes a few times per second.
    assert finished.done - asked_at[0] <= 1 + finished.done // 2
    assert finished.files == ()


def test_a_run_that_takes_too_long_is_stopped(trainer: TrainerProcess, make_run: MakeRun) -> None:
    stop = StopSignal()
    finished = _run(trainer, make_run(epochs=1000), stop=stop, max_seconds=1.5)
    assert finished.stopped is StopReason.TIME_LIMIT
    assert stop.reason is StopReason.TIME_LIMIT


def test_an_error_that_the_trainer_reports_is_raised_as_its_class(
    trainer: TrainerProcess, make_run: MakeRun
) -> None:
    with pytest.raises(LowQualityData):
        _run(trainer, make_run(images=2))


def test_a_killed_trainer_is_one_clear_error_and_the_next_run_gets_a_fresh_one(
    trainer: TrainerProcess, make_run: MakeRun
) -> None:
    trainer.start()
    killed = trainer.pid
    assert killed

    def kill(event: Event) -> None:
        if isinstance(event, Started):
            os.kill(killed, signal.SIGKILL)

    with pytest.raises(WorkerCrashed, match="SIGKILL"):
        _run(trainer, make_run(epochs=1000), kill)
    assert _run(trainer, make_run()).stopped is None
    assert trainer.pid != killed


def test_the_trainer_ends_when_its_desk_is_killed(tmp_path: Path, options: TrainerOptions) -> None:
    """Not even a SIGKILL of the desk leaves an orphan that keeps the GPU."""
    script = tmp_path / "desk.py"
    script.write_text(
        "import json, sys, time\n"
        "from consumer.trainer.trainer_process import TrainerProcess\n"
        "from jobs.kinds import TrainerOptions\n"
        "import os\n"
        "trainer = TrainerProcess(TrainerOptions(**json.loads(sys.argv[1])), dict(os.environ), "
        "stall_seconds=60)\n"
        "trainer.start()\n"
        "print('pid', trainer.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).resolve().parents[3]
    with subprocess.Popen(
        [sys.executable, str(script), json.dumps(dataclasses.asdict(options))],
        cwd=root,
        env=_environment() | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    ) as desk:
        assert desk.stdout
        told = next(line for line in desk.stdout if line.startswith("pid "))
        child = psutil.Process(int(told.split()[1]))
        time.sleep(1)
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
        desk.kill()
        desk.wait()
    child.wait(timeout=10)


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import sys; sys.exit(7)", "exit code 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os, sys; os.write(int(sys.argv[4]), b'nonsense\\n'); input()", "not an event"),
    ],
)
def test_every_way_to_die_has_a_message(
    options: TrainerOptions, make_run: MakeRun, program: str, error: str
) -> None:
    trainer = TrainerProcess(
        options, _environment(), stall_seconds=60, command=(sys.executable, "-c", program)
    )
    with pytest.raises(WorkerCrashed, match=error):
        _run(trainer, make_run())
    trainer.close()


def test_a_child_that_dies_idle_is_replaced_but_not_again_and_again(
    options: TrainerOptions,
) -> None:
    metrics = Metrics()
    trainer = TrainerProcess(
        options,
        _environment(),
        stall_seconds=60,
        command=(sys.executable, "-c", "import time; time.sleep(600)"),
        metrics=metrics,
    )
    trainer.revive()
    assert not _lives(trainer), "nobody has started it yet"
    trainer.start()
    first = trainer.pid
    trainer.revive()
    assert _lives(trainer) and trainer.pid == first
    _kill(trainer)
    trainer.revive()
    assert _lives(trainer) and trainer.pid != first
    assert metrics.registry.get_sample_value("training_server_trainer_restarts_total") == 1
    _kill(trainer)
    trainer.revive()
    assert not _lives(trainer), "it has just been replaced"
    trainer.close()
    trainer.start()
    assert not _lives(trainer), "nothing comes to life after the end"


def _lives(trainer: TrainerProcess) -> bool:
    return trainer.pid is not None


def _kill(trainer: TrainerProcess) -> None:
    assert trainer.pid
    os.kill(trainer.pid, signal.SIGKILL)
    while _lives(trainer):
        time.sleep(0.01)


LAST_WORDS = """
import faulthandler, os, signal
faulthandler.enable()
os.write(2, b'{"event": "epoch_done", "level": "info"}\\n')
os.write(2, b'{"event": "hub_refused", "reason": "token a-token-of-a-mirror"}\\n')
os.write(2, b"tempfile.tif: Using code not yet in table.\\n")
os.write(2, b"sent Bearer abcdefgh12345678")
os.kill(os.getpid(), signal.SIGSEGV)
"""
DESK = """
import sys
from consumer.trainer.trainer_process import TrainerProcess
from jobs.kinds import TrainerOptions
from utils import logger
logger.configure()
trainer = TrainerProcess(
    TrainerOptions("model"),
    {},
    stall_seconds=60,
    command=(sys.executable, "-c", sys.argv[1]),
    secrets=["a-token-of-a-mirror"],
)
trainer.start()
trainer.close()
"""


def test_everything_that_the_process_writes_until_its_end_is_a_line_of_the_log() -> None:
    desk = subprocess.run(
        [sys.executable, "-c", DESK, LAST_WORDS],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in desk.stderr.splitlines()]
    assert {"event": "epoch_done", "level": "info"} in lines
    assert {"event": "hub_refused", "reason": "token [redacted]"} in lines
    written = [line["text"] for line in lines if line["event"] == "native_stderr"]
    assert written[0] == "tempfile.tif: Using code not yet in table."
    assert written[1].startswith("sent Bearer [redacted]")
    assert "Segmentation fault" in " ".join(written)


STALLS = """
import json, os, sys, time
out = int(sys.argv[4])
for step in (1, 2, 3):
    os.write(out, json.dumps({"kind": "Progress", "task_id": "task-1", "stage": "training",
        "done": step, "total": 9}).encode() + b"\\n")
    time.sleep(0.2)
time.sleep(60)
"""


def test_a_trainer_that_stops_making_steps_is_replaced(
    options: TrainerOptions, make_run: MakeRun
) -> None:
    trainer = TrainerProcess(
        options, _environment(), stall_seconds=1, command=(sys.executable, "-c", STALLS)
    )
    began = time.monotonic()
    with pytest.raises(WorkerCrashed, match="no step for 1 seconds"):
        _run(trainer, make_run())
    assert time.monotonic() - began < 15
    trainer.close()


SILENT = "import time; time.sleep(60)"


def test_a_trainer_that_never_sends_an_event_is_replaced_too(
    options: TrainerOptions, make_run: MakeRun
) -> None:
    trainer = TrainerProcess(
        options, _environment(), stall_seconds=0.1, command=(sys.executable, "-c", SILENT)
    )
    began = time.monotonic()
    with pytest.raises(WorkerCrashed, match="sent no event for 1 seconds"):
        _run(trainer, make_run())
    assert time.monotonic() - began < 15
    trainer.close()


def test_a_trainer_that_hangs_during_a_shutdown_leaves_the_time_for_the_record(
    options: TrainerOptions, make_run: MakeRun
) -> None:
    trainer = TrainerProcess(
        options, _environment(), stall_seconds=60, command=(sys.executable, "-c", SILENT)
    )
    stop = StopSignal()
    stop.request(StopReason.SHUTDOWN)
    trainer.start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        _run(trainer, make_run(), stop=stop, max_seconds=60, patience=0.0)
    assert time.monotonic() - began < 1.5
    trainer.close()


def test_a_stop_from_another_thread_while_nothing_happens_is_safe(
    trainer: TrainerProcess, make_run: MakeRun
) -> None:
    stop = StopSignal()
    threading.Timer(0.3, lambda: stop.request(StopReason.CANCELLED)).start()
    try:
        finished = _run(trainer, make_run(epochs=1000), stop=stop)
    except TrainingServerError as error:
        pytest.fail(str(error))
    assert finished.stopped is StopReason.CANCELLED


def _tensors(path: Path) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in load_file(path).items()}
