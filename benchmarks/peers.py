"""Other trainers, from checkouts of the user's, on the same images and the same model.

Each is run twice, with few steps and with many: the difference is what a step takes, without the
start and the caches. diffusers' script was run in its version 0.40.0 with diffusers 0.42.1. Kohya's
was never run: its arguments were held against sd-scripts' sources of February 2026.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.case import Case

DIFFUSERS = "train_text_to_image_lora.py"
KOHYA = "train_network.py"
_LIMIT_SECONDS = 3600


class PeerFailed(Exception):
    """The other trainer ended with an error, which the text names."""


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """A script that trains.

    Attributes:
        script: Its file, named as its project names it.
        python: The interpreter to run it with: its environment must have what it imports.
        on_cpu: Run it on the CPU in float32, on one thread, and measure the time that it computes.
    """

    script: Path
    python: str = sys.executable
    on_cpu: bool = False

    def __post_init__(self) -> None:
        if self.script.name not in (DIFFUSERS, KOHYA) or not self.script.is_file():
            raise ValueError(f"{self.script} is neither a {DIFFUSERS} nor a {KOHYA}")

    @property
    def name(self) -> str:
        """For the table."""
        return "diffusers" if self.script.name == DIFFUSERS else "kohya"

    def step_seconds(
        self, case: Case, model: Path, images: list[Path], folder: Path, *, few: int, many: int
    ) -> float:
        """Seconds per step, on average.

        Raises:
            PeerFailed: It could not be run, or took no longer for more steps.
        """
        data = self._lay_out(case, images, folder / "data")
        seconds = {
            steps: self._timed(case, model, data, folder / f"out-{steps}", steps)
            for steps in (few, many)
        }
        if seconds[many] <= seconds[few]:
            raise PeerFailed(f"{many} steps took no longer than {few}: {seconds}")
        return (seconds[many] - seconds[few]) / (many - few)

    def _lay_out(self, case: Case, images: list[Path], folder: Path) -> Path:
        """The images with their captions, as the script wants them."""
        shutil.rmtree(folder, ignore_errors=True)
        place = folder / "1_style" if self.name == "kohya" else folder
        place.mkdir(parents=True)
        lines = []
        for index, path in enumerate(images[: case.images]):
            caption = f"a painting, number {index}"
            shutil.copy(path, place / path.name)
            if self.name == "kohya":
                (place / path.name).with_suffix(".txt").write_text(caption, "utf-8")
            lines.append(json.dumps({"file_name": path.name, "text": caption}))
        if self.name == "diffusers":
            (place / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
        return folder

    def arguments(self, case: Case, model: Path, data: Path, out: Path, steps: int) -> list[str]:
        """The script's command line, without interpreter and script."""
        own: dict[str, object]
        common: dict[str, object] = {
            "pretrained_model_name_or_path": model,
            "train_data_dir": data,
            "output_dir": out,
            "resolution": case.resolution,
            "train_batch_size": case.batch_size,
            "max_train_steps": steps,
            "learning_rate": 1e-4,
            "lr_scheduler": "constant",
            "mixed_precision": "no" if self.on_cpu else "fp16",
            "seed": 42,
        }
        flags = ["--gradient_checkpointing"] if case.checkpointing else []
        if self.name == "diffusers":
            own = {"rank": 16, "dataloader_num_workers": 0, "checkpointing_steps": 10**9}
        else:
            own = {
                "network_module": "networks.lora",
                "network_dim": 16,
                "network_alpha": 32,
                "optimizer_type": "AdamW",
                "save_model_as": "safetensors",
                "caption_extension": ".txt",
                "max_data_loader_n_workers": 0,
            }
            flags += ["--cache_latents", "--sdpa", "--network_train_unet_only", "--no_half_vae"]
        named = [f"--{name}={value}" for name, value in (common | own).items()]
        return named + flags

    def _timed(self, case: Case, model: Path, data: Path, out: Path, steps: int) -> float:
        arguments = self.arguments(case, model, data, out, steps)
        environment = os.environ | {"HF_DATASETS_CACHE": str(out.parent / "datasets-cache")}
        launcher: list[str] = []
        if self.on_cpu:
            environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            launcher = [str(Path(__file__).with_name("launch_peer.py"))]
        began = _seconds(self.on_cpu)
        try:
            done = subprocess.run(
                [self.python, *launcher, str(self.script), *arguments],
                cwd=self.script.parent,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_LIMIT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerFailed(f"{self.name} could not be run: {error}") from error
        if done.returncode:
            last = done.stderr.strip().splitlines()[-3:]
            raise PeerFailed(f"{self.name} ended with code {done.returncode}: {' / '.join(last)}")
        return _seconds(self.on_cpu) - began


def _seconds(computing: bool) -> float:
    """The clock of a run: of the wall, or of what finished children have computed."""
    if not computing:
        return time.monotonic()
    used = os.times()
    return used.children_user + used.children_system
