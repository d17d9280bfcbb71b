"""Image files to vetted, captioned latents: everything is encoded once, and cached."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from images.buckets import Frame
from images.checks import MOTIF, Looks, motif_of
from images.colour import UnusableImage
from images.decoder import Answer, Decoder
from images.decoding import Refused, Request
from images.judgement import FEW_IMAGES, compare, cropped, enlarged
from jobs.captions import clean_caption
from jobs.style import TrainingImage, TrainingRun
from training.style import checkpoint, held_out
from training.style.examples import Dataset, Example, ImageReport, Latents
from training.style.families.sd15 import BaseModel
from utils.errors import ImageDownloadFailed, LowQualityData, Stopped, StopReason
from utils.names import printable, shown_name
from utils.wording import counted, grouped

log = logging.getLogger(__name__)

CAPTION_IGNORED = "its caption was ignored: "
"""How a reason begins that is about a caption and not about an image."""
ORDERS = 8
"""Of a caption's tags, at most: each is encoded once and kept, 0.1 MB in half precision."""


def prepare(
    run: TrainingRun,
    base: BaseModel,
    *,
    should_stop: Callable[[], StopReason | None] = lambda: None,
    on_image: Callable[[], None] = lambda: None,
) -> Dataset:
    """Vet and encode a run's images, and its validation images as `held_out`.

    Validation images never fail a run. If there are none and the best checkpoint is wanted, a tenth
    of the images is held out.

    Args:
        run: The run.
        base: The base model, whose VAE and text encoder are used.
        should_stop: Called before each image and while it is decoded.
        on_image: Called after each image, so that the desk sees that the process works.

    Raises:
        ImageDownloadFailed: Too few images are usable because too few could be fetched.
        LowQualityData: Too few images are usable: the message names each image that was left out
            and the reason. Or too few to hold a tenth of them out.
        Stopped: `should_stop` gave a reason.
        WorkerCrashed: The decoder cannot be started.
    """
    with Decoder() as decoder:
        prepare_one = functools.partial(
            _prepare_one, base=base, decoder=decoder, should_stop=should_stop, on_image=on_image
        )
        data = prepare_one(run)
        if run.validation_images:
            others = dataclasses.replace(run, images=run.validation_images, min_images=0, notes=())
            found = held_out.apart(prepare_one(others), data)
            data = dataclasses.replace(data, held_out=found)
    trained = checkpoint.images_in(Path(run.resume_from)) if run.resume_from else None
    return held_out.for_the_choice(data, run, trained)


