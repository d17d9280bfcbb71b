"""The kind `style`: a LoRA of an artist's style, from images.

From top to bottom: the parameters with their limits and defaults, the facts that cross the pipe to
the trainer process, the order as a spec, the check of a message's fields, and `StyleKind`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from jobs import base_models, epochs
from jobs.addresses import (
    BrokenAddress,
    S3Location,
    read_address,
    unused_parts,
    version_of,
)
from jobs.captions import MAX_CAPTION_BYTES, TOO_LARGE, clean_caption, read_caption
from jobs.fields import (
    AUTO_WORD,
    LONGEST_NAME,
    STRICT,
    Auto,
    Order,
    WrongField,
    check_limits,
    checked,
    naming_the_parameter,
    one_line,
    parameter,
    parameters_model,
    printable,
    text,
    whole_number,
)
from jobs.kinds import (
    ApiOrder,
    Claim,
    Fetched,
    Input,
    KindSettings,
    Shown,
    Standing,
    TextBeside,
    with_fields,
)
from jobs.layout import CHECKPOINT_WEIGHTS, HTML_REPORT, STYLE, WEIGHTS
from jobs.record import JobRecord
from utils.errors import ImageDownloadFailed
from utils.events import Finished, Progress, from_dict
from utils.wording import counted, grouped

MAX_STYLE_ID = 2**63 - 1
MAX_IMAGES = 200
MAX_TAGS = 50
# Characters; the rest of a longer text is cut off. The text encoder reads 77 tokens, and the report
# names them.
MAX_TAG = 200
MAX_CAPTION = 2000
MAX_SAMPLE_PROMPTS = 4
MAX_SAMPLE_PROMPT = 500
MAX_TRIGGER_WORD = 64

# ---- parameters ----------------------------------------------------------------------------------

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {"attention": ATTENTION, "attention+ff": (*ATTENTION, "ff.net.0.proj", "ff.net.2")}
"""The UNet's layers that get a LoRA: 128 in SD1.5, or 160 with the feed-forward ones."""
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy")
LIBRARIES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}
"""The library of each optimizer that torch does not have."""
LEFT_OUT = {
    "use_dora": "is not offered: readers of kohya files (diffusers, ComfyUI, A1111) make different "
    "things of DoRA's dora_scale, or drop it, so that one style would have several looks; leave it "
    "out, or set rslora or target for more capacity"
}
"""Parameters that users may expect but that do not exist, each with the reason."""
LR_SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True, slots=True)
class HyperParameters:
    """The `parameters` of a message, each with its limits and its default.

    Raises:
        ValueError: A value is outside its limits; the message names the parameter.
    """

    epochs: int = parameter(
        100,
        "passes over the images; auto: about 3,000 image views in all, at most 500 epochs",
        low=1,
        high=1000,
        auto=True,
    )
    learning_rate: float = parameter(
        1e-4, "peak learning rate; Prodigy finds its own and does not read it", low=1e-7, high=1e-2
    )
    optimizer: str = parameter(
        "adamw",
        "AdamW (arXiv:1711.05101), the same with its state in 8 bits (arXiv:2110.02861), or "
        "Prodigy, which finds the rate itself (arXiv:2306.06101)",
        choices=OPTIMIZERS,
    )
    batch_size: int = parameter(1, "images a forward pass", low=1, high=16)
    # As many as a step of 64 batches of 16 images has where memory allows one image at a time.
    gradient_accumulation_steps: int = parameter(1, "batches an optimizer step", low=1, high=1024)
    resolution: int = parameter(
        512, "side of the training images in pixels, a multiple of 64", low=64, high=1024
    )
    rank: int = parameter(
        16, "rank of the LoRA (arXiv:2106.09685)", low=1, high=256, setting="lora_rank"
    )
    alpha: float = parameter(
        32.0,
        "LoRA alpha; the effect is scaled by alpha / rank",
        low=0.01,
        high=1024.0,
        setting="lora_alpha",
    )
    target: str = parameter(
        "attention",
        "layers that get a LoRA; feed-forward ones add capacity (arXiv:2305.14314)",
        choices=tuple(TARGETS),
        setting="lora_target",
    )
    rslora: bool = parameter(
        False, "rank-stabilised: scaled by alpha / √rank (arXiv:2312.03732), for high ranks"
    )
    dropout: float = parameter(
        0.1, "dropout before the LoRA", low=0.0, high=0.9, setting="lora_dropout"
    )
    seed: int = parameter(42, "seed of weights, noise, timesteps and order", low=0, high=2**31 - 1)
    snr_gamma: float = parameter(
        5.0, "min-SNR weighting (arXiv:2303.09556); 0 turns it off", low=0.0, high=100.0
    )
    noise_offset: float = parameter(
        0.0,
        "noise of one value a channel, for very dark or bright styles (why: arXiv:2305.08891)",
        low=0.0,
        high=1.0,
    )
    lr_schedule: str = parameter(
        "cosine",
        "shape of the learning rate after warm-up (arXiv:1608.03983)",
        choices=LR_SCHEDULES,
    )
    warmup_ratio: float = parameter(
        0.05, "part of the steps that warms up (arXiv:1706.02677)", low=0.0, high=0.9
    )
    weight_decay: float = parameter(
        0.01, "weight decay, decoupled (arXiv:1711.05101)", low=0.0, high=1.0
    )
    max_grad_norm: float = parameter(
        1.0, "gradient norm is clipped to this (arXiv:1211.5063)", low=0.001, high=1000.0
    )
    caption_dropout: float = parameter(
        0.1, "part of the steps with an empty prompt (arXiv:2207.12598)", low=0.0, high=1.0
    )
    shuffle_tags: bool = parameter(
        False, "the parts of a caption between commas come in another order each epoch"
    )
    deliver: str = parameter(
        "last",
        "which checkpoint becomes the model; the best one is chosen by images that are not trained "
        "on: the validation images, else a tenth of 10 images or more",
        choices=("last", "best"),
    )

    def __post_init__(self) -> None:
        check_limits(self)
        if self.resolution % 64:
            raise ValueError(f"resolution is {self.resolution}; it must be a multiple of 64")

    def require_libraries(self) -> None:
        """Refuse what this machine's libraries cannot do, without importing them.

        This is not a part of the limits: results that another machine trained can be read here.

        Raises:
            ValueError: Names the library that is not installed.
        """
        library = LIBRARIES.get(self.optimizer)
        if library and not importlib.util.find_spec(library):
            raise ValueError(
                f"optimizer is {self.optimizer!r}, and the library {library} that it needs is not "
                "installed on this worker; choose adamw, or install it"
            )


