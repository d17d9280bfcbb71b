"""What a person types: local training, help, and what is said when something is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from local.rabbitmq_node import RabbitMqNode
from sandbox.photographs import photographs
from sandbox.worker_process import ROOT
from tests.acceptance.world import World, until

MAIN = (sys.executable, str(ROOT / "main.py"))


def _environment(base_model: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return kept | {
        "BASE_MODEL": str(base_model),
        "ALLOW_CPU": "true",
        "RESOLUTION": "64",
        "LORA_RANK": "2",
        "OMP_NUM_THREADS": "1",
        "CHECKPOINT_INTERVAL": "1",
    }


@pytest.fixture(name="images")
def _images(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for each in photographs()[:4]:
        (folder / each.name).write_bytes(each.content)
    (folder / "astronaut.txt").write_text("an astronaut", encoding="utf-8")
    (folder / ".DS_Store").write_bytes(b"junk")
    return folder


def _main(
    *arguments: str, environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MAIN, *arguments],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_a_folder_of_images_becomes_a_model_without_any_server(
    base_model: Path, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    done = _main(
        *("train", str(images), "--output", str(output), "--epochs", "2"),
        environment=_environment(Path(os.path.relpath(base_model, tmp_path)))
        | {"TENSORBOARD": "true"},
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "lora_weights.safetensors" in done.stderr
    report = json.loads((output / "training_report.json").read_text(encoding="utf-8"))
    assert report["epochs"] == 2
    captions = {each["source"]: each["caption"] for each in report["pictures"]}
    assert captions["astronaut.jpg"] == "an astronaut"
    assert len(captions) == 4
    assert not (output / ".training").exists()
    assert list(output.glob("tensorboard/events.out.tfevents.*"))
    for name in (
        "samples.png",
        "training_report.html",
        "loss_curve.png",
        "lora_weights_kohya.safetensors",
    ):
        assert (output / name).is_file()


def test_an_interrupted_training_goes_on_with_resume(
    base_model: Path, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    arguments = ("train", str(images), "--output", str(output), "--epochs", "30")
    environment = _environment(base_model)
    with subprocess.Popen(
        [*MAIN, *arguments],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as training:
        until(lambda: list(output.glob(".training/checkpoints/epoch-*")))
        training.send_signal(signal.SIGINT)
        _, said = training.communicate(timeout=60)
    assert training.returncode == 130, said
    assert "--resume" in said
    done = _main(*arguments, "--resume", environment=environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((output / "training_report.json").read_text(encoding="utf-8"))
    assert report["epochs"] == 30 and report["resumed_from"] >= 1


def test_help_names_the_commands(tmp_path: Path) -> None:
    done = _main("--help", environment={"PATH": os.environ["PATH"]}, folder=tmp_path)
    assert done.returncode == 0
    assert "worker" in done.stdout and "train" in done.stdout


def test_every_wrong_setting_is_named_at_once_and_no_secret_shown(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "INTERNAL_API_TOKEN": "short-but-secret",
        "EPOCHS": "many",
        "BACKEND_API_URL": "http://example.com",
    }
    done = _main(environment=environment, folder=tmp_path)
    assert done.returncode == 2
    for name in ("AWS_STORAGE_BUCKET_NAME", "INTERNAL_API_TOKEN", "EPOCHS", "BACKEND_API_URL"):
        assert name in done.stderr
    assert "short-but-secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refused_login_ends_the_worker_with_the_settings_names(
    world: World, rabbitmq: RabbitMqNode, tmp_path: Path
) -> None:
    assert rabbitmq.port
    environment = world.settings(RABBITMQ_PASS="wrong") | {"PATH": os.environ["PATH"]}
    done = _main("worker", environment=environment, folder=tmp_path)
    assert done.returncode == 3
    assert "RABBITMQ_PASS" in done.stderr and "Traceback" not in done.stderr


def test_a_machine_without_a_gpu_is_refused_unless_the_cpu_is_allowed(
    base_model: Path, images: Path, tmp_path: Path
) -> None:
    environment = _environment(base_model) | {"ALLOW_CPU": "false", "CUDA_VISIBLE_DEVICES": "-1"}
    done = _main(
        *("train", str(images), "--output", str(tmp_path / "output")),
        environment=environment,
        folder=tmp_path,
    )
    assert done.returncode == 4
    assert "ALLOW_CPU" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere",), "is not a folder"),
        (("pictures", "--epochs", "0"), "epochs"),
        (("pictures", "--resolution", "500"), "multiple of 64"),
    ],
)
def test_wrong_arguments_are_a_sentence(
    base_model: Path, images: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    assert images.is_dir()
    done = _main(
        *("train", *arguments, "--output", str(tmp_path / "output")),
        # The folder and the arguments are looked at first: no GPU is needed to see what is wrong.
        environment=_environment(base_model) | {"ALLOW_CPU": "false", "CUDA_VISIBLE_DEVICES": "-1"},
        folder=tmp_path,
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"MIN_IMAGES": "5"}, "5 are needed"),
        ({"BASE_MODEL": "somebody/some-model", "HF_HUB_OFFLINE": "1"}, "somebody/some-model"),
    ],
)
def test_a_training_that_cannot_be_is_a_sentence_and_leaves_nothing_behind(
    base_model: Path, images: Path, tmp_path: Path, changed: dict[str, str], words: str
) -> None:
    output = tmp_path / "output"
    done = _main(
        *("train", str(images), "--output", str(output)),
        environment=_environment(base_model) | changed,
        folder=tmp_path,
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(said) == 1 and words in said[0], done.stderr
    assert not list(output.iterdir())


def test_inspect_says_what_a_lora_file_is_and_refuses_what_is_none(tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    path = tmp_path / "style.safetensors"
    tensors = {
        f"{layer}.lora_down.weight": torch.ones(2, 768),
        f"{layer}.lora_up.weight": torch.ones(4, 2),
        f"{layer}.alpha": torch.tensor(8.0),
    }
    save_file(tensors, path, metadata={"modelspec.title": "Harbour \x1b[31mred"})
    bare = {"PATH": os.environ["PATH"], "COLUMNS": "200"}
    table = _main("inspect", str(path), "--all", environment=bare, folder=tmp_path)
    assert table.returncode == 0, table.stderr
    for said in ("kohya", "Stable Diffusion 1, by its shapes", layer, "1 × to_k", "Harbour"):
        assert said in table.stdout
    assert "\x1b[31m" not in table.stdout
    as_json = _main("inspect", str(path), "--json", environment=bare, folder=tmp_path)
    found = json.loads(as_json.stdout)
    assert (found["format"], found["ranks"], found["alphas"]) == ("kohya", [2], [8.0])
    pickle = tmp_path / "style.pt"
    pickle.write_bytes(b"PK\x03\x04")
    refused = _main("inspect", "style.pt", environment=bare, folder=tmp_path)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "is a pickle" in refused.stderr and "Traceback" not in refused.stderr
