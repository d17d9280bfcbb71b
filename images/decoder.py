"""The trainer's side of the decoder process.

It sends paths of images, and receives pixels or the reason why an image cannot be used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from images.checks import MOTIF
from images.decoding import Ready, Refused, Request, Taken
from utils.errors import Stopped, StopReason, WorkerCrashed
from utils.events import decode, encode

log = logging.getLogger(__name__)

SECONDS = 8
"""Of computing time that one image may take: the largest that are allowed take two or three."""
MEMORY_BYTES = 1024**3
"""By which the decoder may grow."""
PATIENCE_SECONDS = 60.0
"""On the clock for one image, on a machine that is busy, or a disk that hangs."""
TOO_SLOW = (
    "takes longer than {seconds} seconds to decode, as files do that were made to; export it as an "
    "ordinary JPEG or PNG"
)
CRASHED = "makes the decoder crash, so it is damaged or harmful; export it as PNG"

_ROOT = Path(__file__).resolve().parent.parent
_POLL_SECONDS = 0.2
_MOST_NATIVE_LINES = 5
"""Of what the decoders print about one image; a file can make them print for ever."""
_LONGEST_NATIVE_LINE = 300
_LONGEST_LINE = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The answer for one image.

    Attributes:
        fact: Whether the image can be used, and its properties.
        pixels: RGB, of size `fact.frame`; empty if it cannot be used.
        motif: Grey, `MOTIF` pixels square; empty if it cannot be used.
        thumbnail: A JPEG; None if nothing could be decoded.
    """

    fact: Taken | Refused
    pixels: bytes = b""
    motif: bytes = b""
    thumbnail: bytes | None = None


