"""The demo with the API: `scripts/demo --api`.

It starts a private PostgreSQL, RabbitMQ and S3, the API and a worker. OpenAI's own client orders
two styles, follows the first one by server-sent events, pauses and resumes it, cancels the second
one, and downloads the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai

from config import setting_names
from local.processes import HOST, ChildProcess, free_ports
from local.rabbitmq_node import RabbitMqNode
from sandbox.base_model_choice import choose_base_model
from sandbox.demo_job import MEDIA, MODELS, STATE
from sandbox.demo_parts import settings_of_the_worker
from sandbox.demo_screen import DemoFailed, Screen
from sandbox.photographs import photographs
from sandbox.postgres_node import PostgresNode
from sandbox.s3_server import S3Server
from sandbox.worker_process import ROOT, WorkerProcess

EPOCHS = 30
ORG = "org_demo"
START_SECONDS = 90.0
STOP_SECONDS = 20.0
LOOK_SECONDS = 0.2
MODEL_FILE = "lora_weights.safetensors"


def play(screen: Screen, output: Path) -> dict[str, str]:
    """Start the parts, run the two jobs, and end the parts in any case.

    Returns:
        The last lines: name -> text.

    Raises:
        DemoFailed: A check failed; the message names it.
        RuntimeError: A server is not installed or did not start.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="training-demo-")))
        choice = choose_base_model(folder / "stand-in-for-sd15")
        for words in choice.words:
            screen.say(words)
        settings = choice.settings | _servers(stack, screen, folder)
        url = settings["BACKEND_API_URL"]
        key = _new_key(settings, folder)
        api = stack.enter_context(_api(settings, folder, output / "api.log"))
        _wait_for(api, url)
        screen.say(f"API at {url}, with a key of the organisation {ORG} (its log: {api.log})")
        worker = stack.enter_context(
            WorkerProcess(settings, folder=folder, log=output / "worker.log")
        )
        screen.say(f"worker started: python main.py worker (its log: {worker.log})")
        demo = ApiDemo(screen, url=url, key=key, output=output, minutes=choice.minutes)
        try:
            rows = demo.run()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must leave nothing
            screen.say("stopping: first the worker, then the servers")
            raise
        _stop(screen, "worker", worker.stop())
        _stop(screen, "API", api.stop(STOP_SECONDS))
        return rows


