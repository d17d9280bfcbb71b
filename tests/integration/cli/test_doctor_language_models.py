"""The doctor and the bases of language models: the allow-list, folders, and a hub over HTTP."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from numpy import zeros

from cli.doctor import base_model, language_models
from cli.doctor.findings import Finding, Verdict
from jobs.llm import LlmOptions
from utils.settings.groups import TrainerSettings

NAME = "someone/chat-model"


@dataclasses.dataclass
class Hub:
    """The answers of a hub."""

    url: str = ""
    status: int = 200
    gated: bool = False
    files: tuple[str, ...] = ("config.json", "model.safetensors")
    parameters: int = 1_000_000


@pytest.fixture(name="hub")
def _hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        """Answers about one model."""

        def do_GET(self) -> None:  # pylint: disable=invalid-name,missing-function-docstring
            refused = hub.gated and self.path.endswith("/auth-check")
            self.send_response(403 if refused else hub.status)
            if refused:
                self.send_header("X-Error-Code", "GatedRepo")
            answer = {
                "id": NAME,
                "gated": "manual" if hub.gated else False,
                "siblings": [{"rfilename": name} for name in hub.files],
                "safetensors": {"parameters": {"BF16": hub.parameters}, "total": hub.parameters},
            }
            body = json.dumps(answer).encode()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:  # pylint: disable=arguments-differ
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


def examined(
    base_models: str,
    hub: Hub | None = None,
    *,
    default: str = "",
    kinds: tuple[str, ...] = ("llm",),
) -> list[Finding]:
    """The findings about an allow-list."""
    options = LlmOptions(base_models=base_models, default_base_model=default)
    trainer = TrainerSettings(allow_cpu=True)
    environment = {"HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9"}
    return list(language_models.examine(options, trainer, environment, kinds))


def folder_of(path: Path, *, weights: bytes | None = None) -> Path:
    """A model's folder."""
    path.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (path / name).write_text("{}", "utf-8")
    made = safetensors.numpy.save({"a": zeros((40, 50), dtype="float16")})
    (path / "model.safetensors").write_bytes(made if weights is None else weights)
    return path


def test_a_complete_folder_is_weighed_by_its_headers(tmp_path: Path) -> None:
    (finding,) = examined(f"{NAME}={folder_of(tmp_path / 'model')}")
    assert finding.verdict is Verdict.OK, finding
    assert "0.00 billion parameters" in finding.detail and "4bit" in finding.detail


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        (".", "does not exist"),
        ("config.json", "has no config.json"),
        ("model.safetensors", "no weights in safetensors"),
    ],
)
def test_an_incomplete_folder_fails_with_a_remedy(tmp_path: Path, lacking: str, said: str) -> None:
    folder = tmp_path / "model"
    if lacking != ".":
        (folder_of(folder) / lacking).unlink()
    (finding,) = examined(f"{NAME}={folder}")
    assert finding.verdict is Verdict.FAIL and said in finding.detail and finding.remedy


@pytest.mark.parametrize(("cut", "said"), [(100, "truncated"), (3990, "not a valid")])
def test_a_damaged_file_is_named(tmp_path: Path, cut: int, said: str) -> None:
    folder = folder_of(tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut] if said == "truncated" else b"\xff" * 64)
    (finding,) = examined(f"{NAME}={folder}")
    assert finding.verdict is Verdict.FAIL and said in finding.detail
    assert "model.safetensors" in finding.detail


def test_a_model_that_is_too_large_fails_before_it_is_loaded(hub: Hub) -> None:
    hub.parameters = 10**14
    (finding,) = examined(NAME, hub)
    assert finding.verdict is Verdict.FAIL
    assert "100000.00 billion parameters" in finding.detail and NAME in finding.remedy


def test_a_model_of_the_hub_is_found(hub: Hub) -> None:
    (finding,) = examined(f"{NAME},other/*", hub)
    assert finding.verdict is Verdict.OK, finding


def test_a_gated_model_fails_and_names_the_token(hub: Hub) -> None:
    hub.gated = True
    (finding,) = examined(NAME, hub)
    assert finding.verdict is Verdict.FAIL
    assert "gated" in finding.detail and "HF_TOKEN is not set" in finding.detail
    assert f"huggingface.co/{NAME}" in finding.remedy


def test_a_missing_model_and_one_without_safetensors_fail(hub: Hub) -> None:
    hub.status = 404
    (finding,) = examined(NAME, hub)
    assert finding.verdict is Verdict.FAIL and "answers 404" in finding.detail
    hub.status, hub.files = 200, ("config.json", "pytorch_model.bin")
    (finding,) = examined(NAME, hub)
    assert finding.verdict is Verdict.FAIL and "safetensors" in finding.detail


def test_a_hub_that_is_away_fails_and_names_the_folder_form() -> None:
    (finding,) = examined(NAME)
    assert finding.verdict is Verdict.FAIL and f"{NAME}=/FOLDER" in finding.remedy


def test_a_default_that_is_not_allowed_fails() -> None:
    (finding,) = examined("other/*", default=NAME)
    assert finding.verdict is Verdict.FAIL and "LLM_DEFAULT_BASE_MODEL" in finding.detail


def test_only_the_bases_of_the_kinds_are_examined() -> None:
    assert not examined(NAME, kinds=("style",))
    (finding,) = base_model.examine(TrainerSettings(), {}, ("llm",))
    assert finding.verdict is Verdict.OK and "not used" in finding.detail
