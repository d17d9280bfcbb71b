"""The doctor's findings about the GPU."""

from __future__ import annotations

import pytest

from cli.doctor import machine
from cli.doctor.findings import Verdict
from consumer.trainer.machine import Machine
from utils.settings.groups import TrainerSettings


@pytest.mark.parametrize(
    ("capability", "verdict"),
    [("6.1", Verdict.WARN), ("7.0", Verdict.OK), ("12.0", Verdict.OK), ("", Verdict.OK)],
)
def test_a_gpu_older_than_compute_capability_7_0_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capability: str, verdict: Verdict
) -> None:
    gpu = Machine(cuda=True, device="a GPU", capability=capability)
    monkeypatch.setattr(machine, "check_machine", lambda _: gpu)
    finding = next(machine.examine_gpu({}, allow_cpu=False))
    assert finding.verdict is verdict
    assert bool(finding.remedy) is (verdict is Verdict.WARN)


@pytest.mark.parametrize(("needed", "verdict"), [(True, Verdict.FAIL), (False, Verdict.OK)])
def test_a_missing_gpu_is_a_problem_only_if_a_kind_needs_one(
    monkeypatch: pytest.MonkeyPatch, needed: bool, verdict: Verdict
) -> None:
    monkeypatch.setattr(machine, "check_machine", lambda _: Machine(cuda=False, device="cpu"))
    (finding,) = machine.examine_gpu({}, allow_cpu=False, needed=needed)
    assert finding.verdict is verdict


@pytest.mark.parametrize(
    ("wanted", "gpus", "verdict"),
    [
        ("4", 2, Verdict.FAIL),
        ("2", 2, Verdict.OK),
        ("auto", 2, Verdict.OK),
        ("1", 2, Verdict.WARN),
        ("2", 0, Verdict.WARN),
        ("1", 1, None),
        ("auto", 0, None),
    ],
)
def test_more_processes_than_gpus_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpus: int, verdict: Verdict | None
) -> None:
    gpu = Machine(cuda=gpus > 0, device="a GPU", count=gpus, capability="8.0")
    monkeypatch.setattr(machine, "check_machine", lambda _: gpu)
    monkeypatch.setattr(machine, "_gpu_memory", lambda: iter(()))
    trainer = TrainerSettings(trainer_processes=wanted)  # type: ignore[arg-type]  # read from a text
    found = machine.examine_gpu({}, allow_cpu=True, processes=trainer.processes_on)
    verdicts = [each.verdict for each in found if each.check == "TRAINER_PROCESSES"]
    assert verdicts == ([verdict] if verdict else [])
