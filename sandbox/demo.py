"""The main job, whole, on this machine: `scripts/demo`.

A private RabbitMQ node, an S3 server and a backend are started on free ports; the worker is started
as ops would, by its environment alone; one training message is published as the backend publishes
it; what happens is shown, and checked.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import hmac
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from sandbox.backend import Backend
from sandbox.base_model_choice import choose_base_model
from sandbox.demo_job import MEDIA, MODELS, QUEUE, STATE, DemoFailed, DemoJob
from sandbox.demo_screen import Screen
from sandbox.rabbitmq_node import RabbitMqNode
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from sandbox.worker_process import ROOT, WorkerProcess


def settings_of_the_worker(
    *, rabbit: RabbitMqNode, s3: S3Server, backend: Backend, token: str, folder: Path
) -> dict[str, str]:
    """All that the worker is told, but for the base model."""
    return {
        "RABBITMQ_HOST": rabbit.host,
        "RABBITMQ_PORT": str(rabbit.port),
        "TRAINING_QUEUE": QUEUE,
        "AWS_ENDPOINT_URL_S3": s3.endpoint,
        "AWS_S3_REGION_NAME": REGION,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
        "AWS_STORAGE_BUCKET_NAME": MEDIA,
        "MODEL_BUCKET_NAME": MODELS,
        "STATE_BUCKET_NAME": STATE,
        "BACKEND_API_URL": backend.url,
        "INTERNAL_API_TOKEN": token,
        "PROGRESS_INTERVAL_SECONDS": "1",
        "CHECKPOINT_INTERVAL": "10",
        "MAX_ATTEMPTS": "1",  # whoever looks on wants to know at once
        "HTTP_PORT": "0",
        "WORK_DIR": str(folder / "work"),
    }


def play(screen: Screen, output: Path) -> dict[str, str]:
    """Start the parts, run the job, end the parts whatever happens.

    Returns:
        The last lines: name -> text.
    """
    token = secrets.token_hex(24)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="training-demo-")))
        choice = choose_base_model(folder / "base-model")
        for words in choice.words:
            screen.say(words)
        s3 = stack.enter_context(S3Server())
        for bucket in (MEDIA, MODELS, STATE):
            s3.create_bucket(bucket)
        rabbit = stack.enter_context(RabbitMqNode(folder / "rabbitmq"))
        backend = stack.enter_context(Backend(token=token, secrets=[_signing_secret(token)]))
        screen.say(f"RabbitMQ on port {rabbit.port}, S3 at {s3.endpoint}, backend at {backend.url}")
        settings = settings_of_the_worker(
            rabbit=rabbit, s3=s3, backend=backend, token=token, folder=folder
        )
        log = output / "worker.log"
        worker = stack.enter_context(
            WorkerProcess(settings | choice.settings, folder=folder, log=log)
        )
        screen.say(f"worker started: python main.py worker (its log: {log})")
        job = DemoJob(
            screen,
            rabbit=rabbit,
            s3=s3,
            backend=backend,
            worker=worker,
            output=output,
            minutes=choice.minutes,
        )
        try:
            return job.run()
        except KeyboardInterrupt:
            # The parts end in their order; a second Ctrl-C must not leave any of them behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            screen.finish_bar()
            screen.say("stopping: first the worker, then the servers")
            raise


def _signing_secret(token: str) -> str:
    """What both sides derive where no WEBHOOK_SIGNING_SECRET is set: docs/protocol.md, 3."""
    digest = hmac.new(
        token.encode(), b"training-server webhook signing v1", hashlib.sha256
    ).digest()
    return "whsec_" + base64.b64encode(digest).decode()


def main() -> int:
    """The command; its exit code is 0 only where everything happened as it should."""
    parser = argparse.ArgumentParser(description="The main job, whole, on this machine.")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", metavar="FOLDER")
    output: Path = parser.parse_args().output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    # SIGTERM cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Screen() as screen:
        try:
            screen.conclude(play(screen, output))
            return 0
        except KeyboardInterrupt:
            screen.console.print("Stopped; everything that was started has ended.")
            return 130
        except (DemoFailed, RuntimeError, OSError) as error:
            screen.fail(str(error), output / "worker.log")
            return 1


if __name__ == "__main__":
    sys.exit(main())
