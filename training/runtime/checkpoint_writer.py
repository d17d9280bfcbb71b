"""Checkpoints are written beside training: a step never waits for the disk."""

from __future__ import annotations

import contextvars
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from training.runtime import checkpoint
from training.runtime.checkpoint import Checkpoint
from utils.events import CheckpointSaved

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes one checkpoint at a time, in a thread of its own; a context manager.

    Leaving it waits for the checkpoint that is being written.

    Args:
        emit: Told of each checkpoint once it is whole on the disk, from that thread.
    """

    def __init__(self, emit: Callable[[CheckpointSaved], None]) -> None:
        self._emit = emit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def write(
        self, folder: Path, captured: Checkpoint, ready: Callable[[], None] = lambda: None
    ) -> None:
        """Have a checkpoint written once the one before it is.

        Args:
            folder: Where.
            captured: What; nothing may change it any more.
            ready: Returns once the tensors' contents are there.

        Raises:
            OSError: The one before it could not be written: the disk is full or broken.
        """
        self.settle()
        # In this context, so that its log lines are the job's.
        within = contextvars.copy_context().run
        self._writing = self._thread.submit(within, self._write, folder, captured, ready)

    def settle(self) -> None:
        """Wait until what was given to `write` is on the disk, and told.

        Raises:
            OSError: It could not be written.
        """
        if writing := self._writing:
            self._writing = None
            writing.result()

    def _write(self, folder: Path, captured: Checkpoint, ready: Callable[[], None]) -> None:
        began = time.monotonic()
        ready()
        checkpoint.save(folder, captured)
        seconds, state = time.monotonic() - began, captured.state
        log.info("checkpoint_saved", extra={"checkpoint": folder.name, "seconds": seconds})
        self._emit(
            CheckpointSaved(
                state.task_id, folder.name, state.epoch, state.step, str(folder), seconds
            )
        )
