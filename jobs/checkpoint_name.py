"""The names of checkpoints, and their order.

Needs no torch, so that the front desk can use it, too.
"""

from __future__ import annotations

import re

NOT_OURS = (-1, -1, -1)
"""The order of a name that is not a checkpoint's: before every checkpoint."""

_NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?(?:-retake-(\d+))?")


def folder_name(epoch: int, step: int, *, inside_epoch: bool, changes: int = 0) -> str:
    """A checkpoint's name: `epoch-0010`, or `epoch-0012-step-0123` for a stop inside an epoch.

    After the n-th restart of training, which may have gone back, `-retake-n` follows. So no name is
    used twice, neither on the disk nor on S3.
    """
    name = f"epoch-{epoch:04d}-step-{step:04d}" if inside_epoch else f"epoch-{epoch:04d}"
    return f"{name}-retake-{changes}" if changes else name


def order(name: str) -> tuple[int, int, int]:
    """A key that puts a job's checkpoints in the order in which they were made.

    A later retake may have gone back; later checkpoints of an earlier retake are then void.
    """
    match = _NAME.fullmatch(name)
    if not match:
        return NOT_OURS
    epoch, step, retake = (int(part or 0) for part in match.groups())
    return (retake, epoch, step)
