"""The demo: the order of its lines, and its reaction to Ctrl-C."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sandbox.backend import COMPLETE
from sandbox.demo_job import MODELS, DemoJob
from sandbox.worker_process import ROOT

WEIGHTS = f"s3://{MODELS}/models/style_123/lora_weights.safetensors"


class _Storage:
    """A store that holds one model's weights."""

    def list_objects_v2(self, **asked: str) -> dict[str, Any]:
        """The listed objects."""
        key = WEIGHTS.removeprefix(f"s3://{MODELS}/")
        entry = {"Key": key, "Size": 4096, "LastModified": datetime.now(UTC)}
        return {"Contents": [entry]} if asked["Bucket"] == MODELS else {}


def test_the_model_is_shown_on_s3_before_the_ending_that_names_it() -> None:
    said: list[str] = []
    parts: dict[str, Any] = {
        "screen": SimpleNamespace(
            say=lambda text, good=False: said.append(text), finish_bar=lambda: None
        ),
        "rabbit": None,
        "s3": SimpleNamespace(client=_Storage),
        "backend": SimpleNamespace(
            rejected=(), requests=(SimpleNamespace(path=COMPLETE, body={"style_id": 123}),)
        ),
        "worker": SimpleNamespace(exit_code=None),
        "output": Path("unused"),
    }
    # pylint: disable-next=protected-access
    DemoJob(**parts, minutes=1)._watch(time.monotonic() + 10)
    assert said == [f"model file on S3: {WEIGHTS} (4 kB)", "complete webhook, signature verified"]


def test_a_ctrl_c_during_the_import_of_libraries_ends_with_a_sentence(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "sandbox.demo", "--output", str(tmp_path / "output")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        maps = Path(f"/proc/{demo.pid}/maps")
        deadline = time.monotonic() + 60
        while "libtorch" not in maps.read_text(encoding="utf-8"):
            assert demo.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        demo.send_signal(signal.SIGINT)
        said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, said
    assert "Traceback" not in said
    assert said.strip() == "Stopped. All started programs have ended."
