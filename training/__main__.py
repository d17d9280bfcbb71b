"""The trainer process: `python -m training --runs-fd N --events-fd M OPTIONS`.

Owns the GPU and lives across jobs, so that the base model stays loaded. Runs and stops come in as
lines of JSON, facts go out the same way (see `utils.events`). It ignores the terminal's signals: it
ends when its pipe does, at once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence

from jobs.kinds import TrainerOptions
from training.runtime.followers import end_with_parent
from training.runtime.inbox import Inbox
from utils.events import from_dict


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve runs until the pipe ends.

    Args:
        arguments: Command line without the program's name.

    Returns:
        Never in practice: the inbox ends the process when the desk closes the pipe.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--runs-fd", type=int, required=True, help="runs and stops are read here")
    parser.add_argument("--events-fd", type=int, required=True, help="facts are written here")
    parser.add_argument("options", help="TrainerOptions as one JSON object")
    parsed = parser.parse_args(arguments)
    options = from_dict(TrainerOptions, json.loads(parsed.options))
    if options.rank:
        end_with_parent()
    # Before the slow imports below: a desk that dies meanwhile must not leave an orphan.
    inbox = Inbox(os.fdopen(parsed.runs_fd, "rb", buffering=0))
    inbox.start()

    # The half a million objects of the libraries live as long as the process. Checking them for
    # garbage would take a fifth of the start, and a third of a second at each collection.
    gc.disable()
    from training.runtime.child import Child  # pylint: disable=import-outside-toplevel
    from utils import logger  # pylint: disable=import-outside-toplevel

    logger.configure(level=options.log_level, log_format=options.log_format, secrets=())
    events = os.fdopen(parsed.events_fd, "wb", buffering=0)
    child = Child(options, inbox, events, bound=logger.bound)
    gc.freeze()
    gc.enable()
    child.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
