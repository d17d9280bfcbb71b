"""Picture files to vetted, captioned latents: everything is encoded once, and cached."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from training.base_model import BaseModel
from training.buckets import Frame, frame_for
from training.lora_config import Picture, TrainingRun
from training.picture_checks import Looks, look_at
from training.prompts import orders, with_trigger
from training.vetting import UnusablePicture, Vetted, vet
from utils.errors import ImageDownloadFailed, LowQualityData, Stopped, StopReason
from utils.wording import counted, grouped

log = logging.getLogger(__name__)

FEW_PICTURES = 10
"""With fewer usable pictures than this, a style comes out weakly."""
MUCH_LOST = 0.1
"""A part of the picture; a crop of more is said in the report."""


@dataclasses.dataclass(frozen=True, slots=True)
class PictureReport:
    """What became of one picture that was asked for.

    Attributes:
        source: Its address as the message spelt it.
        status: `used`, `warned` (used, but the artist should know something), or `left_out`.
        reasons: Why, and what was done to it, in words an artist understands.
        width, height: In pixels after rotation; None where they are not known.
        caption: The caption it is trained with.
        decoded: What the file was: format, size as stored, colour mode; None where it was none.
        trained_as: What it is scaled and cropped to, such as "640 x 384"; None where it is not.
    """

    source: str
    status: str
    reasons: tuple[str, ...]
    width: int | None
    height: int | None
    caption: str
    decoded: str | None = None
    trained_as: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One usable picture.

    Attributes:
        source: Its address.
        identity: SHA-256 of its bytes, the key of its latents.
        caption: Its caption, the key of its embedding.
        orders: The caption, and the same tags in other orders where they are to be shuffled.
    """

    source: str
    identity: str
    caption: str
    orders: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Latents:
    """A latent distribution: mean and standard deviation, [4, h/8, w/8] float32, scaled."""

    mean: Tensor
    std: Tensor


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Everything that the loop reads, on the device: thirty pictures take about 8 MB.

    Attributes:
        entries: One a picture asked for, in order.
        usable: What is trained on, in order.
        latents: By the picture's identity, never by position: a shuffle cannot pair a picture with
            another's caption.
        embeddings: [77, d] by caption, in each of its orders; the empty prompt's is always there.
        warnings: Sentences for the report.
        held_out: Pictures that the probe looks at and the loop never sees, if there are any.
    """

    entries: tuple[PictureReport, ...]
    usable: tuple[Example, ...]
    latents: dict[str, Latents]
    embeddings: dict[str, Tensor]
    warnings: tuple[str, ...] = ()
    held_out: Dataset | None = None

    @property
    def identities(self) -> tuple[str, ...]:
        """One a usable picture: its bytes and its caption, hashed. Resuming compares them."""
        return tuple(
            f"{example.identity}-{hashlib.sha256(example.caption.encode()).hexdigest()[:16]}"
            for example in self.usable
        )

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each usable picture's latent: 4, h/8, w/8. Those of one shape can share a batch."""
        return tuple(tuple(self.latents[each.identity].mean.shape) for each in self.usable)

    def batch(self, chosen: Sequence[int], epoch: int = 0) -> tuple[Latents, Tensor]:
        """Latent distributions, [n, 4, h/8, w/8], and embeddings, [n, 77, d], of n pictures of one
        shape; the order of their tags depends on the epoch alone."""
        examples = [self.usable[index] for index in chosen]
        latents = [self.latents[example.identity] for example in examples]
        return (
            Latents(torch.stack([x.mean for x in latents]), torch.stack([x.std for x in latents])),
            torch.stack(
                [self.embeddings[each.orders[epoch % len(each.orders)]] for each in examples]
            ),
        )


def prepare(
    run: TrainingRun,
    base: BaseModel,
    *,
    should_stop: Callable[[], StopReason | None] = lambda: None,
) -> Dataset:
    """Vet and encode a run's pictures.

    Args:
        run: What is asked for.
        base: The base model; VAE and text encoder are used.
        should_stop: Asked before each picture.

    Raises:
        ImageDownloadFailed: Too few pictures are usable because too few could be fetched.
        LowQualityData: Too few pictures are usable; the message names each that was left out, and
            why.
        Stopped: `should_stop` gave a reason.
    """
    entries: list[PictureReport] = []
    usable: list[Example] = []
    latents: dict[str, Latents] = {}
    seen: list[tuple[str, Looks]] = []
    for picture in run.pictures:
        if reason := should_stop():
            raise Stopped(reason)
        entry, example = _take_in(picture, run, base, latents, seen)
        entries.append(entry)
        if example:
            usable.append(example)
        else:
            log.warning(
                "picture_left_out", extra={"picture": _name(entry), "reasons": entry.reasons}
            )
    _refuse_too_few(run, entries, len(usable))
    warnings = []
    if len(usable) < FEW_PICTURES:
        warnings.append(
            f"Only {counted(len(usable), 'picture')} can be trained on; a style holds better with "
            f"{FEW_PICTURES} to 30."
        )
    if all(looks.is_grey for _, looks in seen):
        warnings.append(
            "All pictures are without colour; such a style comes out tinted unless the captions "
            "say so (black and white, pencil drawing)."
        )
    captions = dict.fromkeys(["", *(caption for example in usable for caption in example.orders)])
    embeddings = {caption: base.encode_prompts([caption])[0] for caption in captions}
    return Dataset(tuple(entries), tuple(usable), latents, embeddings, tuple(warnings))


