"""How many threads training may use on a CPU."""

from __future__ import annotations

import math
import os
from pathlib import Path

MOST_THREADS = 16
"""The tensors of a few images are too small for more threads."""

_CPUS = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


def training_threads() -> int:
    """The physical cores that this process may use, by its affinity and its container's quota.

    Libraries count the machine's: in a container with 2 of 64 cores they would start 64 threads.
    """
    return max(1, int(min(MOST_THREADS, _cores(), _quota())))


def _cores() -> int:
    """Physical cores among the allowed CPUs; two hyper-threads of a core count once."""
    allowed = os.sched_getaffinity(0)
    return len({_siblings(cpu) for cpu in allowed})


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text("ascii").strip()
    except OSError:  # not shown in every container: the CPU then counts as a core
        return str(cpu)


def _quota() -> float:
    """The CPUs that the container's quota allows, with all groups around it."""
    folders = [_CGROUPS, _CGROUPS / "cpu"]
    try:
        for line in _OWN_CGROUP.read_text("utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            root = _CGROUPS / "cpu" if "cpu" in controllers.split(",") else _CGROUPS
            folder = root / path.strip("/")
            folders += [each for each in (folder, *folder.parents) if _CGROUPS in each.parents]
    except (OSError, ValueError):
        pass
    return min((_quota_of(folder) for folder in folders), default=math.inf)


def _quota_of(folder: Path) -> float:
    try:
        limit, period = (folder / "cpu.max").read_text("ascii").split()  # cgroup v2
    except (OSError, ValueError):
        try:
            limit = (folder / "cpu.cfs_quota_us").read_text("ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text("ascii").strip()
        except (OSError, ValueError):
            return math.inf
    if not limit.isdigit() or not period.isdigit() or int(period) == 0:  # "max", or -1
        return math.inf
    # Less than one CPU is one thread that is throttled.
    return max(1.0, int(limit) / int(period))
