"""`python -m benchmarks` runs anywhere, measures its cases, and takes in other trainers."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import counts, loops, sd15
from benchmarks.case import Case
from benchmarks.images import paint
from benchmarks.peers import DIFFUSERS, KOHYA, Peer, PeerFailed

ROOT = Path(__file__).parents[2]
CASE = Case(1, True, 4, 64)


def run(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a person types it."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", "--output", str(output), *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "400"},  # no path is broken across lines
        capture_output=True,
        text=True,
        timeout=400,  # a busy machine takes ten times as long
        check=False,
    )


BUSY = """
import sys, time
steps = next(part for part in sys.argv if part.startswith("--max_train_steps="))
end = time.process_time() + 0.1 * int(steps.partition("=")[2])
while time.process_time() < end:
    pass
"""


@pytest.fixture(scope="module", name="measured")
def _measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results of a quick run with another trainer, and what it prints."""
    output = tmp_path_factory.mktemp("benchmarks")
    script = tmp_path_factory.mktemp("checkout") / DIFFUSERS
    script.write_text(BUSY, "utf-8")
    done = run(output, "--quick", "--goal-only", "--peer-script", str(script))
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_one_command_prints_a_table_and_writes_figures_and_a_plot(
    measured: tuple[Path, str],
) -> None:
    output, printed = measured
    assert "ratio" in printed and "batch 1, checkpointing" in printed
    assert (output / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    document: dict[str, Any] = json.loads((output / "benchmarks.json").read_text("utf-8"))
    assert document["machine"]["torch"] == torch.__version__
    assert document["matrix_teraflops"] > 0
    assert document["first_step_warm_seconds"] > 0
    # On a machine with other work the first step itself may take longer or less each time.
    assert document["first_step_cold_seconds"] > document["base_model_load_seconds"] > 0
    (row,) = document["results"]
    assert row["ratio"] == pytest.approx(
        row["plain"]["step_seconds"] / row["ours"]["step_seconds"], rel=1e-6
    )
    for side in ("ours", "plain"):
        assert row[side]["steps_per_second"] == pytest.approx(1 / row[side]["step_seconds"])
        assert len(row[side]["legs"]) == document["pairs"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own test below")
def test_a_step_is_faster_than_the_plain_loop_s_and_the_rest_is_accounted_for(
    measured: tuple[Path, str],
) -> None:
    """The factor is in docs/benchmarks.md, because other tests run here at the same time."""
    output, printed = measured
    (row,) = json.loads((output / "benchmarks.json").read_text("utf-8"))["results"]
    assert row["ratio"] > 1.15
    assert 1 < row["ratio_without_reading"] < row["ratio"]
    parts = row["plain"]["parts"]
    assert {loops.READING, "VAE", "text encoder", "AdamW"} < set(parts)
    assert 0.8 < sum(parts.values()) / row["plain"]["step_seconds"] <= 1
    assert "only the ratios" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's clock does not see the computing")
def test_each_leg_of_another_trainer_is_compared_with_ours_before_and_after_it(
    measured: tuple[Path, str],
) -> None:
    output, printed = measured
    (found,) = json.loads((output / "benchmarks.json").read_text("utf-8"))["peers"]
    assert (len(found["legs"]), len(found["ours"])) == (1, 2)
    assert 0.05 < found["step_seconds"] < 0.4
    assert found["ratio"] == pytest.approx(2 * found["step_seconds"] / sum(found["ours"]))
    assert f"we are {found['ratio']:.2f} x as fast" in printed and "load average" in printed


def test_the_full_model_has_sd15_s_own_size() -> None:
    with torch.device("meta"):
        unet = sd15.unet()
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964


def test_the_narrow_model_has_as_many_layers_as_the_full_one() -> None:
    with torch.device("meta"):
        full, narrow = sd15.unet(), sd15.unet(sd15.NARROW)
    assert [name for name, _ in full.named_modules()] == [
        name for name, _ in narrow.named_modules()
    ]


def test_the_goals_against_other_trainers_have_one_case() -> None:
    cases = program._cases(False, "", False)  # pylint: disable=protected-access
    assert [str(case) for case in cases if case.is_goal] == [
        "batch 1, checkpointing off, 10 images"
    ]


def test_a_step_of_the_full_model_meets_the_goals_for_launches_and_kept_memory() -> None:
    goal = counts.count(counts.SHIPPED[-1])
    assert 1000 < goal.launches <= counts.MOST_LAUNCHES
    assert 0.1 < goal.kept_gib <= counts.MOST_KEPT
    assert goal.update < 30
    assert 1.6 < goal.teraflops < 1.9


TRANSFORMS = """
import sys
from torchvision import transforms as t
from PIL import Image
filter = t.InterpolationMode["LANCZOS"]
steps = [t.Resize(64, interpolation=filter), t.CenterCrop(64), t.Lambda(lambda x: x)]
made = t.Compose([*steps, t.ToTensor(), t.Normalize([0.5], [0.5])])(Image.new("RGB", (128, 128)))
print(sys.argv[1:], tuple(made.shape), float(made.min()))
"""


def test_a_script_finds_the_transforms_where_there_is_no_torchvision(tmp_path: Path) -> None:
    script = tmp_path / DIFFUSERS
    script.write_text(TRANSFORMS, "utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "launch_peer.py"), str(script), "--seed=1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "['--seed=1'] (3, 64, 64) -1.0\n", done.stderr


PEER = """
import json, pathlib, sys, time
known = dict(part.removeprefix("--").partition("=")[::2] for part in sys.argv[1:])
data = pathlib.Path(known["train_data_dir"])
found = sorted(path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file())
pathlib.Path(known["output_dir"]).parent.joinpath("asked.json").write_text(
    json.dumps({"arguments": known, "files": found})
)
time.sleep({start} + int(known["max_train_steps"]) * {step})
"""


def peer(folder: Path, name: str, *, start: float = 0.3, step: float = 0.05) -> Peer:
    """A script of another trainer's name, which takes its time."""
    script = folder / name
    text = PEER.replace("{start}", str(start)).replace("{step}", str(step))
    script.write_text(text, "utf-8")
    return Peer(script)


def test_two_rows_that_differ_in_their_images_give_the_time_of_an_epoch_besides_its_steps() -> None:
    few, many = Case(4, True, 10, 64), Case(4, True, 30, 64)
    rows = [
        dataclasses.asdict(few) | {"ours": {"step_seconds": 0.5}},
        dataclasses.asdict(many) | {"ours": {"step_seconds": 0.3}},
    ]
    # 3 steps take 1.5 s and 8 take 2.4 s: 0.18 s a step, and 0.96 s an epoch.
    lost = [row["epoch_seconds_lost"] for row in program.with_lost_seconds(rows)]
    assert lost == pytest.approx([0.96, 0.96])


@pytest.mark.parametrize("name", [DIFFUSERS, KOHYA])
def test_another_trainer_s_step_is_timed_without_its_start(tmp_path: Path, name: str) -> None:
    other = peer(tmp_path, name, start=3.0, step=0.2)
    images = paint(tmp_path / "pictures", 5)
    seconds = other.step_seconds(CASE, tmp_path / "model", images, tmp_path / "w", few=2, many=12)
    assert 0.12 < seconds < 0.3
    asked = json.loads((tmp_path / "w" / "asked.json").read_text("utf-8"))
    arguments = asked["arguments"]
    assert arguments["pretrained_model_name_or_path"] == str(tmp_path / "model")
    assert (arguments["train_batch_size"], arguments["resolution"]) == ("1", "64")
    assert arguments["mixed_precision"] == "fp16" and "gradient_checkpointing" in arguments
    if name == KOHYA:
        assert "cache_latents" in arguments
        assert len(asked["files"]) == 8, "four images, each with its caption beside it"
        assert all(file.startswith("1_style/") for file in asked["files"])
    else:
        assert len(asked["files"]) == 5 and "metadata.jsonl" in asked["files"]


def test_a_trainer_that_fails_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    script = tmp_path / DIFFUSERS
    script.write_text("raise SystemExit('no module named datasets')", "utf-8")
    with pytest.raises(PeerFailed, match="no module named datasets"):
        Peer(script).step_seconds(
            CASE, tmp_path, paint(tmp_path / "pictures", 4), tmp_path / "work", few=2, many=4
        )


@pytest.mark.parametrize(
    ("given", "used"), [("bin/python", f"{Path.cwd()}/bin/python"), ("python3", "python3")]
)
def test_an_interpreter_is_found_from_the_folder_of_the_script(
    tmp_path: Path, given: str, used: str
) -> None:
    """The script runs in its own folder."""
    script = tmp_path / DIFFUSERS
    script.touch()
    found = program._peer(script, Path(given), False)  # pylint: disable=protected-access
    assert found.python == used


def test_a_script_of_another_name_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    done = run(tmp_path, "--quick", "--peer-script", str(tmp_path / "train.py"))
    assert done.returncode == 2
    assert "train.py" in done.stderr and KOHYA in done.stderr


@pytest.mark.gpu
def test_on_a_gpu_the_goals_are_met(tmp_path: Path) -> None:
    done = run(tmp_path, "--batch-sizes", "1", "--repeats", "2", "--steps", "30")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "benchmarks.json").read_text("utf-8"))["results"]
    for row in rows:
        if row["checkpointing"]:
            assert row["ours"]["peak_bytes"] < 4 * 2**30
        assert row["checkpoint"]["share"] < 0.05
        assert row["ratio"] > 1.4
