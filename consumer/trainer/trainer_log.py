"""Copies the trainer process's standard error to this process's log.

C libraries and crashing interpreters write there too, in any form. This process reads the lines, so
the last ones of a crash are not lost.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import IO

from utils.logger import Redactor, get_logger

log = get_logger(__name__)

_LONGEST_LINE = 1 << 16


def follow(stream: IO[bytes], redactor: Redactor) -> threading.Thread:
    """Copy lines in a separate thread until the stream ends.

    Args:
        stream: The process's standard error; its log lines are JSON. Closed at its end.
        redactor: Masks the secrets; the trainer process knows at most their shape.

    Returns:
        The thread, which ends with the stream.
    """
    thread = threading.Thread(
        target=_pass_on, args=(stream, redactor), name="trainer-log", daemon=True
    )
    thread.start()
    return thread


def _pass_on(stream: IO[bytes], redactor: Redactor) -> None:
    with stream:
        while content := stream.readline(_LONGEST_LINE):
            line = content.decode(errors="replace").rstrip()
            if _is_of_the_log(line):
                sys.stderr.write(redactor.clean(line) + "\n")
            elif line:
                log.warning("native_stderr", text=line)


def _is_of_the_log(line: str) -> bool:
    try:
        values = json.loads(line)
    except ValueError:
        return False
    return isinstance(values, dict) and "event" in values