def _prepare_one(
    run: TrainingRun,
    base: BaseModel,
    decoder: Decoder,
    *,
    should_stop: Callable[[], StopReason | None],
    on_image: Callable[[], None],
) -> Dataset:
    """Vet and encode the images of a run without its validation images."""
    entries: list[ImageReport] = []
    usable: list[Example] = []
    found = _Found()
    for image, answer in _decoded(run, decoder, should_stop):
        if reason := should_stop():
            raise Stopped(reason)
        entry, example = _take_in(image, answer, run, base, found)
        entries.append(entry := _with_caption_problem(entry, image))
        if example:
            usable.append(example)
        else:
            log.warning("picture_left_out", extra={"image": _name(entry), "reasons": entry.reasons})
        on_image()
    _refuse_too_few(run, entries, len(usable))
    # Those of the samples too, because the text encoder waits on the CPU during training.
    prompts = [with_trigger(run.trigger_word, prompt) for prompt in run.sample_prompts]
    captions = dict.fromkeys(
        ["", *(caption for each in usable for caption in each.orders), *prompts]
    )
    return Dataset(
        tuple(entries),
        tuple(usable),
        found.latents,
        {caption: base.encode_prompts([caption])[0] for caption in captions},
        _warnings(run, len(usable), found),
        thumbnails=found.thumbnails,
        looks=found.looks,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """Results from the images so far.

    Attributes:
        latents: By the image's identity.
        looks: The same.
        seen: Name and looks of each usable image.
        thumbnails: By the file's path.
    """

    latents: dict[str, Latents] = dataclasses.field(default_factory=dict)
    looks: dict[str, Looks] = dataclasses.field(default_factory=dict)
    seen: list[tuple[str, Looks]] = dataclasses.field(default_factory=list)
    thumbnails: dict[str, bytes] = dataclasses.field(default_factory=dict)


def _warnings(run: TrainingRun, usable: int, found: _Found) -> tuple[str, ...]:
    """Sentences about the images as a whole."""
    warnings = list(run.notes)
    if usable < FEW_IMAGES:
        warnings.append(
            f"Only {counted(usable, 'image')} can be trained on; by experience, a style holds "
            f"better with {FEW_IMAGES} to 30."
        )
    if all(looks.is_grey for _, looks in found.seen):
        warnings.append(
            "All images are without colour; such a style comes out tinted unless the captions "
            "name it (black and white, pencil drawing)."
        )
    return tuple(warnings)


def _decoded(
    run: TrainingRun, decoder: Decoder, should_stop: Callable[[], StopReason | None]
) -> Iterator[tuple[TrainingImage, Answer | None]]:
    """Each image with the answer of the decoder; None if there is no file."""
    requests = [
        Request(image.path, run.max_image_pixels, run.parameters.resolution)
        for image in run.images
        if image.path is not None
    ]
    answers = decoder.answers(requests, should_stop=should_stop)
    for image in run.images:
        yield image, next(answers, None) if image.path is not None else None


def _take_in(
    image: TrainingImage, answer: Answer | None, run: TrainingRun, base: BaseModel, found: _Found
) -> tuple[ImageReport, Example | None]:
    """Judge and encode one decoded image; what it brings goes into `found`."""
    if image.path is None or answer is None:
        return _left_out(image, image.problem or "could not be fetched"), None
    if answer.thumbnail:
        found.thumbnails[image.path] = answer.thumbnail
    fact = answer.fact
    if isinstance(fact, Refused):
        size = (fact.width, fact.height) if fact.width and fact.height else None
        return _left_out(image, fact.reason, size), None
    copy = Image.frombytes("L", (MOTIF, MOTIF), answer.motif)
    looks = Looks(fact.looks, fact.is_grey, fact.pixels, motif_of(copy))
    frame, size = Frame(*fact.frame), (fact.width, fact.height)
    try:
        cautions = looks.warnings + compare(size, looks, found.seen)
        caption, cut = _caption(image, run, base)
        found.latents[fact.identity] = _encode(answer.pixels, frame, size, base)
    except UnusableImage as unusable:
        return _left_out(image, str(unusable), unusable.size), None
    found.seen.append((shown_name(image.source), looks))
    found.looks[fact.identity] = looks
    cautions = fact.warnings + enlarged(size, frame) + cautions + cut
    entry = ImageReport(
        printable(image.source),
        "warned" if cautions else "used",
        cautions + fact.notes + cropped(size, frame),
        *size,
        caption,
        fact.decoded,
        str(frame),
    )
    return entry, Example(
        image.source, fact.identity, caption, _orders(caption, fact.identity, run)
    )


def _with_caption_problem(entry: ImageReport, image: TrainingImage) -> ImageReport:
    """The entry with the reason for which the image's caption is not trained, if there is one."""
    problem = image.caption_problem
    if not problem:  # else the code that found the problem has logged it
        problem = clean_caption(image.caption).problem
        if not problem:
            return entry
        log.warning("caption_ignored", extra={"image": _name(entry), "reason": problem})
    status = "warned" if entry.status == "used" else entry.status
    reasons = (*entry.reasons, f"{CAPTION_IGNORED}{problem}")
    return dataclasses.replace(entry, status=status, reasons=reasons)


def _caption(
    image: TrainingImage, run: TrainingRun, base: BaseModel
) -> tuple[str, tuple[str, ...]]:
    """The prompt of an image, and a warning if the caption is longer than that."""
    prompt = with_trigger(run.trigger_word, clean_caption(image.caption).text)
    caption = base.fit_prompt(prompt)
    if caption == prompt:
        return caption, ()
    end = " ".join(caption.rpartition(",")[2].split()[-5:])
    return caption, (f"has a longer caption than can be read; it was cut after “{end[-60:]}”",)


def _orders(caption: str, identity: str, run: TrainingRun) -> tuple[str, ...]:
    if not run.parameters.shuffle_tags:
        return (caption,)
    # By the image: those of one caption do not all have the same order at a time.
    return orders(caption, first=run.trigger_word, seed=f"{run.parameters.seed}/{identity}")


def _left_out(
    image: TrainingImage, reason: str, size: tuple[int, int] | None = None
) -> ImageReport:
    width, height = size or (None, None)
    caption = clean_caption(image.caption).text
    source = printable(image.source)
    return ImageReport(source, "left_out", (reason,), width, height, caption)


def _encode(content: bytes, frame: Frame, size: tuple[int, int], base: BaseModel) -> Latents:
    """Encode the RGB pixels of a frame.

    Raises:
        UnusableImage: The VAE makes no finite numbers of it.
    """
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels = values.view(frame.height, frame.width, 3).permute(2, 0, 1).float() / 127.5 - 1.0
    mean, std = base.encode_images(pixels[None])
    if not bool((torch.isfinite(mean) & torch.isfinite(std)).all()):
        raise UnusableImage(
            "the image encoder cannot represent it (it gave values that are no numbers)",
            size,
        )
    return Latents(mean[0], std[0])


def _refuse_too_few(run: TrainingRun, entries: list[ImageReport], usable: int) -> None:
    if usable >= run.min_images:
        return
    fetched = sum(image.path is not None for image in run.images)
    left_out = grouped(
        [
            (_name(entry), ", ".join(entry.reasons))
            for entry in entries
            if entry.status == "left_out"
        ],
        "image",
    )
    message = (
        f"{usable} of {counted(len(entries), 'image')} can be used, and at least "
        f"{run.min_images} {'is' if run.min_images == 1 else 'are'} needed."
        + (f" Left out: {left_out}." if left_out else " Add more images.")
    )
    if fetched < run.min_images <= len(run.images):
        raise ImageDownloadFailed(message)
    raise LowQualityData(message)


def _name(entry: ImageReport) -> str:
    return shown_name(entry.source)


def with_trigger(word: str, prompt: str) -> str:
    """A prompt with the trigger word in front, unless it begins with it already."""
    if not word or prompt.split(",", 1)[0].strip().casefold() == word.casefold():
        return prompt
    return f"{word}, {prompt}" if prompt else word


def orders(caption: str, *, first: str, seed: str) -> tuple[str, ...]:
    """A caption and its tags in other orders.

    Args:
        caption: Parts of it between commas are tags.
        first: A tag that stays in front, if the caption begins with it.
        seed: The same orders come of the same one.
    """
    tags = [tag for part in caption.split(",") if (tag := part.strip())]
    fixed = [tag for tag in tags[:1] if tag.casefold() == first.casefold()]
    others = tags[len(fixed) :]
    chance = random.Random(seed)
    found = {tuple(others): caption}
    while len(found) < min(ORDERS, math.factorial(len(set(others)))):
        chance.shuffle(others)
        found.setdefault(tuple(others), ", ".join(fixed + others))
    return tuple(found.values())
