"""Readings of the GPUs by NVIDIA's NVML: memory, utilisation, temperature and power."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from utils.threads import Every

# Bits of NVML's clocks-event reasons that slow a busy GPU, by the part to check.
_THROTTLES = {
    "power": 0x4 | 0x80,  # the software's cap, the hardware's brake
    "heat": 0x20 | 0x40,  # the software's and the hardware's limit
    "hardware": 0x8,  # a slowdown for either, or for the power supply
}
THROTTLE_REASONS = tuple(_THROTTLES)


@dataclasses.dataclass(frozen=True, slots=True)
class GpuReading:
    """One GPU at one moment.

    Attributes:
        index: NVML's index, which CUDA_VISIBLE_DEVICES does not change.
        name: The driver's name of the GPU.
        memory_used_bytes, memory_total_bytes: Memory used by all processes, and in all.
        utilisation_percent: Part of the last sample period in which a kernel ran; None if it
            cannot be read.
        temperature_celsius: Temperature of the chip; None if it cannot be read.
        power_watts: Present power; None if it cannot be read.
        throttled: The reasons for reduced clocks, of `THROTTLE_REASONS`; None if they cannot be
            read.
    """

    index: int
    name: str
    memory_used_bytes: int
    memory_total_bytes: int
    utilisation_percent: int | None
    temperature_celsius: int | None
    power_watts: float | None
    throttled: tuple[str, ...] | None = None


class GpuMonitor:
    """Reads the GPUs on demand.

    Once started, it reads them every few seconds and logs every minute.

    A machine without NVIDIA's driver has no readings; that is logged once.
    """

    def __init__(
        self,
        *,
        interval_seconds: float = 60.0,
        sample_seconds: float | None = None,
        observe: Callable[[list[GpuReading]], None] = lambda readings: None,
        log: logging.Logger | None = None,
    ) -> None:
        """Prepare the monitor; `start` begins the readings.

        Args:
            interval_seconds: Time between two log lines.
            sample_seconds: Time between two readings; None for the time between two log lines.
            observe: Receives every reading.
            log: The logger; this module's logger by default.
        """
        self._interval = interval_seconds
        self._sample = sample_seconds or interval_seconds
        self._observe = observe
        self._log = log or logging.getLogger(__name__)
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._absent = False
        self._lost = False
        self._logged_at = float("-inf")
        self._every: Every | None = None

    def start(self) -> None:
        """Start to read and log in a daemon thread; further calls have no effect."""
        if self._every is None:
            self._every = Every(self._sample, self._look, name="gpu-monitor")
            self._every.start()

    def stop(self) -> None:
        """Stop logging and close NVML."""
        if self._every is not None:
            self._every.stop()
            self._every = None
        with self._lock:
            if self._nvml is not None:
                self._nvml.nvmlShutdown()
                self._nvml = None

    def read(self) -> list[GpuReading]:
        """Present readings of every GPU of the machine; empty if none answers."""
        with self._lock:
            nvml = self._opened()
            if nvml is None:
                return []
            try:
                readings = [_read(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
                self._lost = False
                return readings
            except nvml.NVMLError as error:
                # The driver can be lost while the machine runs ("GPU has fallen off the bus").
                if not self._lost:
                    self._log.warning("gpu_unreadable", extra={"reason": str(error)})
                self._lost = True
                return []

    def driver_version(self) -> str | None:
        """The driver's version, such as `580.65.06`; None if it is unknown."""
        with self._lock:
            nvml = self._opened()
            return _optional(nvml, nvml.nvmlSystemGetDriverVersion) if nvml else None

    def log_now(self) -> None:
        """Write one log line per GPU."""
        self._write(self.read())

    def _write(self, readings: list[GpuReading]) -> None:
        for reading in readings:
            # A log record already has a `name`, so every key gets a prefix.
            fields = dataclasses.asdict(reading).items()
            self._log.info("gpu", extra={f"gpu_{key}": value for key, value in fields})

    def _look(self) -> None:
        readings = self.read()
        self._observe(readings)
        # Slightly early is on time: the waits are as long as the time between two samples.
        if (now := time.monotonic()) - self._logged_at > self._interval - self._sample / 2:
            self._logged_at = now
            self._write(readings)
        if self._absent and self._every is not None:
            self._every.stop()

    def _opened(self) -> Any:
        if self._nvml is None and not self._absent:
            # Not needed if nothing is read.
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
        throttled=_throttles(nvml, handle),
    )


def _throttles(nvml: Any, handle: Any) -> tuple[str, ...] | None:
    bits = _optional(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
    return None if bits is None else tuple(name for name, mask in _THROTTLES.items() if bits & mask)


def _optional(nvml: Any, function: Any, *arguments: Any) -> Any:
    """The value, or None if this GPU, or this part of one, does not report it."""
    try:
        return function(*arguments)
    except nvml.NVMLError:
        return None