BROKEN = "\x1a"
"""Begins a broken address in a copy of a message: ASCII's substitute for a faulty character."""
AUTO_VIEWS, AUTO_MOST_EPOCHS = 3000, 500
"""`epochs: auto`: 500 epochs for up to 6 images, 300 for 10, 100 for 30."""
AUTO_LEVEL = 1
"""The protocol level of a message with `epochs: auto`, for its header `x-min-level`."""


def auto_epochs(images: int) -> int:
    """The epochs that `auto` stands for."""
    return max(1, min(AUTO_MOST_EPOCHS, round(AUTO_VIEWS / max(1, images))))


PARAMETER_NAMES = tuple(field.name for field in dataclasses.fields(HyperParameters))


@dataclasses.dataclass(frozen=True, slots=True)
class StyleOptions:
    """Settings of the worker for all styles.

    Raises:
        ValueError: A value is outside its limits; the message names the option.
    """

    min_images: int = parameter(3, "fewer usable images fail the run", low=1, high=200)
    max_image_bytes: int = parameter(50 * 1024**2, "larger images are left out", low=1024)
    max_image_pixels: int = parameter(100_000_000, "larger images are left out", low=64 * 64)
    checkpoint_interval: int = parameter(10, "epochs between checkpoints", low=1)
    preview_share: float = parameter(
        0.1, "part of the training's time that samples at checkpoints may take", low=0.0, high=1.0
    )
    sample_steps: int = parameter(25, "steps of the sampler; a CPU uses fewer", low=1, high=100)
    tensorboard: bool = parameter(False, "write event files with curves")

    def __post_init__(self) -> None:
        check_limits(self)

    def require_libraries(self) -> None:
        """Refuse options that this machine's libraries cannot serve, without importing them.

        Raises:
            ValueError: Names the library that is not installed.
        """
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "tensorboard is true, and the package tensorboard is not installed; install it "
                "(requirements.txt names the version), or set it to false"
            )


