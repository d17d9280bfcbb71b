"""The worker's disk: folders of ended jobs and of dead workers are removed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from consumer.life.work_folder import WorkFolder
from utils.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[3]
HOLDER = """
import sys, pathlib, time
from consumer.life.work_folder import WorkFolder
folder = WorkFolder(pathlib.Path(sys.argv[1]))
print(folder.path, flush=True)
time.sleep(60)
"""


def test_a_jobs_folder_is_removed_even_when_the_job_breaks(tmp_path: Path) -> None:
    folders = WorkFolder(tmp_path)
    with pytest.raises(RuntimeError), folders.job() as folder:
        (folder / "pictures").mkdir()
        (folder / "pictures" / "0000.img").write_bytes(b"x")
        raise RuntimeError
    assert not folder.exists()
    folders.close()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_workers_folder_goes_at_the_next_start_and_a_living_ones_stays(
    tmp_path: Path,
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout
        held = Path(holder.stdout.readline().strip())
        (held / "job-x").mkdir()
        second = WorkFolder(tmp_path)
        assert held.exists(), "its worker lives"
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        third = WorkFolder(tmp_path)
        assert not held.exists(), "its worker is dead"
        assert second.path.exists()
        second.close()
        third.close()


def test_a_folder_that_cannot_be_written_is_named_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="WORK_DIR"):
        WorkFolder(tmp_path / "file")
