"""Checkpoints on the disk: folders of safetensors and JSON, with the hash of every file.

A folder is written completely or not at all, and holds no pickle. Nothing here deletes a
checkpoint: its reader deletes it after the upload, and the last two stay until a newer one has
replaced them.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
from torch import Tensor

from utils import manifest
from utils.errors import CheckpointUnusable
from utils.events import CheckpointSaved

log = logging.getLogger(__name__)

STATE = "state.json"
_SUFFIX = ".safetensors"

Tensors = dict[str, Tensor]


def write(
    folder: Path,
    state: Mapping[str, Any],
    tensors: Mapping[str, Tensors],
    facts: Mapping[str, Any],
) -> None:
    """Write a checkpoint. Afterwards `folder` is complete, or nothing has changed.

    Args:
        folder: Receives the files. An older checkpoint there is replaced.
        state: JSON values.
        tensors: One safetensors file per name.
        facts: Entries of the manifest, `format` among them.

    Raises:
        OSError: The disk is full or broken.
    """
    files = {f"{name}{_SUFFIX}": safetensors.torch.save(_on_cpu(t)) for name, t in tensors.items()}
    files[STATE] = json.dumps(state, indent=2).encode()
    manifest.write_folder(folder, files, dict(facts))


@contextlib.contextmanager
def reading(
    folder: Path, version: int
) -> Iterator[tuple[dict[str, Any], dict[str, Tensors], dict[str, Any]]]:
    """The state, the tensors (on the CPU) and the manifest of a checkpoint, every byte verified.

    A `ValueError` inside the block means that another version has written the state.

    Args:
        folder: The checkpoint.
        version: The `format` that the caller reads.

    Raises:
        CheckpointUnusable: It is incomplete, altered, or of another version of this software.
    """
    facts = manifest.verify(folder)
    if facts.get("format") != version:
        raise CheckpointUnusable(
            f"The checkpoint {folder.name} has format {facts.get('format')!r}; this version reads "
            f"{version}."
        )
    names = [name for name in facts["files"] if name.endswith(_SUFFIX)]
    try:
        tensors = {
            name.removesuffix(_SUFFIX): safetensors.torch.load_file(folder / name) for name in names
        }
        yield json.loads((folder / STATE).read_bytes()), tensors, facts
    except (ValueError, TypeError, OSError, safetensors.SafetensorError) as error:
        raise CheckpointUnusable(
            f"The checkpoint {folder.name} was written by another version of this software and "
            "cannot be read."
        ) from error


class CheckpointWriter:
    """Writes one checkpoint at a time in its own thread, so that no step waits for the disk.

    A context manager. Leaving it waits for the checkpoint that is being written.

    Args:
        emit: Receives each checkpoint from that thread, after it is complete on the disk.
    """

    def __init__(self, emit: Callable[[CheckpointSaved], None]) -> None:
        self._emit = emit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def write(self, saved: CheckpointSaved, save: Callable[[], None]) -> None:
        """Write a checkpoint after the previous one.

        Args:
            saved: The event to emit. Its seconds are measured here.
            save: Writes the checkpoint. Nothing may change its tensors any more.

        Raises:
            OSError: The previous checkpoint could not be written: the disk is full or broken.
        """
        self.settle()
        # In this context, so that the log lines carry the job's fields.
        within = contextvars.copy_context().run
        self._writing = self._thread.submit(within, self._write, saved, save)

    def settle(self) -> None:
        """Wait until the last checkpoint is on the disk and its event is emitted.

        Raises:
            OSError: It could not be written.
        """
        if writing := self._writing:
            self._writing = None
            writing.result()

    def _write(self, saved: CheckpointSaved, save: Callable[[], None]) -> None:
        began = time.monotonic()
        save()
        seconds = time.monotonic() - began
        log.info("checkpoint_saved", extra={"checkpoint": saved.name, "seconds": seconds})
        self._emit(dataclasses.replace(saved, seconds=seconds))


def _on_cpu(tensors: Tensors) -> Tensors:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