# ---- facts that cross the pipe -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingImage:
    """One image that the message asked for.

    Attributes:
        source: Its address as in the message, so that the sender recognises it in the report.
        path: Local file, or None if it could not be fetched.
        caption: Caption, or the empty string.
        problem: The reason if there is no file, for an artist to read; None if there is one.
        caption_problem: Why a caption is ignored; None if none is ignored.
    """

    source: str
    path: str | None
    caption: str = ""
    problem: str | None = None
    caption_problem: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingRun:
    """The training run of one claim.

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
        validation_images: Images for the probe, which are never trained on.
        sample_prompts: Prompts of the samples; without any, the captions.
        trigger_word: Word in front of every prompt, or the empty string.
        sample_steps: Steps of the sampler; a CPU uses fewer.
        preview_share: Part of the training's time that samples at checkpoints may take.
        tensorboard: Write curves as event files into the folder `CURVES`.
        epochs_auto: The epochs were found by the number of images.
        notes: Sentences for the report about files that were sent but are not used.
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
    epochs_auto: bool = False
    notes: tuple[str, ...] = ()


# ---- spec ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class ImageRef:
    """One image that the message names.

    Attributes:
        source: Its address as in the message. Of a query, which may hold a signature, only the
            version is kept.
        location: Bucket and key; None if no object can have this address.
        problem: The reason if there is no location, for an artist to read; None if there is one.
    """

    source: str
    location: S3Location | None
    problem: str | None = None

    @property
    def version_id(self) -> str | None:
        """The object's version that the address names; None for the present one.

        Part of the source, and no field: earlier releases refuse a record with unknown fields.
        """
        return version_of(self.source) if self.location else None


@dataclasses.dataclass(frozen=True, slots=True)
class StyleSpec:
    """The order of a style.

    Attributes:
        style_id: The style to train.
        images: In the message's order.
        captions: One per image; None if the message gives none.
        tags: In the message's order.
        parameters: The hyper-parameters that the message sets.
        hyper_parameters: All hyper-parameters: the message's values, otherwise the worker's
            defaults.
        validation_images: Images that are never trained on.
        sample_prompts: Prompts of the samples; without any, the captions.
        trigger_word: Word in front of every prompt, or the empty string.
    """

    style_id: int
    images: tuple[ImageRef, ...]
    captions: tuple[str | None, ...]
    tags: tuple[str, ...]
    parameters: dict[str, Any]
    hyper_parameters: HyperParameters
    validation_images: tuple[ImageRef, ...] = ()
    sample_prompts: tuple[str, ...] = ()
    trigger_word: str = ""

    @property
    def subject(self) -> str:
        """The style's id as text."""
        return str(self.style_id)

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of the order's meaning, without its spelling and the worker's defaults."""
        meaning: dict[str, Any] = {
            "style_id": self.style_id,
            "images": _places(self.images),
            "captions": self.captions,
            "tags": self.tags,
            "parameters": self.parameters,
        }
        # Older records hold the identity of messages without these fields.
        if self.validation_images:
            meaning["validation_images"] = _places(self.validation_images)
        if self.sample_prompts:
            meaning["sample_prompts"] = self.sample_prompts
        if self.trigger_word:
            meaning["trigger_word"] = self.trigger_word
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


def _shown(address: str) -> str:
    """A broken address for people, without its query; that of a copy is shown as in the message."""
    own = address.removeprefix(BROKEN)
    if own != address and own.isprintable() and len(own) <= LONGEST_NAME:
        return own
    return printable(own.partition("?")[0])


def _address(image: ImageRef) -> str:
    """The image's address for a copy of the message, which means the same image."""
    # The shown form of a broken address may be a sound address of another object.
    return image.source if image.location else BROKEN + image.source


