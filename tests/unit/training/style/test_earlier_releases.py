"""Jobs end here with the weights that they would have had in an earlier release."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from jobs.kinds import TrainerOptions
from jobs.style import HyperParameters, TrainingImage, TrainingRun
from tests.releases import BEFORE_ROOMS, LAST_RELEASE, extract
from tests.unit.training.runs import same, trained
from training.style.families.sd15 import BaseModel

# Trains a job twice with the modules of an earlier release: to its end, and with a stop.
THERE = """
import dataclasses, itertools, json, sys
import torch
from safetensors.torch import save_file
from training import probe, recovery
from training.base_model import BaseModel
from training.dataset import prepare
from training.lora_config import HyperParameters, Picture, TrainerOptions, TrainingRun
from utils.errors import StopReason

torch.set_num_threads(1)
probe.CPU_PASSES = 4
job = json.loads(sys.argv[1])
base = BaseModel.load(
    TrainerOptions(job["base"], allow_cpu=True, gradient_checkpointing="false")
)
pictures = tuple(Picture(source, path, caption) for source, path, caption in job["images"])
run = TrainingRun(
    "task-1", 10, 1, pictures, HyperParameters(**job["parameters"]), job["work"],
    checkpoint_interval=1,
)

def finish(run, **how):
    recovery.train(run, base, prepare(run, base), **how)
    weights = {n: w.detach().clone() for n, w in base.unet.named_parameters() if "lora_" in n}
    base.detach()
    return weights

save_file(finish(run), job["weights"])
saved, asked = [], itertools.count()
stop = lambda: StopReason.SHUTDOWN if next(asked) >= job["stop"] else None
finish(run, emit=saved.append, should_stop=stop)
print([each.folder for each in saved if hasattr(each, "folder")][-1])
"""
EASY: dict[str, Any] = {"dropout": 0.1}
HARD: dict[str, Any] = {  # three frames, batches that are not full, the best of training images
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "dropout": 0.1,
    "caption_dropout": 0.5,
    "deliver": "best",
    "optimizer": "adamw",
}
FULL_BATCHES = HARD | {"batch_size": 1, "deliver": "last"}


@pytest.fixture(scope="module", params=[LAST_RELEASE, BEFORE_ROOMS])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an earlier release."""
    return extract(request.param, tmp_path_factory.mktemp("release") / request.param)


def ended_there(release: Path, job: dict[str, Any]) -> str:
    """Train a job with an earlier release; returns the checkpoint of the run that was stopped."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THERE, json.dumps(job)],
        cwd=release,
        env={**os.environ, "PYTHONPATH": str(release), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("wanted", "stop"),
    [(EASY, 8), (FULL_BATCHES, 3), (HARD, 3)],
    ids=["easy", "full batches", "hard"],
)
def test_a_job_that_an_earlier_release_began_and_a_new_one_end_with_its_bits(
    release: Path,
    options: TrainerOptions,
    mixed: tuple[TrainingImage, ...],
    tmp_path: Path,
    wanted: dict[str, Any],
    stop: int,
) -> None:
    parameters = HyperParameters(
        epochs=3, resolution=128, rank=2, alpha=4.0, learning_rate=1e-3, **wanted
    )
    weights = tmp_path / "weights.safetensors"
    job = {
        "base": options.base_model,
        "images": [(image.source, image.path, image.caption) for image in mixed],
        "parameters": dataclasses.asdict(parameters),
        "work": str(tmp_path / "there"),
        "weights": str(weights),
        "stop": stop,
    }
    begun = ended_there(release, job)
    there = load_file(weights)
    run = TrainingRun("task-1", 10, 2, mixed, parameters, str(tmp_path / "here"))
    resumed = dataclasses.replace(run, resume_from=begun, checkpoint_interval=1)
    _, found, _ = trained(BaseModel.load(options), resumed)
    assert same(found, {name: there[name] for name in found})
    if wanted is HARD:  # a new job has another order of batches, and needs images to choose by
        return
    # A new job takes that path only if the fast one is off.
    new = dataclasses.replace(run, work_folder=str(tmp_path / "new"), checkpoint_interval=1)
    options = dataclasses.replace(options, fast_training=False)
    _, found, _ = trained(BaseModel.load(options), new)
    assert same(found, {name: there[name] for name in found})
