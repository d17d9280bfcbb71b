"""The number of threads for a CPU: by the usable cores, not by all cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from utils import cpus


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """64 CPUs, two to a core, without a quota."""
    monkeypatch.setattr(cpus, "_CPUS", tmp_path / "cpu")
    monkeypatch.setattr(cpus, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cpus, "_OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("0::/pods/ours\n")
    (tmp_path / "cgroup/pods/ours").mkdir(parents=True)
    for number in range(64):
        topology = tmp_path / f"cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 32},{number % 32 + 32}\n")
    allow(monkeypatch, range(64))
    return tmp_path


def allow(monkeypatch: pytest.MonkeyPatch, allowed: range) -> None:
    """The CPUs that this process may run on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(allowed))


def test_a_large_machine_gives_no_more_threads_than_are_useful() -> None:
    assert cpus.training_threads() == cpus.MOST_THREADS == 16


def test_two_hyper_threads_of_a_core_are_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, range(30, 36))  # cores 30, 31, and 0 to 3
    assert cpus.training_threads() == 6
    (same_core,) = [range(0, 33, 32)]
    allow(monkeypatch, same_core)
    assert cpus.training_threads() == 1


@pytest.mark.parametrize(
    ("folder", "quota", "threads"),
    [
        ("pods/ours", "250000 100000", 2),
        ("pods", "400000 100000", 4),
        (".", "300000 100000", 3),
        ("pods/ours", "50000 100000", 1),
        ("pods/ours", "max 100000", 16),
        ("pods/ours", "nonsense", 16),
    ],
)
def test_a_container_s_quota_counts_and_that_of_every_group_around_it(
    machine: Path, folder: str, quota: str, threads: int
) -> None:
    (machine / "cgroup" / folder / "cpu.max").write_text(quota + "\n")
    assert cpus.training_threads() == threads


@pytest.mark.parametrize(("quota", "threads"), [("200000", 2), ("-1", 16)])
def test_the_quota_of_an_older_kernel_counts_too(machine: Path, quota: str, threads: int) -> None:
    (machine / "own").write_text("5:cpuset:/\n4:cpu,cpuacct:/docker/x\n")
    folder = machine / "cgroup/cpu/docker/x"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text(quota)
    (folder / "cpu.cfs_period_us").write_text("100000")
    assert cpus.training_threads() == threads


def test_without_any_of_these_files_each_allowed_cpu_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("_CPUS", "_CGROUPS", "_OWN_CGROUP"):
        monkeypatch.setattr(cpus, name, tmp_path / "nowhere")
    allow(monkeypatch, range(3))
    assert cpus.training_threads() == 3