def _places(images: tuple[ImageRef, ...]) -> list[Any]:
    """Locations of images, independent of the spelling of their addresses."""
    return [
        (
            [image.location.bucket, image.location.key, *filter(None, [image.version_id])]
            if image.location
            else image.source
        )
        for image in images
    ]


# ---- fields of a message -------------------------------------------------------------------------


def checked_trigger_word(given: str) -> str:
    """A trigger word on one line, with its limits checked.

    Raises:
        ValueError: It is too long, or would be several tags.
    """
    word = " ".join(given.split())
    if len(word) > MAX_TRIGGER_WORD:
        raise ValueError(f"must have at most {MAX_TRIGGER_WORD} characters")
    if clean_caption(word).problem:
        raise ValueError("must be valid Unicode text without control characters")
    if "," in word:
        raise ValueError("must have no comma, because commas separate tags")
    return word


Parameters = parameters_model(HyperParameters)
Caption = text(MAX_CAPTION)
Tag = text(MAX_TAG)
SamplePrompt = text(MAX_SAMPLE_PROMPT)
TriggerWord = Annotated[str, AfterValidator(lambda word: checked_trigger_word(one_line(word)))]


class StyleOrder(BaseModel):
    """The fields of an order in either dialect; `images` stands for `image_urls` too."""

    model_config = STRICT

    style_id: whole_number(1, MAX_STYLE_ID)  # type: ignore[valid-type]
    images: Annotated[list[str | None], Field(min_length=1, max_length=MAX_IMAGES)]
    captions: list[Caption | None] | None = None  # type: ignore[valid-type]
    tags: Annotated[list[Tag], Field(max_length=MAX_TAGS)] | None = None  # type: ignore[valid-type]
    validation_images: Annotated[list[str | None], Field(max_length=MAX_IMAGES)] | None = None
    sample_prompts: (
        Annotated[list[SamplePrompt], Field(max_length=MAX_SAMPLE_PROMPTS)]  # type: ignore[valid-type]
        | None
    ) = None
    trigger_word: TriggerWord | None = None
    parameters: Parameters | None = None  # type: ignore[valid-type]

    def given_parameters(self) -> dict[str, Any]:
        """The parameters that the message sets."""
        # Without the serializer, which expects a number where the word `auto` is.
        values: dict[str, Any] = dict(self.parameters) if self.parameters else {}
        return {name: value for name, value in values.items() if value is not None}


# ---- the kind ------------------------------------------------------------------------------------

IMAGES = "images"
VALIDATION = "validation"
WEIGHTS_PER_RANK = {"attention": 199_296, "attention+ff": 374_016}
"""The number of trained values of a LoRA of rank 1 on SD1.5's UNet."""
NUMBERS_PER_WEIGHT = {"adamw": 3, "adamw8bit": 2, "prodigy": 5}
"""Values of four bytes per trained value in a checkpoint: weight and optimizer state, rounded
up."""
CHECKPOINTS_AT_ONCE = 3
"""Checkpoints on the disk at once: one is uploaded, one waits, and one is written."""
MODEL_FORMATS = 3
OTHER_FILES_BYTES = 256 * 1024**2
"""Bytes for the report, samples, curves and temporary files, with a reserve for other programs."""


