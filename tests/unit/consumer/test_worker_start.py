"""The start of a worker: settings that no job could be done with are refused at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import config
from consumer import worker
from consumer.life.stop_signal import Shutdown
from consumer.pages.condition import Condition
from consumer.worker import run_worker
from jobs import kinds
from jobs.record import JobRecord
from services.broker.outbox import Outbox
from services.broker.settlement import Queue
from services.records.sweep import RecordSweep
from tests.unit.consumer.job_world import World, delivery
from utils.errors import ConfigurationError


def test_a_local_base_model_of_another_family_is_refused_before_the_machine_is_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    settings = config.load(
        _env_file=None,
        backend_api_url="https://backend.example",
        internal_api_token="t" * 32,
        aws_storage_bucket_name="media",
        base_model=str(tmp_path),
        http_port=0,
    )
    monkeypatch.setattr("consumer.worker.require_fit", lambda *_, **__: pytest.fail("was tested"))
    with pytest.raises(ConfigurationError, match="is Stable Diffusion XL.*Set BASE_MODEL"):
        run_worker(settings, Shutdown(1.0))


def test_a_worker_takes_the_queue_of_each_kind_and_its_sweep_looks_at_that_of_the_records_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(kinds.REGISTRY, "toy", "tests.toy.kind:ToyKind")
    world = World(tmp_path / "one")
    world.pipeline.handle(delivery())
    toys = Queue.of_kind("toy")
    queues: list[Queue] = []
    may_wait: list[Callable[[JobRecord], bool]] = []

    class Sweep(RecordSweep):
        """The sweep, which shows its question about a queue."""

        def __init__(self, *args: Any, **how: Any) -> None:
            super().__init__(*args, **how)
            may_wait.append(how["may_wait"])

    def consumer(*_: Any, **how: Any) -> Any:
        """A consumer without a broker."""
        queues.extend(how["queues"])
        return SimpleNamespace(publish=world.broker.publish, run=lambda: None)

    monkeypatch.setattr(worker, "RecordSweep", Sweep)
    monkeypatch.setattr(worker, "training_consumer", consumer)
    served = {"kinds": ("style", "toy")}
    settings = world.settings.model_copy(
        update={"worker": world.settings.worker.model_copy(update=served)}
    )
    condition = Condition(
        world.observer,
        world.shutdown.event,
        first_kind=settings.kinds().of("style"),
        base_model="none",
        queue="q",
    )
    # pylint: disable-next=protected-access
    worker._take_jobs(settings, world.pipeline._desk, condition, Outbox(), None)
    assert queues == [Queue.TRAINING, toys]
    for queue, kind, other in ((toys, "toy", "style"), (Queue.TRAINING, "style", "toy")):
        world.observer.queues.lost_sight()
        world.observer.queues.looked(queue, 0, 1)
        assert not may_wait[0](dataclasses.replace(world.record(), kind=kind))
        assert may_wait[0](dataclasses.replace(world.record(), kind=other))


@pytest.mark.parametrize(
    ("kinds_served", "wanted", "gpus", "processes"),
    [
        ("llm", "2", 2, 2),
        ("llm", "2", 0, 2),
        ("style,llm", "auto", 4, 4),
        ("llm", "auto", 0, 1),
        ("style", "auto", 4, 1),
        ("style", "1", 4, 1),
    ],
)
def test_several_processes_are_for_kinds_that_can_use_them(
    kinds_served: str, wanted: str, gpus: int, processes: int
) -> None:
    settings = _settings(kinds=kinds_served, trainer_processes=wanted)
    assert settings.trainer_processes(gpus) == processes


@pytest.mark.parametrize(
    ("kinds_served", "wanted", "gpus", "sentence"),
    [
        ("style", "2", 2, "only llm can train on several GPUs, and KINDS has style"),
        ("llm", "3", 2, "needs a GPU for each process, and the trainer may see 2"),
    ],
)
def test_a_worker_refuses_processes_that_it_cannot_use(
    kinds_served: str, wanted: str, gpus: int, sentence: str
) -> None:
    settings = _settings(kinds=kinds_served, trainer_processes=wanted)
    with pytest.raises(ConfigurationError, match=sentence):
        settings.trainer_processes(gpus)


@pytest.mark.parametrize("wrong", ["0", "65", "some", "1.5"])
def test_a_wrong_number_of_processes_is_refused_at_start(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="TRAINER_PROCESSES"):
        _settings(trainer_processes=wrong)


def test_processes_share_the_cores_and_stay_on_this_machine() -> None:
    one = _settings().trainer_environment()
    two = _settings().trainer_environment(processes=2)
    assert int(two["OMP_NUM_THREADS"]) == max(1, int(one["OMP_NUM_THREADS"]) // 2)
    assert two["GLOO_SOCKET_IFNAME"] == two["NCCL_SOCKET_IFNAME"] == "lo"
    assert _settings(omp_num_threads="3").trainer_environment(processes=2)["OMP_NUM_THREADS"] == "3"
    assert not _settings().trainer_confinement().among_themselves
    assert _settings().trainer_confinement(processes=2).among_themselves


def _settings(**changed: Any) -> config.Settings:
    return config.load(
        _env_file=None,
        backend_api_url="https://backend.example",
        internal_api_token="t" * 32,
        aws_storage_bucket_name="media",
        **changed,
    )
