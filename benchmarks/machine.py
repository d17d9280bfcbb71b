"""The machine that the figures were measured on, and what the machine can do at most."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

TERAFLOP = {False: 1.72, True: 2.34}
"""Of a LoRA's forward and backward pass on SD1.5, for an image of 512 x 512 pixels, without and
with gradient checkpointing; counted once with `torch.utils.flop_counter`."""


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Teraflops a second of a large matrix product: the most that any loop could reach.

    Args:
        device: The device. On a CPU the matrices are small.
        dtype: Of the matrices.
    """
    side = 8192 if device.type == "cuda" else 1024
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    rates = []
    for _ in range(8):
        began = time.perf_counter()
        for _ in range(5):
            left @ right  # pylint: disable=pointless-statement
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(5 * 2 * side**3 / (time.perf_counter() - began) / 1e12)
    return statistics.median(rates[2:])


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, for the record."""
    load = os.getloadavg()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(load, 2),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        **{name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
