"""What checkpoints are called, and which of them is the newest.

Needs no torch, so that whoever moves checkpoints about can ask.
"""

from __future__ import annotations

import re

NOT_OURS = (-1, -1, -1)
"""The order of a name that is no checkpoint's: before every checkpoint."""

_NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?(?:-retake-(\d+))?")


def folder_name(epoch: int, step: int, *, inside_epoch: bool, changes: int = 0) -> str:
    """`epoch-0010`, or `epoch-0012-step-0123` where a stop fell inside an epoch.

    After the n-th change of the job's course, which may have led back, `-retake-n` follows: so no
    name ever means two things, neither on the disk nor on S3.
    """
    name = f"epoch-{epoch:04d}-step-{step:04d}" if inside_epoch else f"epoch-{epoch:04d}"
    return f"{name}-retake-{changes}" if changes else name


def order(name: str) -> tuple[int, int, int]:
    """A key that puts a job's checkpoints in the order in which they were made.

    A later retake may have gone back: what an earlier one left behind further on is void.
    """
    match = _NAME.fullmatch(name)
    if not match:
        return NOT_OURS
    epoch, step, retake = (int(part or 0) for part in match.groups())
    return (retake, epoch, step)
