"""What the GPUs are doing: memory, utilisation, temperature and power, through NVIDIA's NVML."""

from __future__ import annotations

import dataclasses
import logging
import threading
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one moment.

    Attributes:
        index: NVML's index, which CUDA_VISIBLE_DEVICES does not change.
        name: As the driver calls it.
        memory_used_bytes, memory_total_bytes: Of all processes.
        utilisation_percent: Part of the last sample period in which a kernel ran; None where it
            cannot be read.
        temperature_celsius: Of the chip; None where it cannot be read.
        power_watts: Drawn now; None where it cannot be read.
    """

    index: int
    name: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilisation_percent: int | None
    temperature_celsius: int | None
    power_watts: float | None


class GpuMonitor:
    """Reads the GPUs on demand, and logs them every minute once started.

    A machine without NVIDIA's driver says so once and has no readings.
    """

    def __init__(
        self, *, interval_seconds: float = 60.0, log: logging.Logger | None = None
    ) -> None:
        """
        Args:
            interval_seconds: Time between two log lines.
            log: Where to; a logger of this module by default.
        """
        self._interval = interval_seconds
        self._log = log or logging.getLogger(__name__)
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._absent = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Log every `interval_seconds` from a daemon thread, from now on; once is enough."""
        if self._thread is None:
            self._stopping.clear()
            self._thread = threading.Thread(target=self._watch, name="gpu-monitor", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop logging and let NVML go."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock:
            if self._nvml is not None:
                self._nvml.nvmlShutdown()
                self._nvml = None

    def read(self) -> list[GpuReading]:
        """Every GPU of the machine, now; empty where there is none that answers."""
        with self._lock:
            nvml = self._opened()
            if nvml is None:
                return []
            try:
                return [_read(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
            except nvml.NVMLError as error:
                # The driver can be lost while the machine runs ("GPU has fallen off the bus").
                self._log.warning("gpu_unreadable", extra={"reason": str(error)})
                return []

    def driver_version(self) -> str | None:
        """The driver's, as `580.65.06`; None where there is none or it does not say."""
        with self._lock:
            nvml = self._opened()
            return _optional(nvml, nvml.nvmlSystemGetDriverVersion) if nvml else None

    def log_now(self) -> None:
        """One log line a GPU."""
        for reading in self.read():
            # A log record has a `name` of its own already, so every key gets a prefix.
            fields = dataclasses.asdict(reading).items()
            self._log.info("gpu", extra={f"gpu_{key}": value for key, value in fields})

    def _watch(self) -> None:
        while True:
            self.log_now()
            if self._absent or self._stopping.wait(self._interval):
                return

    def _opened(self) -> Any:
        if self._nvml is None and not self._absent:
            # Needless where nothing is read.
            import pynvml  # pylint: disable=import-outside-toplevel

            try:
                pynvml.nvmlInit()
            except pynvml.NVMLError as error:
                self._absent = True
                self._log.info("no_nvidia_gpu", extra={"reason": str(error)})
                return None
            self._nvml = pynvml
        return self._nvml


def _read(nvml: Any, index: int) -> GpuReading:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    name = nvml.nvmlDeviceGetName(handle)
    power = _optional(nvml, nvml.nvmlDeviceGetPowerUsage, handle)
    utilisation = _optional(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    return GpuReading(
        index=index,
        name=name.decode() if isinstance(name, bytes) else name,
        memory_used_bytes=memory.used,
        memory_total_bytes=memory.total,
        utilisation_percent=None if utilisation is None else utilisation.gpu,
        temperature_celsius=_optional(
            nvml, nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU
        ),
        power_watts=None if power is None else power / 1000.0,  # NVML counts milliwatts
    )


def _optional(nvml: Any, function: Any, *arguments: Any) -> Any:
    """None where this GPU, or this part of one, does not tell."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None
