"""The demo's job: publishes it like the backend, follows and checks it, and downloads the model."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pika
from pika.exceptions import ChannelClosedByBroker

from local.rabbitmq_node import RabbitMqNode
from sandbox.backend import COMPLETE, Backend, ReceivedRequest
from sandbox.demo_screen import DemoFailed, Screen
from sandbox.photographs import photographs
from sandbox.s3_server import S3Server
from sandbox.worker_process import WorkerProcess

LOOK_SECONDS = 0.25
STYLE = 123
EPOCHS = 30
QUEUE = "model_training"
MEDIA, MODELS, STATE = "stylelicense-media", "stylelicense-models", "stylelicense-state"
MODEL_FILES = (
    "lora_weights.safetensors",
    "lora_weights_kohya.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "training_report.json",
    "training_report.html",
    "samples.png",
    "loss_curve.png",
)


class DemoJob:
    """One job on servers that run already.

    Args:
        screen: Shows the progress.
        rabbit, s3, backend, worker: The started parts.
        output: Folder that receives the model.
        minutes: A job that takes longer has failed.
    """

    queue = QUEUE
    files: tuple[str, ...] = MODEL_FILES
    folder = f"models/style_{STYLE}/"

    def __init__(
        self,
        screen: Screen,
        *,
        rabbit: RabbitMqNode,
        s3: S3Server,
        backend: Backend,
        worker: WorkerProcess,
        output: Path,
        minutes: float,
    ) -> None:
        self._screen = screen
        self._rabbit = rabbit
        self._s3 = s3.client()
        self._backend = backend
        self._worker = worker
        self._output = output
        self._minutes = minutes
        self._heard = 0
        self._seen: set[str] = set()

    def run(self) -> dict[str, str]:
        """Publish the job, follow it, check it and download its model.

        Returns:
            The last lines: name -> text.

        Raises:
            DemoFailed: A check failed; the message names it.
        """
        began = time.monotonic()
        self.upload()
        self.publish()
        ending = self._watch(began + 60 * self._minutes)
        report = self._fetch_model()
        self._stop_worker()
        self._check_queues()
        self._check_webhooks(ending)
        self.check_model(ending)
        return self.last_lines(report, time.monotonic() - began)

    def upload(self) -> None:
        """Put the photographs on S3."""
        captions = 0
        for photograph in photographs():
            key = f"training/{STYLE}/{photograph.name}"
            self._s3.put_object(Bucket=MEDIA, Key=key, Body=photograph.content)
            if photograph.caption:
                captions += 1
                text = Path(key).with_suffix(".txt").as_posix()
                self._s3.put_object(Bucket=MEDIA, Key=text, Body=photograph.caption.encode())
        self._screen.say(f"ten photographs, {captions} with a caption, are in s3://{MEDIA}")

    def publish(self) -> None:
        """Like the backend: a durable queue without arguments, a persistent message."""
        task_id = str(uuid.uuid4())
        names = [photograph.name for photograph in photographs()]
        message = {
            "task_id": task_id,
            "type": "model_training",
            "data": {
                "style_id": STYLE,
                "images": [f"s3://{MEDIA}/training/{STYLE}/{name}" for name in names],
                "tags": ["photograph"],
                "parameters": {"epochs": EPOCHS, "learning_rate": 0.0001, "batch_size": 1},
            },
            "webhook_url": f"{self._backend.url}/api/webhooks/training/{STYLE}/status",
        }
        with self._channel() as channel:
            channel.queue_declare(QUEUE, durable=True)
            channel.basic_publish(
                "",
                QUEUE,
                json.dumps(message).encode(),
                pika.BasicProperties(delivery_mode=2, content_type="application/json"),
            )
        self._screen.say(f"the backend published the training message {task_id} to {QUEUE}")

    @contextlib.contextmanager
    def _channel(self) -> Iterator[Any]:
        parameters = pika.ConnectionParameters(self._rabbit.host, self._rabbit.port)
        connection = pika.BlockingConnection(parameters)
        try:
            yield connection.channel()
        finally:
            if connection.is_open:
                connection.close()

    def _watch(self, deadline: float) -> ReceivedRequest:
        """Show webhooks and new objects on S3 until the job's ending, which is returned."""
        while True:
            # An ending that has arrived counts before an ended worker.
            exit_code = self._worker.exit_code
            # Objects that the backend knows of are on S3 by now, so S3 is shown first.
            news = self._news()
            self._look_at_s3()
            ending = self._show(news)
            if ending:
                break
            if exit_code is not None:
                raise DemoFailed(
                    f"the worker ended with exit code {exit_code}. "
                    f"The end of its log:\n{self._worker.last_words()}"
                )
            if time.monotonic() > deadline:
                raise DemoFailed(f"the job was not over after {self._minutes:.0f} minutes")
            time.sleep(LOOK_SECONDS)
        self._screen.finish_bar()
        if ending.path != COMPLETE:
            raise DemoFailed(f"the job failed: {ending.body['error_message']}")
        return ending

    def _news(self) -> Sequence[ReceivedRequest]:
        """The webhooks that came since the last call."""
        for refused in self._backend.rejected:
            raise DemoFailed(
                f"the backend refused {refused.method} {refused.path}: {refused.reason}"
            )
        news = self._backend.requests[self._heard :]
        self._heard += len(news)
        return news

    def _show(self, news: Sequence[ReceivedRequest]) -> ReceivedRequest | None:
        """Show webhooks; the ending is returned."""
        for webhook in news:
            if "progress" not in webhook.body:
                name = webhook.path.rsplit("/", 1)[-1]
                self._screen.say(f"{name} webhook, signature verified", good=True)
                return webhook
            if webhook is self._backend.requests[0]:
                self._screen.say("first progress webhook, signature verified", good=True)
            self._screen.show_progress(webhook.body["progress"])
        return None

    def _look_at_s3(self) -> None:
        """Report each checkpoint and each of the model's files once, when it exists."""
        for bucket, prefix in ((STATE, "checkpoints/"), (MODELS, "models/")):
            listing = self._s3.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
            for entry in sorted(listing, key=lambda entry: entry["LastModified"]):
                key = entry["Key"]
                if key in self._seen:
                    continue
                self._seen.add(key)
                if bucket == MODELS:
                    size = max(1, round(entry["Size"] / 1024))
                    self._screen.say(f"model file on S3: s3://{bucket}/{key} ({size} kB)")
                elif key.endswith("/manifest.json"):  # written last: the checkpoint is complete
                    name = key.split("/")[-2]
                    self._screen.say(f"checkpoint {name} is on S3, in s3://{bucket}")

    def _fetch_model(self) -> dict[str, Any]:
        self._look_at_s3()
        folder = self.folder
        listing = self._s3.list_objects_v2(Bucket=MODELS, Prefix=folder).get("Contents", [])
        present = {entry["Key"].removeprefix(folder) for entry in listing}
        if missing := set(self.files) - present:
            raise DemoFailed(f"not on S3 after the complete webhook: {', '.join(sorted(missing))}")
        for name in sorted(present):
            self._s3.download_file(MODELS, folder + name, str(self._output / name))
        report: dict[str, Any] = json.loads((self._output / "training_report.json").read_bytes())
        return report

    def _stop_worker(self) -> None:
        code = self._worker.stop()
        if code != 0:
            raise DemoFailed(f"the worker ended with exit code {code} after SIGTERM, not with 0")
        self._screen.say("SIGTERM: the worker ended with exit code 0", good=True)

    def _check_queues(self) -> None:
        """The worker has ended, so messages that it had not acknowledged would be in the queue."""
        left = {name: self._messages_in(name) for name in (self.queue, f"{QUEUE}.dead")}
        if any(left.values()):
            raise DemoFailed(f"messages are left in the queues: {left}")
        self._screen.say(f"the queue {self.queue} is empty, and so is the dead queue", good=True)

    def _messages_in(self, name: str) -> int:
        with self._channel() as channel:
            try:
                return int(channel.queue_declare(name, passive=True).method.message_count)
            except ChannelClosedByBroker as error:
                if error.reply_code != 404:
                    raise
                return 0

    def _check_webhooks(self, ending: ReceivedRequest) -> None:
        self._show(self._news())
        endings = self._backend.endings()
        if len(endings) != 1:
            raise DemoFailed(f"the job had {len(endings)} endings, not one")
        last = "adapter_model.safetensors" if "fingerprint.json" in self.files else self.files[0]
        expected = f"s3://{MODELS}/{self.folder}{last}"
        if ending.body["model_url"] != expected:
            raise DemoFailed(f"the ending names {ending.body['model_url']}, not {expected}")
        count = len(self._backend.requests)
        self._screen.say(f"{count} webhooks, one ending, every signature right", good=True)

    def check_model(self, ending: ReceivedRequest) -> None:
        """Further checks of a kind; styles have none."""

    def last_lines(self, report: dict[str, Any], seconds: float) -> dict[str, str]:
        """Name and text of the last lines."""
        used = sum(image["status"] != "left_out" for image in report["pictures"])
        return {
            "Trained": f"{report['epochs']} epochs on {used} photographs, {report['steps']} steps, "
            f"{report['steps_per_second']:.1f} a second, loss {report['loss']:.4f}",
            "Model": str(self._output / "lora_weights.safetensors"),
            "  for ComfyUI": str(self._output / "lora_weights_kohya.safetensors"),
            "  for PEFT": str(self._output / "adapter_model.safetensors"),
            "Report": str(self._output / "training_report.html"),
            "Images": str(self._output / "samples.png"),
            "Loss curve": str(self._output / "loss_curve.png"),
            "Time": f"{seconds:.0f} s from the first upload to the worker's end",
        }
