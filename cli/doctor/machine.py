"""The machine: its GPU, memory and disks."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from cli.doctor.findings import Finding, fail, ok, warn
from config import Settings
from consumer.trainer.machine import check_machine
from utils.confined import LEAST_ABI, landlock_version
from utils.errors import GpuBroken
from utils.gpu_monitor import GpuMonitor, GpuReading

GIB = 1024**3
_ENOUGH_GPU = 6 * GIB
_ENOUGH_RAM = 8 * GIB
_ENOUGH_DISK = 5 * GIB
_LEAST_DISK = 1 * GIB
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def examine_gpu(settings: Settings) -> list[Finding]:
    """Does the GPU compute, in a process like the trainer's, and is there room on it?"""
    check = "GPU"
    try:
        machine = check_machine(settings.trainer_environment())
    except GpuBroken as error:
        return [fail(check, str(error), "restart the machine, or take another")]
    if machine.problem:
        return [
            fail(
                check,
                f"{machine.device} does not compute: {machine.problem}",
                "nvidia-smi should work here, and the driver fit the CUDA release that the "
                "Dockerfile names; else restart the machine, or take another",
            )
        ]
    if not machine.cuda:
        if settings.allow_cpu:
            detail = "none; ALLOW_CPU=true trains on the CPU, in fp32 and very slowly"
            return [warn(check, detail, "start it with a GPU (docker run --gpus all)")]
        return [
            fail(
                check,
                "none was found",
                "start the container with a GPU (docker run --gpus all, or a GPU pod), or set "
                "ALLOW_CPU=true to train slowly on the CPU",
            )
        ]
    return [ok(check, f"{machine.device} computes"), *_room_on_the_gpus()]


def _room_on_the_gpus() -> list[Finding]:
    monitor = GpuMonitor()
    try:
        driver = monitor.driver_version() or "unknown"
        return [_room(reading, driver) for reading in monitor.read()]
    finally:
        monitor.stop()


def _room(reading: GpuReading, driver: str) -> Finding:
    free = reading.memory_total_bytes - reading.memory_used_bytes
    check = f"GPU {reading.index} memory"
    detail = f"{_gib(free)} of {_gib(reading.memory_total_bytes)} free, driver {driver}"
    if free < _ENOUGH_GPU:
        return warn(
            check,
            detail,
            "end what else uses it (nvidia-smi), or keep GRADIENT_CHECKPOINTING=true, BATCH_SIZE=1 "
            "and a RESOLUTION of 512 or less",
        )
    return ok(check, detail)


def examine_memory(_settings: Settings) -> list[Finding]:
    """The RAM that this process may use."""
    limit = memory_limit()
    detail = f"{_gib(limit)}"
    if limit < _ENOUGH_RAM:
        remedy = f"give the container {_gib(_ENOUGH_RAM)}: loading Stable Diffusion needs about 6"
        return [warn("RAM", detail, remedy)]
    return [ok("RAM", detail)]


def examine_confinement(_settings: Settings) -> list[Finding]:
    """Can the trainer be kept away from files with secrets?"""
    check = "trainer's confinement"
    version = landlock_version()
    if version < LEAST_ABI:
        detail = (
            "this kernel does not offer Landlock: code in the trainer could read .env, keys in the "
            "home folder and other processes of this user"
        )
        remedy = (
            "use Linux 5.19 or newer, with a seccomp profile that allows landlock_*, or run the "
            "worker as a user of its own without such files"
        )
        return [warn(check, detail, remedy)]
    if os.geteuid() == 0:
        detail = f"Landlock {version}, but the worker would run as root, who may open disks"
        return [warn(check, detail, "run the worker as a user of its own")]
    return [ok(check, f"Landlock {version}: the trainer cannot read files with secrets")]


def memory_limit() -> int:
    """Bytes of RAM: the container's limit, or the machine's size where it has none."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max": no limit
            return min(total, int(text))
    return total


def examine_disk(settings: Settings) -> list[Finding]:
    """The folder for the job in hand: can it be written, is there room?

    Where it is not there yet, the nearest folder above it is tried: made here, it would belong to
    whoever runs the doctor, who may not be the worker's user.
    """
    folder = (settings.work_dir or Path(tempfile.gettempdir()) / "training-server").resolve()
    check = "disk (WORK_DIR)"
    present = next(each for each in (folder, *folder.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=present) as file:
            file.write(b"doctor")
            file.flush()
    except OSError as error:
        remedy = "set WORK_DIR to a folder that this user may write"
        return [fail(check, f"{present} cannot be written: {error.strerror}", remedy)]
    return [_room_on_disk(check, folder, shutil.disk_usage(present).free)]


def _room_on_disk(check: str, folder: Path, free: int) -> Finding:
    detail = f"{_gib(free)} free for {folder}"
    remedy = f"make room, or set WORK_DIR elsewhere: {_gib(_ENOUGH_DISK)} are enough as a rule"
    if free < _LEAST_DISK:
        return fail(check, detail, remedy)
    return warn(check, detail, remedy) if free < _ENOUGH_DISK else ok(check, detail)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
