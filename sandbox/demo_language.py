"""The demo's job of a language model: 200 conversations and a tiny Llama."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pika

from sandbox import stand_in_language_model
from sandbox.backend import ReceivedRequest
from sandbox.base_model_choice import BaseModelChoice
from sandbox.demo_job import MEDIA, DemoJob
from sandbox.demo_screen import DemoFailed

SUBJECT = "guide"
BASE = "stand-in/tiny-llama"
CONVERSATIONS = 200
FILES = (
    *("training_report.json", "training_report.html", "README.md", "chat_template.jinja"),
    *("fingerprint.json", "adapter_config.json", "adapter_model.safetensors"),
)
_PLAIN_PEFT = """
import json, sys
import peft, torch, transformers
base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = peft.PeftModel.from_pretrained(base, sys.argv[2]).eval()
furthest = 0.0
for each in json.load(open(sys.argv[2] + "/fingerprint.json"))["prompts"]:
    ids = torch.tensor([each["token_ids"]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].double()
    made = torch.log_softmax(logits, -1)[each["top_token_ids"]].tolist()
    furthest = max(furthest, *(abs(round(a, 6) - b) for a, b in zip(made, each["top_logprobs"])))
print(furthest)
"""


def choice(folder: Path) -> BaseModelChoice:
    """The tiny Llama, written into `folder`, and the worker's settings for it."""
    built = stand_in_language_model.build(folder)
    settings = {
        "KINDS": "llm",
        "LLM_BASE_MODELS": f"{BASE}={built}",
        "ALLOW_CPU": "true",
        "OMP_NUM_THREADS": "1",
    }
    words = ("base model: a tiny Llama of random weights; everything else is real",)
    return BaseModelChoice(words, settings, minutes=10)


class LanguageDemoJob(DemoJob):
    """One job of a language model on servers that are running already."""

    queue = f"{DemoJob.queue}.llm"
    files = FILES

    def upload(self) -> None:
        """Put the conversations on S3."""
        rows = stand_in_language_model.conversations(CONVERSATIONS)
        body = "".join(json.dumps(row) + "\n" for row in rows).encode()
        self._s3.put_object(Bucket=MEDIA, Key="llm/conversations.jsonl", Body=body)
        self._screen.say(f"{CONVERSATIONS} conversations are in s3://{MEDIA}")

    def publish(self) -> None:
        """Publish the message as a backend does it."""
        task_id = str(uuid.uuid4())
        self.folder = f"models/llm/{SUBJECT}/{task_id}/"
        message = {
            "task_id": task_id,
            "type": "llm_training",
            "data": {
                "subject": SUBJECT,
                "base_model": BASE,
                "training_file": f"s3://{MEDIA}/llm/conversations.jsonl",
                "parameters": {
                    "learning_rate": 0.005,
                    "batch_size": 4,
                    "gradient_accumulation_steps": 2,
                    "rank": 8,
                    "target_modules": "all-linear",
                    "max_length": 256,
                },
            },
        }
        with self._channel() as channel:
            channel.queue_declare(self.queue, durable=True)
            channel.basic_publish(
                "",
                self.queue,
                json.dumps(message).encode(),
                pika.BasicProperties(delivery_mode=2, content_type="application/json"),
            )
        self._screen.say(f"the backend published the training message {task_id} to {self.queue}")

    def check_model(self, ending: ReceivedRequest) -> None:
        """The adapter acts in plain PEFT as it did in the trainer, and the perplexity fell."""
        metric = ending.body["training_metric"]
        if not metric["perplexity_after"] < metric["perplexity_before"]:
            raise DemoFailed(f"the held-out perplexity did not fall: {metric}")
        base = self._worker.settings["LLM_BASE_MODELS"].partition("=")[2]
        command = [sys.executable, "-W", "ignore", "-c", _PLAIN_PEFT, base, str(self._output)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode or float(ran.stdout.split()[-1]) > 2e-6:
            raise DemoFailed(f"plain PEFT gives other logits: {ran.stdout} {ran.stderr[-300:]}")
        self._screen.say(
            f"plain PEFT loads the adapter, difference of logprobs {ran.stdout.split()[-1]}",
            good=True,
        )

    def last_lines(self, report: dict[str, Any], seconds: float) -> dict[str, str]:
        """Name and text of the last lines."""
        before, after = report["evaluation"]["before"], report["evaluation"]["after"]
        return {
            "Trained": f"{report['training']['steps']} steps on "
            f"{report['tokens']['rows_trained']} conversations",
            "Perplexity": f"{before['perplexity']:.1f} before, {after['perplexity']:.1f} after, on "
            f"{after['tokens']} held-out answer tokens",
            "Verdict": report["evaluation"]["verdict"],
            "Model": str(self._output / FILES[-1]),
            "Report": str(self._output / "training_report.html"),
            "Time": f"{seconds:.0f} s from the first upload to the worker's end",
        }
