"""The demo's parts: starts them in order, and ends them in any case."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import secrets
import signal
import tempfile
from pathlib import Path

from local.rabbitmq_node import RabbitMqNode
from sandbox import demo_language
from sandbox.backend import Backend
from sandbox.base_model_choice import choose_base_model
from sandbox.demo_job import MEDIA, MODELS, QUEUE, STATE, DemoJob
from sandbox.demo_screen import Screen
from sandbox.s3_server import ACCESS_KEY_ID, REGION, SECRET_ACCESS_KEY, S3Server
from sandbox.worker_process import WorkerProcess


def settings_of_the_worker(
    *, rabbit: RabbitMqNode, s3: S3Server, backend_url: str, token: str, folder: Path
) -> dict[str, str]:
    """All settings of the worker, except those of the base model."""
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
        "BACKEND_API_URL": backend_url,
        "INTERNAL_API_TOKEN": token,
        "PROGRESS_INTERVAL_SECONDS": "1",
        "CHECKPOINT_INTERVAL": "10",
        "MAX_ATTEMPTS": "1",  # the user wants a report soon
        "HTTP_PORT": "0",
        "WORK_DIR": str(folder / "work"),
    }


# pylint: disable-next=too-many-locals  # one for each part
def play(screen: Screen, output: Path, kind: str = "style") -> dict[str, str]:
    """Start the parts, run the job, and end the parts in any case.

    Returns:
        The last lines: name -> text.
    """
    token = secrets.token_hex(24)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="training-demo-")))
        if kind == "llm":
            choice = demo_language.choice(folder / "tiny-llama")
        else:
            choice = choose_base_model(folder / "stand-in-for-sd15")
        for words in choice.words:
            screen.say(words)
        s3 = stack.enter_context(S3Server())
        for bucket in (MEDIA, MODELS, STATE):
            s3.create_bucket(bucket)
        rabbit = stack.enter_context(RabbitMqNode(folder / "rabbitmq"))
        backend = stack.enter_context(Backend(token=token, secrets=[signing_secret(token)]))
        screen.say(f"RabbitMQ on port {rabbit.port}, S3 at {s3.endpoint}, backend at {backend.url}")
        settings = settings_of_the_worker(
            rabbit=rabbit, s3=s3, backend_url=backend.url, token=token, folder=folder
        )
        log = output / "worker.log"
        worker = stack.enter_context(
            WorkerProcess(settings | choice.settings, folder=folder, log=log)
        )
        screen.say(f"worker started: python main.py worker (its log: {log})")
        job = (demo_language.LanguageDemoJob if kind == "llm" else DemoJob)(
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
            # The parts end in order; a second Ctrl-C must not leave any of them running.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            screen.finish_bar()
            screen.say("stopping: first the worker, then the servers")
            raise


def signing_secret(token: str) -> str:
    """The secret that both sides derive without WEBHOOK_SIGNING_SECRET: docs/protocol.md, 3."""
    digest = hmac.new(
        token.encode(), b"training-server webhook signing v1", hashlib.sha256
    ).digest()
    return "whsec_" + base64.b64encode(digest).decode()
