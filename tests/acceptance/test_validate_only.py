"""`main.py train FOLDER --validate-only`: the intake report, on a CPU and without a base model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.photographs import photographs
from sandbox.worker_process import ROOT


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    """Three photographs with a caption, one file that is no image, and one duplicate."""
    folder = tmp_path / "images"
    folder.mkdir()
    for photograph in photographs()[:3]:
        (folder / photograph.name).write_bytes(photograph.content)
    first = sorted(folder.iterdir())[0]
    first.with_suffix(".txt").write_text("a small house", encoding="utf-8")
    (folder / "zz-page.png").write_bytes(b"<html>not found</html>")
    (folder / f"zz-{first.name}").write_bytes(first.read_bytes())
    return folder


def _validate(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    wanted = {"BASE_MODEL": "/no/such/folder", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            *(sys.executable, str(ROOT / "main.py"), "train", str(folder), "--validate-only"),
            *("--epochs", "7", "--trigger-word", "mystyle"),
        ],
        env=kept | wanted | settings,
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_report_names_each_image_its_fate_and_the_steps(folder: Path) -> None:
    before = sorted(folder.parent.rglob("*"))
    done = _validate(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "is a web page, not an image" in text
    assert "is the same image as" in text
    assert "caption: mystyle, a small house" in text
    assert "3 of 5 images can be used: 21 steps in 7 epochs." in text
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert sorted(folder.parent.rglob("*")) == before


def test_too_few_usable_images_end_with_exit_code_1(folder: Path) -> None:
    done = _validate(folder, MIN_IMAGES="4")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 of 5 images can be used, but at least 4 are needed" in " ".join(done.stdout.split())
