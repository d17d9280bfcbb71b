"""A stack for trying the commands, without Docker: `python -m sandbox.stack [FOLDER]`.

It has a private RabbitMQ node, an S3 server, a backend that checks every signature, and the demo's
base model. `FOLDER/env` has all settings of the worker and the commands, for a shell to source;
`FOLDER/images` has photographs to train on. Everything ends with this program.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import sys
from pathlib import Path

from local.rabbitmq_node import RabbitMqNode
from sandbox.backend import Backend
from sandbox.backend_server import show
from sandbox.base_model_choice import choose_base_model
from sandbox.demo_job import MEDIA, MODELS, STATE
from sandbox.demo_parts import settings_of_the_worker, signing_secret
from sandbox.photographs import photographs
from sandbox.s3_server import S3Server


def main(folder: Path) -> None:
    """Start everything, and wait for Ctrl-C or SIGTERM."""
    stopped = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stopped)
    token = secrets.token_hex(24)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for photograph in photographs():
        (images / photograph.name).write_bytes(photograph.content)
    choice = choose_base_model(folder / "stand-in-for-sd15")
    with contextlib.ExitStack() as parts:
        s3 = parts.enter_context(S3Server())
        for bucket in (MEDIA, MODELS, STATE):
            s3.create_bucket(bucket)
        rabbit = parts.enter_context(RabbitMqNode(folder / "rabbitmq"))
        backend = parts.enter_context(
            Backend(token=token, secrets=[signing_secret(token)], on_request=show)
        )
        settings = settings_of_the_worker(
            rabbit=rabbit, s3=s3, backend_url=backend.url, token=token, folder=folder
        ) | {"HTTP_PORT": "8080", "LOG_FORMAT": "text"}
        _write(folder / "env", settings | choice.settings)
        print(*choice.words, sep="\n")
        print(f"RabbitMQ on port {rabbit.port}, S3 at {s3.endpoint}, backend at {backend.url}")
        print(
            f"in another terminal: set -a; . {shlex.quote(str(folder / 'env'))}; set +a", flush=True
        )
        signal.sigwait(stopped)


def _write(path: Path, values: dict[str, str]) -> None:
    """Readable only by its owner, because it holds secrets."""
    path.unlink(missing_ok=True)
    with open(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8"
    ) as file:
        file.writelines(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/stack").absolute())
