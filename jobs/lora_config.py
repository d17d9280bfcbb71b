"""What a run is told: images, hyper-parameters with their limits and defaults, and the options of
the trainer process.

The dataclasses here cross the pipe as JSON. `HyperParameters` is the only place that knows a
parameter's limits: the message's validation and the settings are made from it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {"attention": ATTENTION, "attention+ff": (*ATTENTION, "ff.net.0.proj", "ff.net.2")}
"""Which of the UNet's layers get a LoRA: 128 of SD1.5's, or with the feed-forward ones 160."""
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
LIBRARIES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
"""The library of each optimizer that torch does not have."""
LEFT_OUT = {
    "use_dora": "is not offered: readers of kohya files (diffusers, ComfyUI, A1111) make different "
    "things of DoRA's dora_scale, or drop it, so that one style would have several looks; leave it "
    "out, or set rslora or target for more capacity"
}
"""Parameters that people may well ask for, and why there are none of that name."""
CURVES = "tensorboard"
"""The folder of the event files, in a run's work folder."""
LR_SCHEDULES = ("cosine", "linear", "constant")


def _parameter(
    default: Any, doc: str, *, low: Any = None, high: Any = None, choices: tuple[str, ...] = ()
) -> Any:
    """A hyper-parameter's field: `low` and `high` are inclusive."""
    # A field of the dataclass below, made here to keep its table narrow.
    return dataclasses.field(  # pylint: disable=invalid-field-call
        default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices}
    )


