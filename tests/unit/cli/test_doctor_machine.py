"""The doctor's findings about the GPU."""

from __future__ import annotations

import pytest

import config
from cli.doctor import machine
from cli.doctor.findings import Verdict
from consumer.trainer.machine import Machine

SETTINGS = config.load(
    _env_file=None,
    backend_api_url="https://backend.example",
    internal_api_token="t" * 32,
    aws_storage_bucket_name="media",
)


@pytest.mark.parametrize(
    ("capability", "verdict"),
    [("6.1", Verdict.WARN), ("7.0", Verdict.OK), ("12.0", Verdict.OK), ("", Verdict.OK)],
)
def test_a_gpu_older_than_compute_capability_7_0_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capability: str, verdict: Verdict
) -> None:
    gpu = Machine(cuda=True, device="a GPU", capability=capability)
    monkeypatch.setattr(machine, "check_machine", lambda _: gpu)
    finding = next(machine.examine_gpu(SETTINGS))
    assert finding.verdict is verdict
    assert bool(finding.remedy) is (verdict is Verdict.WARN)
