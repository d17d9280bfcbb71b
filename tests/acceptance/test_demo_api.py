"""`scripts/demo --api` on this machine: two styles over the API, on private servers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.worker_process import ROOT

SEEN = (
    "asked to pause the first style",
    "the worker has put the first style down and taken the second",
    "the second style was cancelled by its worker",
    "asked to resume the first style",
    "the stream had every event of the job once, in order",
    "downloaded ft:sd15:org_demo:harbour:",
    "SIGTERM: the worker ended with exit code 0",
    "SIGTERM: the API ended with exit code 0",
    "queued → running → pausing → paused → queued → running → succeeded",
    "The base model is a stand-in",
)


@pytest.mark.timeout(400)
def test_the_demo_of_the_api_ends_by_itself_and_prints_what_it_saw(tmp_path: Path) -> None:
    output = tmp_path / "output"
    done = subprocess.run(
        [sys.executable, "-m", "sandbox.demo", "--api", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    places = [done.stdout.find(each) for each in SEEN]
    assert -1 not in places and places == sorted(places), done.stdout
    report = json.loads((output / "training_report.json").read_bytes())
    assert any("stand-in" in each for each in report["machine_warnings"])
    assert (output / "lora_weights.safetensors").stat().st_size > 1000
