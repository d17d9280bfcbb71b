"""The data of a training: vetted images as latents and embeddings, and the fate of each image."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from images.checks import Looks
from utils.names import shown_name


@dataclasses.dataclass(frozen=True, slots=True)
class ImageReport:
    """The fate of one image of the job.

    Attributes:
        source: Its address in the message, printable.
        status: `used`, `warned` (used, but the artist should know something), or `left_out`.
        reasons: The reasons, and the changes to the image, in words for an artist.
        width, height: In pixels after rotation; None where they are not known.
        caption: The caption it is trained with.
        decoded: Format, size as stored and colour mode of the file; None if it is no image.
        trained_as: Size after scaling and cropping, such as "640 x 384"; None if it is left out.
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
    """One usable image.

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
    """Everything that the loop reads, on the device: thirty images take about 8 MB.

    Attributes:
        entries: One an image asked for, in order.
        usable: The images to train on, in order.
        latents: By the image's identity, never by position: a shuffle cannot pair an image with
            another's caption.
        embeddings: [77, d] by caption, in each of its orders, and by prompt of the samples; the
            empty prompt's is always there.
        warnings: Sentences for the report.
        held_out: Images that the probe looks at and the loop never sees, if there are any.
        thumbnails: JPEG files of the images that could be decoded, by the path of their files.
        looks: The looks of each usable image, by its identity.
    """

    entries: tuple[ImageReport, ...]
    usable: tuple[Example, ...]
    latents: dict[str, Latents]
    embeddings: dict[str, Tensor]
    warnings: tuple[str, ...] = ()
    held_out: Dataset | None = None
    thumbnails: dict[str, bytes] = dataclasses.field(default_factory=dict)
    looks: dict[str, Looks] = dataclasses.field(default_factory=dict)

    @property
    def identities(self) -> tuple[str, ...]:
        """One a usable image: its bytes and its caption, hashed. Resuming compares them."""
        return tuple(
            f"{example.identity}-{hashlib.sha256(example.caption.encode()).hexdigest()[:16]}"
            for example in self.usable
        )

    @property
    def names(self) -> dict[str, str]:
        """A readable name for each of `identities`."""
        return {
            identity: shown_name(example.source)
            for identity, example in zip(self.identities, self.usable, strict=True)
        }

    def in_order_of(self, identities: Sequence[str]) -> Dataset:
        """The same images in another order, if they are the same; else unchanged.

        Files that were renamed come in another order, and a resumed run keeps the one it began
        with.
        """
        ours = self.identities
        if ours == tuple(identities) or sorted(ours) != sorted(identities):
            return self
        examples = dict(zip(ours, self.usable, strict=True))
        return dataclasses.replace(self, usable=tuple(examples[each] for each in identities))

    @functools.cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of each usable image's latent: 4, h/8, w/8. Those of one shape can share a batch."""
        return tuple(tuple(self.latents[each.identity].mean.shape) for each in self.usable)

    def batch(self, chosen: Sequence[int], epoch: int = 0) -> tuple[Latents, Tensor]:
        """Latent distributions, [n, 4, h/8, w/8], and embeddings, [n, 77, d].

        They are of n images of one shape. The order of their tags depends only on the
        epoch.
        """
        examples = [self.usable[index] for index in chosen]
        latents = [self.latents[example.identity] for example in examples]
        return (
            Latents(torch.stack([x.mean for x in latents]), torch.stack([x.std for x in latents])),
            torch.stack(
                [self.embeddings[each.orders[epoch % len(each.orders)]] for each in examples]
            ),
        )