def _take_in(
    picture: Picture,
    run: TrainingRun,
    base: BaseModel,
    latents: dict[str, Latents],
    seen: list[tuple[str, Looks]],
) -> tuple[PictureReport, Example | None]:
    """Vet and encode one picture; its latents go into `latents`, its looks into `seen`."""
    if picture.path is None:
        return _left_out(picture, picture.problem or "could not be fetched"), None
    try:
        content = Path(picture.path).read_bytes()
        vetted = vet(content, max_pixels=run.max_image_pixels)
        looks = look_at(vetted.image, resolution=run.parameters.resolution)
        cautions = looks.warnings + _compare(vetted, looks, seen)
        caption, cut = _caption(picture, run, base)
        frame = frame_for(*vetted.image.size, run.parameters.resolution)
        identity = hashlib.sha256(content).hexdigest()
        latents[identity] = _encode(vetted, frame, base)
    except OSError:
        return _left_out(picture, "its file could not be read"), None
    except UnusablePicture as unusable:
        return _left_out(picture, str(unusable), unusable.size), None
    seen.append((_shown_name(picture.source), looks))
    cautions = vetted.warnings + _enlarged(vetted, frame) + cautions + cut
    entry = PictureReport(
        picture.source,
        "warned" if cautions else "used",
        cautions + vetted.notes + _cropped(vetted, frame),
        *vetted.image.size,
        caption,
        vetted.decoded,
        str(frame),
    )
    return entry, Example(picture.source, identity, caption, _orders(caption, identity, run))


def _caption(picture: Picture, run: TrainingRun, base: BaseModel) -> tuple[str, tuple[str, ...]]:
    """What a picture is trained with, and a warning where that is not the whole of its caption."""
    prompt = with_trigger(run.trigger_word, picture.caption)
    caption = base.fit_prompt(prompt)
    if caption == prompt:
        return caption, ()
    end = " ".join(caption.rpartition(",")[2].split()[-5:])
    return caption, (f"has a longer caption than can be read; it was cut after “{end[-60:]}”",)


def _orders(caption: str, identity: str, run: TrainingRun) -> tuple[str, ...]:
    if not run.parameters.shuffle_tags:
        return (caption,)
    # By the picture: those of one caption do not all have the same order at a time.
    return orders(caption, first=run.trigger_word, seed=f"{run.parameters.seed}/{identity}")


def _left_out(picture: Picture, reason: str, size: tuple[int, int] | None = None) -> PictureReport:
    width, height = size or (None, None)
    return PictureReport(picture.source, "left_out", (reason,), width, height, picture.caption)


def _compare(vetted: Vetted, looks: Looks, seen: list[tuple[str, Looks]]) -> tuple[str, ...]:
    """Compare a picture with those before it.

    Returns:
        A warning where it looks like one of them.

    Raises:
        UnusablePicture: It is one of them: trained on twice, it would count twice.
    """
    for name, other in seen:
        if other.pixels == looks.pixels:
            raise UnusablePicture(f"is the same picture as {name}", vetted.image.size)
    near = [name for name, other in seen if looks.shows_the_same(other)]
    return (f"looks like another version of {near[0]}, which then counts twice",) if near else ()


def _enlarged(vetted: Vetted, frame: Frame) -> tuple[str, ...]:
    small = frame.enlarges(*vetted.image.size)
    return (f"is smaller than {frame} pixels; enlarging it made it soft",) if small else ()


def _cropped(vetted: Vetted, frame: Frame) -> tuple[str, ...]:
    lost = 1 - frame.keeps(*vetted.image.size)
    return (f"lost {lost:.0%} at its edges, to fit {frame} pixels",) if lost > MUCH_LOST else ()


def _encode(vetted: Vetted, frame: Frame, base: BaseModel) -> Latents:
    """Scale, crop around the centre, and encode.

    Raises:
        UnusablePicture: The VAE makes no finite numbers of it.
    """
    fitted = ImageOps.fit(vetted.image, (frame.width, frame.height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1).float() / 127.5 - 1.0
    mean, std = base.encode_images(pixels[None])
    if not bool((torch.isfinite(mean) & torch.isfinite(std)).all()):
        raise UnusablePicture(
            "the image encoder cannot represent it (it gave values that are no numbers)",
            vetted.image.size,
        )
    return Latents(mean[0], std[0])


def _refuse_too_few(run: TrainingRun, entries: list[PictureReport], usable: int) -> None:
    if usable >= run.min_images:
        return
    fetched = sum(picture.path is not None for picture in run.pictures)
    left_out = grouped(
        [
            (_name(entry), ", ".join(entry.reasons))
            for entry in entries
            if entry.status == "left_out"
        ],
        "picture",
    )
    message = (
        f"{usable} of {counted(len(entries), 'picture')} can be used, and at least "
        f"{run.min_images} {'is' if run.min_images == 1 else 'are'} needed."
        + (f" Left out: {left_out}." if left_out else " Add more pictures.")
    )
    if fetched < run.min_images <= len(run.pictures):
        raise ImageDownloadFailed(message)
    raise LowQualityData(message)


def _name(entry: PictureReport) -> str:
    return _shown_name(entry.source)


def _shown_name(source: str) -> str:
    """The last part of an address, without a query, which may carry a signature."""
    return source.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]
