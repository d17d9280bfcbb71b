"""Checks of the machine: GPU, memory, disk and the confinement of the trainer."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from cli.doctor.findings import Finding, fail, ok, warn
from consumer.trainer.machine import Machine, check_machine
from utils.confined import LEAST_ABI, landlock_version
from utils.errors import ConfigurationError, GpuBroken
from utils.gpu_monitor import GpuMonitor

GIB = 1024**3
_ENOUGH_GPU = 6 * GIB
_LEAST_CAPABILITY = 7.0  # the first GPUs with tensor cores
_ENOUGH_RAM = 8 * GIB
_ENOUGH_DISK = 5 * GIB
_LEAST_DISK = 1 * GIB
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_NO_GPU = "Start the container with a GPU (docker run --gpus all, or a GPU pod)"


def examine_gpu(
    environment: Mapping[str, str],
    *,
    allow_cpu: bool,
    needed: bool = True,
    processes: Callable[[int], int] = lambda _: 1,
) -> Iterator[Finding]:
    """Compute on the GPU, in a process like the trainer's, and read its free memory.

    Args:
        environment: The trainer process's environment.
        allow_cpu: Whether training on the CPU is allowed.
        needed: Whether a kind of `KINDS` needs a GPU.
        processes: The trainer's processes on a machine with so many GPUs. It raises
            `ConfigurationError` if the settings do not fit.
    """
    check = "GPU"
    try:
        machine = check_machine(environment)
    except GpuBroken as error:
        yield fail(check, str(error), "Restart the machine, or take another one.")
        return
    if machine.problem:
        yield fail(
            check,
            f"{machine.device} does not compute: {machine.problem}",
            "Check that nvidia-smi works here and that the driver fits the CUDA release in the "
            "Dockerfile. If both do, restart the machine or take another one.",
        )
    elif machine.cuda:
        yield _capability(machine)
        yield from _gpu_memory()
    elif not needed:
        yield ok(check, "No GPU was found, and no kind of KINDS needs one.")
    elif allow_cpu:
        detail = "No GPU was found. ALLOW_CPU=true trains on the CPU, in fp32 and very slowly."
        yield warn(check, detail, f"{_NO_GPU}.")
    else:
        remedy = f"{_NO_GPU}, or set ALLOW_CPU=true to train slowly on the CPU."
        yield fail(check, "No GPU was found.", remedy)
    yield from _examine_processes(machine, processes)


def _examine_processes(machine: Machine, processes: Callable[[int], int]) -> Iterator[Finding]:
    check = "TRAINER_PROCESSES"
    try:
        count = processes(machine.count)
    except ConfigurationError as error:
        detail, _, remedy = str(error).partition(". ")
        yield fail(check, f"{detail}.", remedy)
        return
    if count > 1 and not machine.count:
        detail = f"{count} processes share the CPU, which is slower than one process."
        yield warn(check, detail, "Remove TRAINER_PROCESSES, except for a trial.")
    elif count > 1:
        yield ok(check, f"{count} of {machine.count} GPUs train a language model together.")
    elif machine.count > 1:
        yield warn(
            check,
            f"The trainer may see {machine.count} GPUs and uses one.",
            "Start one worker for each GPU (CUDA_VISIBLE_DEVICES), or set TRAINER_PROCESSES=auto "
            "for language models.",
        )


def _capability(machine: Machine) -> Finding:
    detail = f"{machine.device} computes; compute capability {machine.capability or 'unknown'}."
    if not machine.capability or float(machine.capability) >= _LEAST_CAPABILITY:
        return ok("GPU", detail)
    remedy = f"Take a GPU of compute capability {_LEAST_CAPABILITY} (Volta, Turing) or newer."
    return warn("GPU", f"{detail} It has no fast fp16, and training is slow.", remedy)


def _gpu_memory() -> Iterator[Finding]:
    monitor = GpuMonitor()
    try:
        driver = monitor.driver_version() or "unknown"
        for reading in monitor.read():
            total = reading.memory_total_bytes
            free = total - reading.memory_used_bytes
            check = f"GPU {reading.index} memory"
            detail = f"{_gib(free)} of {_gib(total)} are free; driver {driver}."
            if free >= _ENOUGH_GPU:
                yield ok(check, detail)
                continue
            yield warn(
                check,
                detail,
                "End other programs that use the GPU (see nvidia-smi), or keep "
                "GRADIENT_CHECKPOINTING=true, BATCH_SIZE=1 and a RESOLUTION of 512 or less.",
            )
    finally:
        monitor.stop()


def examine_memory() -> Iterator[Finding]:
    """Compare the RAM that this process may use with what loading the model needs."""
    limit = memory_limit()
    detail = f"This process may use {_gib(limit)}."
    if limit >= _ENOUGH_RAM:
        yield ok("RAM", detail)
    else:
        remedy = f"Give the container {_gib(_ENOUGH_RAM)}. Loading Stable Diffusion needs about 6."
        yield warn("RAM", detail, remedy)


def memory_limit() -> int:
    """Bytes of RAM: the container's limit, or the machine's size if there is no limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():  # "max" means no limit
            return min(total, int(text))
    return total


def examine_confinement() -> Iterator[Finding]:
    """Test whether the trainer can be kept away from files with secrets."""
    check = "trainer's confinement"
    version = landlock_version()
    if version < LEAST_ABI:
        yield warn(
            check,
            "This kernel does not offer Landlock: code in the trainer could read .env, keys in "
            "the home folder and other processes of this user.",
            "Use Linux 5.19 or newer with a seccomp profile that allows landlock_*, or run the "
            "worker as a separate user without such files.",
        )
    elif os.geteuid() == 0:
        detail = f"Landlock {version} works, but root may still open disk devices."
        yield warn(check, detail, "Run the worker as a separate user, not as root.")
    else:
        yield ok(check, f"Landlock {version}: the trainer cannot read files with secrets.")


def examine_disk(work_dir: Path | None) -> Iterator[Finding]:
    """Write to the folder of jobs and read its free space.

    If the folder does not exist, the nearest folder above it is tested. The doctor does not make
    it, because it would belong to the user who runs the doctor.
    """
    check = "disk (WORK_DIR)"
    folder = (work_dir or Path(tempfile.gettempdir()) / "training-server").resolve()
    present = next(filter(Path.exists, (folder, *folder.parents)), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=present) as file:
            file.write(b"doctor")
            file.flush()
    except OSError as error:
        detail = f"{present} cannot be written: {error.strerror}."
        yield fail(check, detail, "Set WORK_DIR to a folder that this user may write.")
        return
    free = shutil.disk_usage(present).free
    detail = f"{_gib(free)} are free for {folder}."
    remedy = f"Free space, or set WORK_DIR to a disk with {_gib(_ENOUGH_DISK)} free."
    if free >= _ENOUGH_DISK:
        yield ok(check, detail)
    else:
        yield (fail if free < _LEAST_DISK else warn)(check, detail, remedy)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