class Decoder:
    """Decodes images in a separate process, which starts at once and is replaced if it dies.

    Args:
        seconds: Of computing time for each image.
        memory: Bytes by which the process may grow.
        patience: Seconds on the clock for each image.
    """

    def __init__(
        self,
        *,
        seconds: int = SECONDS,
        memory: int = MEMORY_BYTES,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self._seconds, self._memory, self._patience = seconds, memory, patience
        self._process: _Process | None = self._started()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process at once."""
        if self._process:
            self._process.kill()
            self._process = None

    def answers(
        self,
        requests: Sequence[Request],
        *,
        should_stop: Callable[[], StopReason | None] = lambda: None,
    ) -> Iterator[Answer]:
        """Decode images in order, the next one while the caller works on the present one.

        Args:
            requests: The images.
            should_stop: Called while an image is decoded; returns a reason to stop, or None.

        Raises:
            Stopped: `should_stop` gave a reason.
            WorkerCrashed: The process cannot be started.
        """
        for index in range(len(requests)):
            if index == 0:
                self._ask(requests[0])
            answer = self._answer(should_stop)
            if index + 1 < len(requests):
                self._ask(requests[index + 1])
            yield answer

    def _ask(self, request: Request) -> None:
        if self._process and self._process.ask(request):
            return
        self.close()
        self._process = self._started()
        self._process.ask(request)

    def _answer(self, should_stop: Callable[[], StopReason | None]) -> Answer:
        process = self._process
        assert process is not None
        try:
            answer = process.answer(should_stop, self._patience)
            process.log_native_lines()
            return answer
        except _Died as death:
            process.log_native_lines()
            self.close()
            if not death.was_ready:
                raise WorkerCrashed(
                    f"The image decoder could not be started ({death}); its last log lines "
                    "give the reason."
                ) from death
            log.warning("decoder_died", extra={"reason": str(death)})
            reason = TOO_SLOW.format(seconds=self._seconds) if death.too_slow else CRASHED
            return Answer(Refused(reason))
        except Stopped:
            self.close()
            raise

    def _started(self) -> _Process:
        return _Process([str(self._seconds), str(self._memory)])


class _Died(Exception):
    """The process is gone, or has to go."""

    def __init__(self, reason: str, *, too_slow: bool, was_ready: bool) -> None:
        super().__init__(reason)
        self.too_slow, self.was_ready = too_slow, was_ready


class _Process:
    """One decoder process and its three pipes."""

    def __init__(self, arguments: list[str]) -> None:
        self._errors, errors = os.pipe()
        for end in (self._errors, errors):
            os.set_blocking(end, False)  # the kernel drops what does not fit into the pipe
        try:
            self._process = subprocess.Popen(  # pylint: disable=consider-using-with
                [sys.executable, "-m", "images.decoding", *arguments],
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
            )
        finally:
            os.close(errors)
        self._ready = False
        self._read = bytearray()

    def ask(self, request: Request) -> bool:
        """Write a request.

        Returns:
            False if the process has died, which is not the fault of this image.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(encode(request))
        except BrokenPipeError:
            log.warning("decoder_gone")
            return False
        return True

    def answer(self, should_stop: Callable[[], StopReason | None], patience: float) -> Answer:
        """Read the answer to the request before.

        Raises:
            Stopped: `should_stop` gave a reason.
            _Died: The process died, or did not answer in time.
        """
        deadline = time.monotonic() + patience

        def more() -> None:
            """Wait for some bytes."""
            self._wait(deadline, should_stop)

        if not self._ready:
            decode(self._line(more), (Ready,))
            self._ready = True
        fact: Taken | Refused = decode(self._line(more), (Taken, Refused))
        pixels = motif = b""
        if isinstance(fact, Taken):
            width, height = fact.frame
            pixels = self._exactly(3 * width * height, more)
            motif = self._exactly(MOTIF * MOTIF, more)
        thumbnail = self._exactly(fact.thumbnail, more) if fact.thumbnail else None
        return Answer(fact, pixels, motif, thumbnail)

    def log_native_lines(self) -> None:
        """Log the first lines of the process's standard error since the last call.

        C libraries report there how a file is damaged.
        """
        printed = bytearray()
        with contextlib.suppress(BlockingIOError):
            while content := os.read(self._errors, 1 << 16):
                printed += content
        lines = [line for line in printed.decode(errors="replace").splitlines() if line.strip()]
        for line in lines[:_MOST_NATIVE_LINES]:
            log.warning("native_stderr", extra={"text": line[:_LONGEST_NATIVE_LINE]})
        if (omitted := len(lines) - _MOST_NATIVE_LINES) > 0:
            log.warning("native_stderr", extra={"text": f"{omitted} more lines"})

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        os.close(self._errors)

    def _line(self, more: Callable[[], None]) -> bytes:
        while (end := self._read.find(b"\n")) < 0:
            if len(self._read) > _LONGEST_LINE:
                raise self._died("it answered nonsense")
            more()
        return self._taken(end + 1)

    def _exactly(self, size: int, more: Callable[[], None]) -> bytes:
        while len(self._read) < size:
            more()
        return self._taken(size)

    def _taken(self, size: int) -> bytes:
        taken = bytes(self._read[:size])
        del self._read[:size]
        return taken

    def _wait(self, deadline: float, should_stop: Callable[[], StopReason | None]) -> None:
        """Read what comes next.

        Raises:
            Stopped, _Died: See `answer`.
        """
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        while not select.select([pipe], [], [], _POLL_SECONDS)[0]:
            if reason := should_stop():
                raise Stopped(reason)
            if time.monotonic() > deadline:
                raise self._died("it did not answer in time", too_slow=True)
        if not (content := os.read(pipe, 1 << 20)):
            raise self._died("")
        self._read += content

    def _died(self, reason: str, *, too_slow: bool = False) -> _Died:
        """Why the process is of no use any more; it has died, or has to."""
        if reason:
            self._process.kill()
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            too_slow = True
        named = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return _Died(reason or named, too_slow=too_slow, was_ready=self._ready)
