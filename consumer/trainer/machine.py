"""Tests whether this machine can train: at the start, and after a run reports a broken GPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from utils.errors import GpuBroken

_ROOT = Path(__file__).resolve().parents[2]
_TIMEOUT_SECONDS = 120.0


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """The machine that trains.

    Attributes:
        cuda: There is a GPU, and it computes.
        device: The GPU's name, or `cpu`.
        count: The GPUs that the trainer may see; it uses the first.
        memory_bytes: The GPU's memory.
        problem: A sentence about a broken GPU; None if it works or is absent.
        capability: The GPU's compute capability, such as `8.6`; empty without a GPU.
    """

    cuda: bool
    device: str
    count: int = 0
    memory_bytes: int | None = None
    problem: str | None = None
    capability: str = ""


def check_machine(environment: Mapping[str, str]) -> Machine:
    """Test the GPU in a separate process.

    Args:
        environment: The trainer process's environment, so that the same GPU is tested.

    Raises:
        GpuBroken: The test crashed or hung.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "training.runtime.machine_check"],
            cwd=_ROOT,
            env=dict(environment),
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise GpuBroken(
            f"the GPU test did not end within {_TIMEOUT_SECONDS:.0f} s: the driver hangs; "
            "restart the machine"
        ) from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        raise GpuBroken(
            f"the GPU test failed: {lines[-1] if lines else error}; check the GPU with nvidia-smi"
        ) from error
    return Machine(**json.loads(done.stdout.splitlines()[-1]))


def require_fit(environment: Mapping[str, str], *, allow_cpu: bool) -> Machine:
    """Return the machine if it may train.

    Raises:
        GpuBroken: No GPU computes, and the CPU is not allowed. The message names the remedy.
    """
    machine = check_machine(environment)
    if machine.problem:
        raise GpuBroken(
            f"the GPU ({machine.device}) does not compute: {machine.problem}; check it with "
            "nvidia-smi, or use another machine"
        )
    if not machine.cuda and not allow_cpu:
        raise GpuBroken(
            "no CUDA GPU was found: start the container with a GPU (`--gpus all`, or a GPU pod) "
            "and a driver that fits, or set ALLOW_CPU=true to train slowly on the CPU"
        )
    return machine
