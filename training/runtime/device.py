"""The device that training runs on: which one, in which precision, and what its errors mean."""

from __future__ import annotations

import collections
import contextlib
import gc
import logging
import resource
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from utils.errors import GpuBroken, GpuOutOfMemory, TrainingServerError

log = logging.getLogger(__name__)

NO_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "can't allocate memory",
)
"""Messages of the libraries below torch for a lack of memory."""
NO_DEVICE = (
    "CUDA error",
    "CUDA driver error",
    "cuDNN error",
    "CUDNN_STATUS",
    "CUBLAS_STATUS",
    "NVML",
)
"""Their messages for a device that does not compute."""

MOST_STEPS_AHEAD = 2

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}


def choose_device(
    mixed_precision: str, *, allow_cpu: bool
) -> tuple[torch.device, torch.dtype, tuple[str, ...]]:
    """The device, the dtype of the frozen base on it, and warnings for the report.

    Raises:
        GpuBroken: There is no CUDA device, and the CPU is not allowed.
    """
    if torch.cuda.is_available():
        if mixed_precision == "bf16" and not torch.cuda.is_bf16_supported():
            sentence = "This GPU cannot compute in bf16; training runs in fp16 instead."
            log.warning("bf16_unsupported", extra={"reason": sentence})
            return torch.device("cuda"), torch.float16, (sentence,)
        return torch.device("cuda"), DTYPES[mixed_precision], ()
    if not allow_cpu:
        raise GpuBroken(
            "No CUDA GPU can be used on this machine. Check the driver with nvidia-smi (in a "
            "container, start it with --gpus all), or set ALLOW_CPU=true to train on the CPU, "
            "which is very slow."
        )
    # Only for the report: the front desk logs it.
    sentence = "There is no CUDA GPU: training runs on the CPU in fp32, which is slow."
    return torch.device("cpu"), torch.float32, (sentence,)


def use_deterministic_algorithms() -> None:
    """Compute the same bits each time from now on, at the cost of speed.

    An operation that has no such algorithm raises an error instead. The environment must have
    `CUBLAS_WORKSPACE_CONFIG`, which cuBLAS reads when it starts; see `utils.settings.surroundings`.
    """
    torch.use_deterministic_algorithms(True)
    # The benchmark may choose another algorithm in each process.
    torch.backends.cudnn.benchmark = False


def gpu_error(error: BaseException) -> TrainingServerError | None:
    """The error of the device behind an exception: `GpuOutOfMemory`, `GpuBroken` or None."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in NO_MEMORY)
    ):
        return GpuOutOfMemory(
            "There is not enough memory for this training; lower batch_size or resolution, or turn "
            "gradient checkpointing on."
        )
    if isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in NO_DEVICE)
    ):
        return GpuBroken(f"The GPU does not compute any more ({text.splitlines()[0][:200]}).")
    return None


@contextlib.contextmanager
def device_errors_as_ours() -> Iterator[None]:
    """Raise the errors of the device as errors of `utils.errors`, after they are logged."""
    try:
        yield
    except TrainingServerError:
        raise
    except Exception as error:
        if not (known := gpu_error(error)):
            raise
        log.error("run_failed", exc_info=error)
        raise known from error


@contextlib.contextmanager
def one_run_accelerator(device: torch.device, dtype: torch.dtype) -> Iterator[Accelerator]:
    """An Accelerator for one run.

    Accelerate keeps its state in class attributes, and the next run of this process must not find
    it: another precision would be refused.
    """
    precision = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype, "no")
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu")
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        AcceleratorState._reset_state(True)  # pylint: disable=protected-access
        GradientState._reset_state()  # pylint: disable=protected-access


def prefer_speed(device: torch.device) -> None:
    """Let cuDNN try its convolutions once for each shape and keep the fastest one.

    Training has few shapes: at most 24 frames. If torch must be deterministic, the choice would
    differ from run to run, so nothing is changed.
    """
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        torch.backends.cudnn.benchmark = True


@contextlib.contextmanager
def tf32(device: torch.device, *, enabled: bool = True) -> Iterator[None]:
    """Within the block, float32 matrix products on a GPU round their factors to TF32 (10 bits).

    Convolutions do so by torch's default. Latents and samples are far coarser than that.
    """
    before = torch.get_float32_matmul_precision()
    if enabled and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Pace:
    """Keeps the host no more than two steps ahead of the GPU, so that a stop is obeyed that soon.

    The GPU always has the next step's work: nothing waits for nothing to do.

    Args:
        device: The device of the steps. On a CPU the host is never ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ends: collections.deque[torch.cuda.Event] = collections.deque()

    def keep(self) -> None:
        """A step has been launched."""
        if self._device.type != "cuda":
            return
        end = torch.cuda.Event()  # type: ignore[no-untyped-call]
        end.record(torch.cuda.current_stream(self._device))
        self._ends.append(end)
        if len(self._ends) > MOST_STEPS_AHEAD:
            self._ends.popleft().synchronize()


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that the GPU or the machine has too little memory."""
    return isinstance(gpu_error(error), GpuOutOfMemory)


def free_memory(device: torch.device) -> None:
    """Free the memory of objects that are no longer referenced, after breaking up cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocated_bytes(device: torch.device) -> int | None:
    """Bytes of the GPU that tensors use now, by torch's allocator; None without CUDA."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else None


def reserved_bytes(device: torch.device) -> int | None:
    """Bytes of the GPU that torch's allocator holds, free ones included; None without CUDA."""
    return int(torch.cuda.memory_reserved(device)) if device.type == "cuda" else None


def available_bytes(device: torch.device) -> int:
    """Bytes of the GPU that tensors of this process can still take."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + int(held)


def peak_memory_bytes(device: torch.device) -> int:
    """The GPU's peak by torch's allocator; without CUDA the process's largest resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
