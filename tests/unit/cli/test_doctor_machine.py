"""The doctor's findings about the GPU."""

from __future__ import annotations

import pytest

from cli.doctor import machine
from cli.doctor.findings import Verdict
from consumer.trainer.machine import Machine


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
