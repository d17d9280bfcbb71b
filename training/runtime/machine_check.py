"""`python -m training.runtime.machine_check`: tests whether this machine computes.

It prints one line of JSON.

Only the end of a process frees a broken CUDA context, so the test runs in a separate process.
"""

from __future__ import annotations

import json
import sys

import torch


def check() -> dict[str, str | int | bool | None]:
    """Multiply two matrices on the GPU, if there is one, and compare with the known result.

    Returns:
        `cuda` (there is a usable GPU), `device` (its name), `memory_bytes` (its size),
        `capability` (its compute capability), `problem` (why it cannot be used, else None) and
        `count` (of all GPUs). A machine without a GPU has no problem.
    """
    if not torch.cuda.is_available():
        return {"cuda": False, "device": "cpu", "memory_bytes": None, "problem": None, "count": 0}
    try:
        device = torch.cuda.get_device_properties(0)
        ones = torch.ones(256, 256, device="cuda", dtype=torch.float16)
        wrong = int((ones @ ones != 256).sum().item())
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        return {
            "cuda": False,
            "device": "cuda",
            "memory_bytes": None,
            "problem": first_line,
            "count": 0,
        }
    problem = f"{wrong} of 65536 products came out wrong" if wrong else None
    return {
        "cuda": not wrong,
        "device": device.name,
        "memory_bytes": device.total_memory,
        "problem": problem,
        "count": torch.cuda.device_count(),
        "capability": f"{device.major}.{device.minor}",
    }


if __name__ == "__main__":
    json.dump(check(), sys.stdout)
    print()
