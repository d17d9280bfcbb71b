"""The whole main job on this machine: `scripts/demo`.

The demo starts a private RabbitMQ node, an S3 server and a backend on free ports. It starts the
worker as an operator would, configured only by its environment, and publishes one training message
as the backend does. It shows and checks every step.
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
    """Run the demo. The exit code is 0 only if every check succeeded."""
    parser = argparse.ArgumentParser(description="Run the whole main job on this machine.")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    parser.add_argument("--kind", choices=("style", "llm"), default="style")
    parser.add_argument(
        "--api",
        action="store_true",
        help="Order two styles over the API, with OpenAI's client; needs PostgreSQL.",
    )
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
            # Imported here: the import of torch takes seconds, in which Ctrl-C must work.
            if given.api:
                from sandbox import demo_api  # pylint: disable=import-outside-toplevel

                screen.conclude(demo_api.play(screen, output))
                return 0
            # pylint: disable-next=import-outside-toplevel
            from sandbox.demo_parts import play

            screen.conclude(play(screen, output, given.kind))
            return 0
        except (KeyboardInterrupt, Exception) as error:  # pylint: disable=broad-exception-caught
            if interrupted.is_set():  # a library that is being imported turns it into another error
                screen.console.print("Stopped. All started programs have ended.")
                return 130
            if not isinstance(error, (DemoFailed, RuntimeError, OSError)):
                raise
            screen.fail(str(error), output / "worker.log")
            return 1


if __name__ == "__main__":
    sys.exit(main())
