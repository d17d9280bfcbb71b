"""The main job, whole, on this machine: `scripts/demo`.

A private RabbitMQ node, an S3 server and a backend are started on free ports; the worker is started
as ops would, by its environment alone; one training message is published as the backend publishes
it; what happens is shown, and checked.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import threading
from pathlib import Path

from sandbox.demo_screen import DemoFailed, Screen

OUTPUT = Path(__file__).resolve().parent.parent / "demo-output"


def main() -> int:
    """The command; its exit code is 0 only where everything happened as it should."""
    parser = argparse.ArgumentParser(description="The main job, whole, on this machine.")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    parser.add_argument("--kind", choices=("style", "llm"), default="style")
    given = parser.parse_args()
    output: Path = given.output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with Screen() as screen:
        try:
            # Imported here: torch takes seconds, in which a Ctrl-C is as welcome as later.
            # pylint: disable-next=import-outside-toplevel
            from sandbox.demo_parts import play

            screen.conclude(play(screen, output, given.kind))
            return 0
        except (KeyboardInterrupt, Exception) as error:  # pylint: disable=broad-exception-caught
            if interrupted.is_set():  # a library that is being imported makes another error of it
                screen.console.print("Stopped; everything that was started has ended.")
                return 130
            if not isinstance(error, (DemoFailed, RuntimeError, OSError)):
                raise
            screen.fail(str(error), output / "worker.log")
            return 1


if __name__ == "__main__":
    sys.exit(main())
