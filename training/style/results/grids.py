"""Sample images of checkpoints, small and few enough to travel with a checkpoint.

They are kept as JPEG files, bytes in tensors, by `base/{prompt}` for the base model and
`{epoch}/{prompt}` for a checkpoint.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

LARGEST = 256
"""Side in pixels."""
MOST_EPOCHS = 12
WITHOUT_LORA = "base"


def pack(image: Image.Image) -> Tensor:
    """An image as the bytes of a small JPEG file."""
    small = image.copy()
    small.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack(packed: Tensor) -> bytes:
    """The JPEG file."""
    return packed.numpy().tobytes()


def with_row(
    samples: Mapping[str, Tensor], row: str, images: Sequence[Image.Image]
) -> dict[str, Tensor]:
    """The samples with a further row, less every second epoch where they have become too many.

    Args:
        samples: Those that are there.
        row: An epoch, or `WITHOUT_LORA`.
        images: One a prompt.
    """
    more = dict(samples) | {f"{row}/{n}": pack(image) for n, image in enumerate(images)}
    shown = epochs(more)
    if len(shown) <= MOST_EPOCHS:
        return more
    dropped = {str(epoch) for epoch in shown[-2::-2]}
    return {key: value for key, value in more.items() if key.partition("/")[0] not in dropped}


def epochs(samples: Mapping[str, Tensor]) -> list[int]:
    """The epochs of which there are samples, in order."""
    rows = {key.partition("/")[0] for key in samples}
    return sorted(int(row) for row in rows if row.isdigit())


def row_of(samples: Mapping[str, Tensor], row: str) -> list[bytes]:
    """A row's JPEG files, one a prompt."""
    names = [f"{row}/{n}" for n in range(len(samples))]
    return [unpack(samples[name]) for name in names if name in samples]