class StyleKind:
    """Orders of styles.

    Args:
        settings: Default hyper-parameters, `StyleOptions`, and the buckets of images.
    """

    name = STYLE
    message_type = "model_training"
    runner = "training.style.work:StyleWork"
    spec_type = StyleSpec
    parameters_type = HyperParameters
    options_type = StyleOptions
    last_file = WEIGHTS
    checkpoint_file = CHECKPOINT_WEIGHTS
    labels = ("style_id",)
    counters, gauges = epochs.COUNTERS, epochs.GAUGES
    needs_gpu = True
    shares_gpus = False
    subject_is_number = True

    def __init__(self, settings: KindSettings) -> None:
        self._defaults = HyperParameters(**settings.parameters)
        self._options = StyleOptions(**settings.options)
        self._addresses = settings.addresses
        self.max_input_bytes = self._options.max_image_bytes

    def refusal(self, base_model: str) -> str | None:
        """A folder that holds a model of another family; see `JobKind.refusal`."""
        return base_models.refusal_of(base_model)

    # --- from a message to a spec, and back

    def read(self, order: Order) -> StyleSpec:
        """Check an order; see `JobKind.read`."""
        own, other = ("images", "image_urls") if order.prefix else ("image_urls", "images")
        images_field = other if not order.has(own) and order.has(other) else own
        fields = {name: images_field if name == "images" else name for name in _FIELDS}
        found = {name: order.get(spelt) for name, spelt in fields.items()}
        given = checked(
            StyleOrder,
            {name: value for name, value in found.items() if value is not None},
            order,
            parameters=PARAMETER_NAMES,
            left_out=LEFT_OUT,
            spelt={"images": images_field},
        )
        images = self._images(given.images, order, images_field)
        if not any(image.location for image in images):
            problem = (images[0].problem or "").removeprefix("has an address that ")
            raise WrongField(order.at(f"{images_field}.0"), problem)
        captions = given.captions or [None] * len(images)
        if len(captions) != len(images):
            said = f"has {counted(len(captions), 'entry', 'entries')} for "
            raise WrongField(order.at("captions"), said + counted(len(images), "image"))
        parameters = given.given_parameters()
        return StyleSpec(
            style_id=given.style_id,
            images=images,
            captions=tuple(captions),
            tags=tuple(tag for tag in given.tags or () if tag),
            parameters=parameters,
            hyper_parameters=self._with_defaults(parameters, len(images), order),
            validation_images=self._images(
                given.validation_images or [], order, "validation_images"
            ),
            sample_prompts=tuple(prompt for prompt in given.sample_prompts or () if prompt),
            trigger_word=given.trigger_word or "",
        )

    def _images(
        self, addresses: Sequence[str | None], order: Order, field: str
    ) -> tuple[ImageRef, ...]:
        """One entry per image.

        A broken address costs one image; an address outside the allowed buckets makes the
        message invalid.
        """
        images = []
        for index, address in enumerate(addresses):
            try:
                source, location = read_address(address or "", self._addresses)
            except BrokenAddress as broken:
                shown = _shown(address or "")
                images.append(ImageRef(shown, None, f"has an address that {broken}"))
            except ValueError as error:
                raise WrongField(order.at(f"{field}.{index}"), str(error)) from None
            else:
                images.append(ImageRef(source, location))
                parts = unused_parts(address or "")
                order.leave_unused(*(f"{field}.{index}{part}" for part in parts))
        return tuple(images)

    def _with_defaults(
        self, parameters: dict[str, Any], images: int, order: Order
    ) -> HyperParameters:
        with naming_the_parameter(order, PARAMETER_NAMES):
            return self.hyper_parameters(parameters, images)

    def hyper_parameters(self, given: Mapping[str, Any], images: int) -> HyperParameters:
        """The parameters of an order, with the worker's defaults for the others.

        Args:
            given: The order's parameters.
            images: The number of the order's images, for `epochs: auto`.

        Raises:
            ValueError: A parameter is outside its limits, or needs a library that is not installed.
        """
        if self._wants_auto(given):
            given = {**given, "epochs": auto_epochs(images)}
        parameters = dataclasses.replace(self._defaults, **given)
        parameters.require_libraries()
        return parameters

    def _wants_auto(self, given: Mapping[str, Any]) -> bool:
        wanted = given.get("epochs", self._defaults.epochs)
        return wanted == AUTO_WORD or isinstance(wanted, Auto)

    def subject_in(self, order: Mapping[str, Any]) -> str | None:
        """The style's id; see `JobKind.subject_in`."""
        value = order.get("style_id")
        if isinstance(value, bool) or not isinstance(value, int):
            return None
        return str(value) if 0 < value <= MAX_STYLE_ID else None

    def restored(self, values: Mapping[str, Any]) -> StyleSpec:
        """The spec of a record; see `JobKind.restored`."""
        spec = dict(values)
        if "hyper_parameters" not in spec:
            given, images = spec.get("parameters", {}), spec.get("images", ())
            defaults = self.hyper_parameters(given, len(images))
            spec["hyper_parameters"] = dataclasses.asdict(defaults)
        return from_dict(StyleSpec, spec, tolerant=True)

    def order(self, spec: StyleSpec) -> dict[str, Any]:
        """The `data` of a message; see `JobKind.order`."""
        data = {
            "style_id": spec.style_id,
            "images": [_address(image) for image in spec.images],
            "captions": list(spec.captions) if any(c is not None for c in spec.captions) else None,
            "tags": list(spec.tags) or None,
            "validation_images": [_address(image) for image in spec.validation_images] or None,
            "sample_prompts": list(spec.sample_prompts) or None,
            "trigger_word": spec.trigger_word or None,
            "parameters": spec.parameters or None,
        }
        return {name: value for name, value in data.items() if value is not None}

    def api_order(self, order: ApiOrder) -> dict[str, Any]:
        """The `data` of a message for an order of the API; see `OrderedOverApi`."""
        images = order.training_files
        if any(each.name.lower().endswith((".txt", ".caption")) for each in images):
            raise WrongField(
                "training_files",
                "must be images. Give captions in `captions`, one for each image, or null",
            )
        if not images:
            raise WrongField("training_files", "must name the uploaded images")
        data = {
            "style_id": int(order.subject),
            "images": [each.address for each in images],
            "parameters": order.own_parameters(self._defaults.learning_rate) or None,
            "validation_images": [each.address for each in order.validation_files] or None,
        }
        return with_fields(data, order.fields)

    def min_level(self, spec: StyleSpec) -> int:
        """That of `epochs: auto`, which the last release refuses."""
        return AUTO_LEVEL if spec.parameters.get("epochs") == AUTO_WORD else 0

    # --- from a spec to a run

    def inputs(self, spec: StyleSpec) -> tuple[Input, ...]:
        """The images and the validation images."""
        none = (None,) * len(spec.validation_images)
        return tuple(
            Input(
                *(image.source, image.location, image.version_id, image.problem, role, caption),
                text_source=caption_beside(image.location) if caption is None else None,
            )
            for role, images, captions in (
                (IMAGES, spec.images, spec.captions),
                (VALIDATION, spec.validation_images, none),
            )
            for image, caption in zip(images, captions, strict=True)
        )

    def output_bytes(self, spec: StyleSpec) -> int:
        """Checkpoints, the model in its formats, and the report."""
        parameters = spec.hyper_parameters
        weights = WEIGHTS_PER_RANK.get(parameters.target, max(WEIGHTS_PER_RANK.values()))
        weights *= parameters.rank
        numbers = NUMBERS_PER_WEIGHT.get(parameters.optimizer, max(NUMBERS_PER_WEIGHT.values()))
        best = 1 if parameters.deliver == "best" else 0  # part of every checkpoint
        checkpoints = CHECKPOINTS_AT_ONCE * weights * 4 * (numbers + best)
        return checkpoints + MODEL_FORMATS * weights * 4 + OTHER_FILES_BYTES

    def run(self, spec: StyleSpec, fetched: Sequence[Fetched], claim: Claim) -> TrainingRun:
        """The training run; see `JobKind.run`.

        Raises:
            ImageDownloadFailed: Too few images could be fetched.
        """
        options = self._options
        images = _training_images(fetched, IMAGES, spec.tags)
        missing = [image for image in images if image.path is None]
        there = len(images) - len(missing)
        if there < options.min_images <= len(images):
            raise ImageDownloadFailed(
                f"only {there} of {len(images)} images could be fetched, and "
                f"{options.min_images} are needed: "
                + grouped(((image.source, image.problem or "") for image in missing), "image")
            )
        return TrainingRun(
            task_id=claim.task_id,
            style_id=spec.style_id,
            claim=claim.number,
            images=images,
            parameters=spec.hyper_parameters,
            work_folder=str(claim.folder),
            resume_from=claim.resume_from,
            min_images=options.min_images,
            max_image_pixels=options.max_image_pixels,
            checkpoint_interval=options.checkpoint_interval,
            validation_images=_training_images(fetched, VALIDATION, spec.tags),
            sample_prompts=spec.sample_prompts,
            trigger_word=spec.trigger_word,
            sample_steps=options.sample_steps,
            preview_share=options.preview_share,
            tensorboard=options.tensorboard,
            epochs_auto=self._wants_auto(spec.parameters),
        )

    # --- webhooks

    def identity_fields(self, subject: str) -> dict[str, Any]:
        """`style_id`."""
        return {"style_id": int(subject)}

    def beginning(self, spec: StyleSpec) -> dict[str, Any]:
        """The facts of a job that has not trained yet."""
        return {"epoch": 0, "total_epochs": spec.hyper_parameters.epochs}

    def progress(self, progress: Progress) -> dict[str, Any]:
        """Epochs and loss; see `JobKind.progress`."""
        facts = progress.facts
        done = progress.done / progress.total if progress.total else 0.0
        told: dict[str, Any] = {
            "current_epoch": facts.get("epoch", 0),
            "total_epochs": facts.get("total_epochs", facts.get("epoch", 0)),
            "progress_percent": int(100 * done),
            # The field is required and an integer, so 0 also means "not measured yet".
            "estimated_seconds": progress.seconds_left or 0,
            "stage": str(progress.stage),
        }
        if facts.get("loss") is not None:
            told["loss"] = facts["loss"]
        return told

    def shown(self, facts: Mapping[str, Any]) -> Shown:
        """Epochs and loss; see `JobKind.shown`."""
        return epochs.shown(facts)

    def standing(self, record: JobRecord | None) -> Standing:
        """Epochs and loss; see `JobKind.standing`."""
        parameters = record.message.get("hyper_parameters") if record else None
        total = (parameters or {}).get("epochs")
        return epochs.standing(record, total if isinstance(total, int) else None)

    def complete(self, spec: StyleSpec, finished: Finished, model_url: str) -> dict[str, Any]:
        """Epochs, rank, loss and counts of images; see `JobKind.complete`."""
        used = finished.summary.get("hyperparameters", {})
        epoch = finished.facts.get("epoch", 0)
        return {
            "metadata": {
                "training_epochs": epoch,
                "lora_rank": used.get("rank", spec.hyper_parameters.rank),
                "lora_alpha": used.get("alpha", spec.hyper_parameters.alpha),
            },
            "training_metric": {
                "loss": finished.facts.get("loss"),
                "epochs": epoch,
                # For backends that keep the model's address and this object, and nothing else.
                "images_used": finished.summary.get("pictures_used"),
                "images_left_out": finished.summary.get("pictures_left_out"),
                "report_url": f"{model_url.rpartition('/')[0]}/{HTML_REPORT}",
            },
        }


