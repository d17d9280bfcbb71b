"""`main.py train --kind llm`: the report of a file, and a training, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox import stand_in_language_model as stand_in

ROOT = Path(__file__).parents[3]


def main(tmp_path: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an empty folder."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME")} | settings
    command = [sys.executable, "-W", "ignore", str(ROOT / "main.py"), "train", "--kind", "llm"]
    return subprocess.run(
        [*command, *arguments],
        cwd=tmp_path,
        env=environment | {"ALLOW_CPU": "true", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_file_is_reported_on_without_a_base_and_without_torch(tmp_path: Path) -> None:
    data = stand_in.write_conversations(tmp_path / "data.jsonl", 20)
    with data.open("a", encoding="utf-8") as file:
        file.write("{broken\n" + json.dumps({"prompt": "a", "completion": ""}) + "\n")
    ran = main(tmp_path, "data.jsonl", "--validate-only")
    assert ran.returncode == 0, ran.stderr
    assert "left out: 1 row: is not valid JSON (row 21)" in ran.stdout
    assert "left out: 1 row: has no answer (row 22)" in ran.stdout
    assert "20 of 22 rows can be used: 18 are trained, 2 are held out" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("missing.jsonl", "--validate-only"), 2, "missing.jsonl is not a file"),
        (("data.jsonl",), 2, "--output is missing"),
        (("data.jsonl", "--output", "out"), 2, "--base-model is missing"),
        (("data.jsonl", "--output", "out", "--base-model", "../x y"), 2, "no folder and no hub"),
        (("data.csv", "--validate-only"), 1, "question,answer"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    stand_in.write_conversations(tmp_path / "data.jsonl", 5)
    (tmp_path / "data.csv").write_text("question,answer\n1,2\n", encoding="utf-8")
    ran = main(tmp_path, *arguments)
    assert ran.returncode == code
    assert says in ran.stdout + ran.stderr


def test_a_model_is_trained_from_a_file(tmp_path: Path) -> None:
    stand_in.write_conversations(tmp_path / "data.jsonl", 12)
    stand_in.build(tmp_path / "base", hidden=32, layers=1, vocabulary=384)
    how = ("--output", "out", "--base-model", "base", "--epochs", "1", "--batch-size", "4")
    ran = main(tmp_path, "data.jsonl", *how)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / ".training").exists()
