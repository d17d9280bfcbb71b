"""What the trainer process writes on its standard error becomes lines of this process's log.

Not everything there is the trainer's own log: C libraries and dying interpreters write as they
please. It is read here, so that a process's last words are not lost with it.
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
    """Pass on, in a thread of its own, what comes until the stream's end.

    Args:
        stream: The process's standard error; its log lines are JSON. Closed at its end.
        redactor: Knows the secrets, which that process knows by their shape at most.

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