_FIELDS = (
    *("style_id", "images", "captions", "tags", "validation_images", "sample_prompts"),
    *("trigger_word", "parameters"),
)


def _training_images(
    fetched: Sequence[Fetched], role: str, tags: Sequence[str]
) -> tuple[TrainingImage, ...]:
    return tuple(
        TrainingImage(
            source=each.input.source,
            path=str(each.path) if each.path else None,
            caption=_caption(each, tags),
            problem=each.problem,
            caption_problem=each.text_problem,
        )
        for each in fetched
        if each.input.role == role
    )


def caption_beside(image: S3Location | None) -> TextBeside | None:
    """The objects that may hold an image's caption; None for an image without a location."""
    if image is None:
        return None
    folder, slash, name = image.key.rpartition("/")
    stem = name.rpartition(".")[0] or name
    names = dict.fromkeys((f"{stem}.txt", f"{name}.txt", f"{stem}.TXT", f"{stem}.caption"))
    for form in ("NFC", "NFD"):  # a Mac decomposes the letters of names, other systems do not
        names |= dict.fromkeys(unicodedata.normalize(form, each) for each in list(names)[:2])
    places = (S3Location(image.bucket, f"{folder}{slash}{each}") for each in names if each != name)
    return TextBeside(tuple(places), MAX_CAPTION_BYTES, TOO_LARGE, _read_caption)


def _read_caption(content: bytes) -> tuple[str, str | None]:
    found = read_caption(content)
    return found.text, found.problem


def _caption(fetched: Fetched, tags: Sequence[str]) -> str:
    if fetched.input.location is None:
        return ""
    return fetched.text if fetched.text is not None else ", ".join(tags)