@dataclasses.dataclass(frozen=True, slots=True)
class HyperParameters:
    """What `parameters` of a message may set; every one bounded.

    Raises:
        ValueError: A value is outside its limits; the message names the parameter.
    """

    epochs: int = _parameter(100, "passes over the images", low=1, high=1000)
    learning_rate: float = _parameter(
        1e-4, "peak learning rate; Prodigy finds its own and does not read it", low=1e-7, high=1e-2
    )
    optimizer: str = _parameter(
        "adamw",
        "AdamW (arXiv:1711.05101), the same with its state in 8 bits (arXiv:2110.02861), or "
        "Prodigy, which finds the rate itself (arXiv:2306.06101)",
        choices=OPTIMIZERS,
    )
    batch_size: int = _parameter(1, "images a forward pass", low=1, high=16)
    # As many as a step of 64 batches of 16 images has where memory allows one image at a time.
    gradient_accumulation_steps: int = _parameter(1, "batches an optimizer step", low=1, high=1024)
    resolution: int = _parameter(
        512, "side of the training images in pixels, a multiple of 64", low=64, high=1024
    )
    rank: int = _parameter(16, "rank of the LoRA (arXiv:2106.09685)", low=1, high=256)
    alpha: float = _parameter(
        32.0, "LoRA alpha; the effect is scaled by alpha / rank", low=0.01, high=1024.0
    )
    target: str = _parameter(
        "attention",
        "layers that get a LoRA; feed-forward ones add capacity (arXiv:2305.14314)",
        choices=tuple(TARGETS),
    )
    rslora: bool = _parameter(
        False, "rank-stabilised: scaled by alpha / √rank (arXiv:2312.03732), for high ranks"
    )
    dropout: float = _parameter(0.1, "dropout before the LoRA", low=0.0, high=0.9)
    seed: int = _parameter(42, "seed of weights, noise, timesteps and order", low=0, high=2**31 - 1)
    snr_gamma: float = _parameter(
        5.0, "min-SNR weighting (arXiv:2303.09556); 0 turns it off", low=0.0, high=100.0
    )
    noise_offset: float = _parameter(
        0.0,
        "noise of one value a channel, for very dark or bright styles (why: arXiv:2305.08891)",
        low=0.0,
        high=1.0,
    )
    lr_schedule: str = _parameter(
        "cosine",
        "shape of the learning rate after warm-up (arXiv:1608.03983)",
        choices=LR_SCHEDULES,
    )
    warmup_ratio: float = _parameter(
        0.05, "part of the steps that warms up (arXiv:1706.02677)", low=0.0, high=0.9
    )
    weight_decay: float = _parameter(
        0.01, "weight decay, decoupled (arXiv:1711.05101)", low=0.0, high=1.0
    )
    max_grad_norm: float = _parameter(
        1.0, "gradient norm is clipped to this (arXiv:1211.5063)", low=0.001, high=1000.0
    )
    caption_dropout: float = _parameter(
        0.1, "part of the steps with an empty prompt (arXiv:2207.12598)", low=0.0, high=1.0
    )
    shuffle_tags: bool = _parameter(
        False, "the parts of a caption between commas come in another order each epoch"
    )
    deliver: str = _parameter(
        "last", "which checkpoint becomes the model", choices=("last", "best")
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            if limits["choices"] and value not in limits["choices"]:
                raise ValueError(
                    f"{field.name} is {value!r}; choose one of {', '.join(limits['choices'])}"
                )
            # The negated comparison catches NaN too.
            if limits["low"] is not None and not limits["low"] <= value <= limits["high"]:
                raise ValueError(
                    f"{field.name} is {value}; "
                    f"it must lie between {limits['low']} and {limits['high']}"
                )
        if self.resolution % 64:
            raise ValueError(f"resolution is {self.resolution}; it must be a multiple of 64")

    def require_libraries(self) -> None:
        """Refuse what this machine's libraries cannot do, without importing them.

        Not a part of the limits: what another machine trained can be read here.

        Raises:
            ValueError: Names the library that is not installed.
        """
        library = LIBRARIES.get(self.optimizer)
        if library and not importlib.util.find_spec(library):
            raise ValueError(
                f"optimizer is {self.optimizer!r}, and the library {library} that it needs is not "
                "installed on this worker; choose adamw, or install it"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingImage:
    """One image that the message asked for.

    Attributes:
        source: Its address as the message spelt it: what a person will recognise in the report.
        path: Local file, or None where it could not be fetched.
        caption: Caption, or the empty string.
        problem: Why there is no file, in words an artist understands; None where there is one.
        caption_problem: Why a caption that was there is ignored; None where none was ignored.
    """

    source: str
    path: str | None
    caption: str = ""
    problem: str | None = None
    caption_problem: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingRun:
    """One claim's worth of training.

    Attributes:
        task_id: The job.
        style_id: The style that the job trains.
        claim: Number of the claim under which the run is done; it is written into every checkpoint.
        images: In the order of the message.
        parameters: Hyper-parameters in force.
        work_folder: Absolute folder of the run; the trainer writes only below it.
        resume_from: Absolute folder of a complete checkpoint of this job, or None.
        min_images: Fewer usable images than this fail the run.
        max_image_pixels: Larger images are left out.
        checkpoint_interval: Epochs between checkpoints.
        validation_pictures: Never trained on: the probe looks at them.
        sample_prompts: What samples are painted of; none: the captions.
        trigger_word: In front of every prompt, or the empty string.
        sample_steps: Steps of the sampler; a CPU makes a sketch of fewer.
        preview_share: Part of the training's time that samples at checkpoints may take.
        tensorboard: Draw curves, as event files in the folder `CURVES`.
        notes: Sentences for the report about files that were sent and are not used.
    """

    task_id: str
    style_id: int
    claim: int
    images: tuple[TrainingImage, ...]
    parameters: HyperParameters
    work_folder: str
    resume_from: str | None = None
    min_images: int = 3
    max_image_pixels: int = 100_000_000
    checkpoint_interval: int = 10
    validation_images: tuple[TrainingImage, ...] = ()
    sample_prompts: tuple[str, ...] = ()
    trigger_word: str = ""
    sample_steps: int = 25
    preview_share: float = 0.0
    tensorboard: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class TrainerOptions:
    """What a trainer process is told once, when it starts.

    Attributes:
        base_model: Hub name or local diffusers folder of a Stable Diffusion 1.5 model.
        base_model_revision: Hub revision; None for the default branch.
        mixed_precision: `fp16`, `bf16` or `no`; on a CPU always `no`.
        gradient_checkpointing: `true`, `false` or `auto`.
        allow_cpu: Train on the CPU where there is no CUDA, instead of failing.
        log_level: Level of the trainer's own log lines.
        log_format: `json` or `text`.
    """

    base_model: str
    base_model_revision: str | None = None
    mixed_precision: str = "fp16"
    gradient_checkpointing: str = "true"
    allow_cpu: bool = False
    log_level: str = "INFO"
    log_format: str = "json"
