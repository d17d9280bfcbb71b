"""The GPU monitor: readings from NVML, a log line per GPU, and one line if there is none."""

from __future__ import annotations

import logging
import sys
import time
import types
from typing import Any

import pytest

from utils.gpu_monitor import GpuMonitor, GpuReading


class FakeNvml(types.ModuleType):
    # pylint: disable=invalid-name,missing-function-docstring  # the library's own names
    """NVML of a machine with two GPUs; the second does not report its power."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, *, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.driver, self.lost, self.opened = driver, False, 0

    def nvmlInit(self) -> None:
        self.opened += 1
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        if self.lost:
            raise self.NVMLError("GPU is lost")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"GPU number {handle}"

    def nvmlDeviceGetMemoryInfo(self, _handle: int) -> Any:
        return types.SimpleNamespace(used=5, total=10)

    def nvmlDeviceGetUtilizationRates(self, _handle: int) -> Any:
        return types.SimpleNamespace(gpu=97, memory=30)

    def nvmlDeviceGetTemperature(self, _handle: int, _sensor: int) -> int:
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        if handle:
            raise self.NVMLError("Not Supported")
        return 250_500

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        if handle:
            raise self.NVMLError("Not Supported")
        return 0x1 | 0x4 | 0x40  # idle, the power cap, the hardware's thermal limit


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """A machine with GPUs."""
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def test_every_gpu_is_read_with_its_units(nvml: FakeNvml) -> None:
    assert GpuMonitor().read() == [
        GpuReading(0, "GPU number 0", 5, 10, 97, 61, 250.5, ("power", "heat")),
        GpuReading(1, "GPU number 1", 5, 10, 97, 61, None, None),
    ]
    assert nvml.opened == 1


def test_a_reading_is_one_log_line_per_gpu(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        GpuMonitor().log_now()
    lines = [vars(record) for record in caplog.records if record.msg == "gpu"]
    assert [line["gpu_index"] for line in lines] == [0, 1]
    assert (lines[0]["gpu_name"], lines[0]["gpu_power_watts"]) == ("GPU number 0", 250.5)
    assert nvml.opened == 1


def test_the_real_library_reports_a_machine_without_gpus_once_or_reads_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = GpuMonitor()
    with caplog.at_level(logging.INFO):
        first, second = monitor.read(), monitor.read()
    said = [record for record in caplog.records if record.msg == "no_nvidia_gpu"]
    assert (len(said) == 1 and first == second == []) or (not said and first and second)


def test_a_machine_without_a_driver_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeNvml(driver=False)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monitor = GpuMonitor()
    with caplog.at_level(logging.INFO):
        assert monitor.read() == monitor.read() == []
    assert [record.msg for record in caplog.records] == ["no_nvidia_gpu"]
    assert fake.opened == 1


def test_a_gpu_that_is_lost_later_is_a_warning_and_no_crash(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = GpuMonitor()
    assert len(monitor.read()) == 2
    nvml.lost = True
    assert not monitor.read()
    assert not monitor.read()  # logged once, however often it is read
    assert [record.msg for record in caplog.records] == ["gpu_unreadable"]


def test_a_started_monitor_logs_at_every_interval_until_it_is_stopped(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    monitor = GpuMonitor(interval_seconds=0.02, log=logging.getLogger("mine"))
    with caplog.at_level(logging.INFO):
        monitor.start()
        monitor.start()
        end = time.monotonic() + 10
        while len(caplog.records) < 6 and time.monotonic() < end:
            time.sleep(0.01)
        monitor.stop()
        count = len(caplog.records)
        time.sleep(0.1)
    assert count >= 6
    assert len(caplog.records) == count
    assert {record.name for record in caplog.records} == {"mine"}
    assert nvml.opened == 0


def test_the_monitor_reads_more_often_than_it_logs(
    nvml: FakeNvml, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[list[GpuReading]] = []
    monitor = GpuMonitor(interval_seconds=60, sample_seconds=0.01, observe=seen.append)
    with caplog.at_level(logging.INFO):
        monitor.start()
        end = time.monotonic() + 10
        while len(seen) < 5 and time.monotonic() < end:
            time.sleep(0.01)
        monitor.stop()
    assert len(seen) >= 5
    assert len(caplog.records) == len(seen[0]) == 2
    assert nvml.opened == 0


def test_without_a_gpu_the_thread_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(driver=False))
    monitor = GpuMonitor(interval_seconds=60)
    monitor.start()
    began = time.monotonic()
    monitor.stop()
    assert time.monotonic() - began < 5