def _servers(stack: contextlib.ExitStack, screen: Screen, folder: Path) -> dict[str, str]:
    """Start the servers. Returns the settings of the API and the worker."""
    s3 = stack.enter_context(S3Server())
    for bucket in (MEDIA, MODELS, STATE):
        s3.create_bucket(bucket)
    rabbit = stack.enter_context(RabbitMqNode(folder / "rabbitmq"))
    postgres = stack.enter_context(PostgresNode())
    screen.say(
        f"RabbitMQ on port {rabbit.port}, S3 at {s3.endpoint}, PostgreSQL on port {postgres.port}"
    )
    (port,) = free_ports(1)
    token = secrets.token_hex(24)
    settings = settings_of_the_worker(
        rabbit=rabbit, s3=s3, backend_url=f"http://{HOST}:{port}", token=token, folder=folder
    )
    return settings | {
        "API_DATABASE_URL": postgres.create_database("demo"),
        "API_PORT": str(port),
        "API_KEY_PEPPER": secrets.token_hex(24),
    }


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that has these settings and no others."""
    kept = {n: value for n, value in os.environ.items() if n.upper() not in setting_names()}
    return kept | dict(settings)


def _new_key(settings: Mapping[str, str], folder: Path) -> str:
    """Make an API key as an operator does."""
    command = ("api", "keys", "create", "--org", ORG, "--name", "demo", "--scope", "train")
    made = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *command],
        env=_environment(settings),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        raise DemoFailed(f"no API key could be made: {made.stderr.strip()}")
    return made.stdout.split()[-1]


@contextlib.contextmanager
def _api(settings: Mapping[str, str], folder: Path, log: Path) -> Iterator[ChildProcess]:
    process = ChildProcess(
        "API",
        [sys.executable, str(ROOT / "main.py"), "api"],
        environment=_environment(settings),
        folder=folder,
        log=log,
    )
    process.start()
    try:
        yield process
    finally:
        process.stop(STOP_SECONDS)


def _wait_for(api: ChildProcess, url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        if api.exit_code is not None or time.monotonic() > deadline:
            raise DemoFailed(f"the API did not start. The end of its log:\n{api.last_words()}")
        time.sleep(LOOK_SECONDS)


def _stop(screen: Screen, name: str, code: int | None) -> None:
    if code != 0:
        raise DemoFailed(f"the {name} ended with exit code {code} after SIGTERM, not with 0")
    screen.say(f"SIGTERM: the {name} ended with exit code 0", good=True)


class Followed:
    """A job that is followed by server-sent events, in a thread.

    Args:
        url: The API.
        key: The API key.
        job_id: The job.
        show: Receives each event.
    """

    def __init__(
        self, url: str, key: str, job_id: str, show: Callable[[dict[str, Any]], None]
    ) -> None:
        self.ids: list[int] = []
        self.statuses: list[str] = []
        self.numbers = 0
        self.has_ended = False
        self._url = f"{url}/v1/fine_tuning/jobs/{job_id}/events"
        self._headers = {"Authorization": f"Bearer {key}", "Accept": "text/event-stream"}
        self._show = show
        self._thread = threading.Thread(target=self._follow, name="events", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self.has_ended:
            last = {"Last-Event-ID": str(self.ids[-1])} if self.ids else {}
            try:
                with httpx.stream(
                    "GET", self._url, headers=self._headers | last, timeout=60
                ) as got:
                    for line in got.iter_lines():
                        self._take(line)
            except httpx.HTTPError:
                time.sleep(1)  # it continues after the last event

    def _take(self, line: str) -> None:
        name, _, value = line.partition(": ")
        if (name, value) == ("event", "end"):
            self.has_ended = True
        elif name == "data" and not self.has_ended:
            event = json.loads(value)
            self.ids.append(int(event["id"]))
            if "status" in event["data"]:
                self.statuses.append(event["data"]["status"])
            self.numbers += event["type"] == "metrics"
            self._show(event)


class ApiDemo:
    """Two jobs on servers that are running already.

    Args:
        screen: Shows the progress.
        url: The API.
        key: The API key.
        output: The folder that receives the model.
        minutes: Jobs that take longer have failed.
    """

    def __init__(self, screen: Screen, *, url: str, key: str, output: Path, minutes: float) -> None:
        self._screen = screen
        self._url = url
        self._key = key
        self._output = output
        self._deadline = time.monotonic() + 60 * minutes
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
        self._shown_step = 0

    def run(self) -> dict[str, str]:
        """Order, follow, pause, resume, cancel and download.

        Returns:
            The last lines: name -> text.

        Raises:
            DemoFailed: A check failed; the message names it.
        """
        begun = time.monotonic()
        files = self._upload()
        first, second = self._order("harbour", files), self._order("forest", files)
        followed = Followed(self._url, self._key, first, self._show)
        self._until("the first style trains", lambda: followed.numbers >= 3)
        self._client.fine_tuning.jobs.pause(first)
        self._screen.say("asked to pause the first style")
        self._until("the first style is paused", lambda: followed.statuses[-1] == "paused")
        self._until("the worker has the second style", lambda: self._status(second) == "running")
        self._screen.say("the worker has put the first style down and taken the second", good=True)
        self._client.fine_tuning.jobs.cancel(second)
        self._until("the second style ends", lambda: self._status(second) == "cancelled")
        self._screen.say("the second style was cancelled by its worker", good=True)
        self._client.fine_tuning.jobs.resume(first)
        self._screen.say("asked to resume the first style")
        self._until("the first style ends", lambda: followed.has_ended)
        self._check(first, followed)
        size = self._download(first)
        report = self._get(f"fine_tuning/jobs/{first}/report").json()
        (self._output / "training_report.json").write_text(json.dumps(report), encoding="utf-8")
        self._client.close()
        return {
            "Trained": f"{report['epochs']} epochs, {report['steps']} steps, loss "
            f"{report['loss']:.4f}",
            "Followed": f"{len(followed.ids)} server-sent events, each once",
            "Statuses": " → ".join(followed.statuses),
            "Cancelled": second,
            "Model": f"{self._output / MODEL_FILE} ({size // 1024} kB)",
            "Report": str(self._output / "training_report.json"),
            **({"Base model": each} if (each := _stand_in_of(report)) else {}),
            "Time": f"{time.monotonic() - begun:.0f} s from the first upload to the download",
        }

    def _upload(self) -> list[str]:
        images = photographs()
        files = [
            self._client.files.create(file=(each.name, each.content), purpose="fine-tune").id
            for each in images
        ]
        self._screen.say(f"{len(files)} photographs were uploaded to /v1/files")
        return files

    def _order(self, name: str, files: list[str]) -> str:
        job = self._client.fine_tuning.jobs.create(
            model="sd15",
            training_file=files[0],
            hyperparameters={"n_epochs": EPOCHS},
            suffix=name,
            extra_body={"kind": "style", "training_files": files, "name": name},
        )
        self._screen.say(f"ordered the style {name}: {job.id} is {job.status}")
        return job.id

    def _show(self, event: dict[str, Any]) -> None:
        """Show an event; of the numbers only those of each fifth of the training."""
        if event["type"] == "metrics":
            step = int(event["data"]["step"])
            if step < self._shown_step + EPOCHS // 5:
                return
            self._shown_step = step
        self._screen.say(f"event {event['id']}: {event['message']}")

    def _status(self, job_id: str) -> str:
        return str(self._client.fine_tuning.jobs.retrieve(job_id).status)

    def _until(self, what: str, condition: Callable[[], bool]) -> None:
        while not condition():
            if time.monotonic() > self._deadline:
                raise DemoFailed(f"it took too long until {what}")
            time.sleep(LOOK_SECONDS)

    def _check(self, job_id: str, followed: Followed) -> None:
        """The stream had every event once and in order, and the job was paused between."""
        listed = [int(each.id) for each in self._client.fine_tuning.jobs.list_events(job_id)]
        if followed.ids != sorted(listed):
            raise DemoFailed(f"the stream had {followed.ids}, and the list of events has {listed}")
        wanted = ["queued", "running", "pausing", "paused", "queued", "running", "succeeded"]
        if followed.statuses != wanted:
            raise DemoFailed(f"the job went through {followed.statuses}, not {wanted}")
        self._screen.say("the stream had every event of the job once, in order", good=True)

    def _get(self, path: str) -> httpx.Response:
        answer = httpx.get(
            f"{self._url}/v1/{path}",
            headers={"Authorization": f"Bearer {self._key}"},
            follow_redirects=True,
            timeout=60,
        )
        if answer.status_code != 200:
            raise DemoFailed(f"GET /v1/{path} was answered {answer.status_code}: {answer.text}")
        return answer

    def _download(self, job_id: str) -> int:
        """Download the model. Returns its size in bytes."""
        model = self._client.fine_tuning.jobs.retrieve(job_id).fine_tuned_model
        content = self._get(f"models/{model}/content").content
        length = int.from_bytes(content[:8], "little")
        if "__metadata__" not in json.loads(content[8 : 8 + length]):
            raise DemoFailed(f"the model {model} is no safetensors file with metadata")
        (self._output / MODEL_FILE).write_bytes(content)
        self._screen.say(f"downloaded {model}", good=True)
        return len(content)


def _stand_in_of(report: Mapping[str, Any]) -> str:
    """The sentence of the report that the base model is a stand-in; empty if it is none."""
    return next((each for each in report["machine_warnings"] if "stand-in" in each), "")
