"""The doctor and the base model: a folder, the hub's cache, and a hub over HTTP."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import config
from cli.doctor import base_model as examination
from cli.doctor.findings import Finding, Verdict
from training.style.stand_in_model import build_stand_in

NAME = "artists/stable-diffusion"
RENAMED = "artists/moved"
UNET = "unet/diffusion_pytorch_model.safetensors"
TOKEN = "hf_" + "a" * 30


@pytest.fixture(scope="module", name="sound")
def _sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_stand_in(tmp_path_factory.mktemp("base-model") / "stand-in")


@pytest.fixture(name="model")
def _model(sound: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


@dataclasses.dataclass
class _Hub:
    """The hub's answers, and the requests that it got."""

    url: str = ""
    status: int = 200
    pipeline: str = "StableDiffusionPipeline"
    renamed: bool = False
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    asked: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)


@pytest.fixture(name="hub")
def _hub(monkeypatch: pytest.MonkeyPatch, sound: Path) -> Iterator[_Hub]:
    """A hub that has the stand-in."""
    hub = _Hub(
        files={
            path.relative_to(sound).as_posix(): path.stat().st_size
            for path in sound.rglob("*")
            if path.is_file()
        }
    )

    class Handler(BaseHTTPRequestHandler):
        """The hub's answer about a model."""

        def do_GET(self) -> None:  # pylint: disable=invalid-name,missing-function-docstring
            hub.asked.append((self.path, self.headers["Authorization"]))
            renamed = hub.renamed and NAME in self.path
            siblings = [{"rfilename": name, "size": size} for name, size in hub.files.items()]
            self.send_response(307 if renamed else hub.status)
            if renamed:  # to another origin of the same server
                other = hub.url.replace("127.0.0.1", "localhost")
                self.send_header("Location", f"{other}/api/models/{RENAMED}?blobs=true")
            self.end_headers()
            name = RENAMED if hub.renamed else NAME
            config = {"diffusers": {"_class_name": hub.pipeline}}
            answer = {"id": name, "siblings": siblings, "config": config}
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:  # pylint: disable=arguments-differ
            """Print nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        yield hub
        server.shutdown()
        thread.join()


def _examine(model: Path | str, home: Path | None = None, **values: Any) -> Finding:
    """The findings about the model's files."""
    return _examine_all(model, home, **values)[0]


def _examine_all(model: Path | str, home: Path | None = None, **values: Any) -> list[Finding]:
    settings = config.load_local(
        _env_file=None,
        **{
            "base_model": str(model),
            "base_model_revision": None,
            "hf_token": None,
            "hf_home": home,
        }
        | values,
    )
    return list(examination.examine(settings.trainer, settings.trainer_environment()))


def test_a_complete_folder_passes(model: Path) -> None:
    assert _examine(model).verdict is Verdict.OK


@pytest.mark.parametrize(
    ("name", "keep", "says"),
    [
        (UNET, 100_000, f"{UNET} is truncated"),
        (UNET, 4, f"{UNET} is not a valid safetensors file"),
        (UNET, None, f"{UNET} is missing"),
        ("vae/config.json", None, "vae/config.json is missing"),
    ],
)
def test_a_damaged_folder_is_reported_by_file(
    model: Path, name: str, keep: int | None, says: str
) -> None:
    content = (model / name).read_bytes()
    (model / name).unlink()
    if keep is not None:
        assert keep < len(content)
        (model / name).write_bytes(content[:keep])
    finding = _examine(model)
    assert finding.verdict is Verdict.FAIL
    assert says in finding.detail
    assert "Download the model again" in finding.remedy


def test_a_folder_of_another_family_fails(model: Path) -> None:
    (model / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    finding = _examine(model)
    assert finding.verdict is Verdict.FAIL
    assert f"{model} is Stable Diffusion XL" in finding.detail
    assert "of Stable Diffusion 1.5" in finding.remedy


def test_a_model_of_another_family_on_the_hub_fails(hub: _Hub, tmp_path: Path) -> None:
    hub.pipeline = "FluxPipeline"
    finding = _examine(NAME, tmp_path)
    assert finding.verdict is Verdict.FAIL
    assert f"{NAME} is FLUX.1" in finding.detail


def test_a_folder_that_is_not_there_is_no_model_of_the_hub(tmp_path: Path) -> None:
    finding = _examine(tmp_path / "nothing")
    assert finding.verdict is Verdict.FAIL
    assert "is no folder" in finding.detail and "BASE_MODEL" in finding.remedy


def test_a_model_in_the_hubs_cache_needs_no_hub(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    commit = "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(sound, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    assert _examine(NAME, tmp_path).verdict is Verdict.OK
    assert _examine(NAME, tmp_path, base_model_revision=commit).verdict is Verdict.OK
    (repository / "snapshots" / commit / UNET).unlink()
    finding = _examine(NAME, tmp_path)
    assert finding.verdict is Verdict.FAIL
    assert "only partly" in finding.detail and "cannot be reached" in finding.detail


def test_a_model_that_the_hub_has_is_fetched_at_the_workers_start(
    hub: _Hub, tmp_path: Path
) -> None:
    finding = _examine(NAME, tmp_path, hf_token=TOKEN, base_model_revision="fp 16")
    assert finding.verdict is Verdict.WARN
    assert "downloads it at start" in finding.detail
    assert hub.asked == [(f"/api/models/{NAME}/revision/fp%2016?blobs=true", f"Bearer {TOKEN}")]


def test_a_model_too_large_for_the_disk_is_reported_before_it_is_fetched(
    hub: _Hub, tmp_path: Path
) -> None:
    hub.files[UNET] = shutil.disk_usage(tmp_path).free
    finding = _examine(NAME, tmp_path)
    assert finding.verdict is Verdict.FAIL
    assert "HF_HOME" in finding.remedy


def test_a_model_on_the_hub_without_the_needed_files_is_reported(hub: _Hub, tmp_path: Path) -> None:
    del hub.files[UNET]
    finding = _examine(NAME, tmp_path)
    assert finding.verdict is Verdict.FAIL
    assert UNET in finding.detail


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "HF_TOKEN"), (404, "BASE_MODEL"), (503, "try again later")],
)
def test_a_refusal_of_the_hub_has_a_remedy(
    hub: _Hub, tmp_path: Path, status: int, remedy: str
) -> None:
    hub.status = status
    finding = _examine(NAME, tmp_path, hf_token=TOKEN)
    assert finding.verdict is Verdict.FAIL
    assert str(status) in finding.detail and remedy in finding.remedy


def test_a_renamed_model_is_reported_and_the_token_stays_with_the_first_origin(
    hub: _Hub, tmp_path: Path
) -> None:
    hub.renamed = True
    finding = _examine(NAME, tmp_path, hf_token=TOKEN)
    assert finding.verdict is Verdict.WARN
    assert f"BASE_MODEL={RENAMED}" in finding.remedy
    assert [token for _, token in hub.asked] == [f"Bearer {TOKEN}", None]


def test_without_the_hub_the_way_to_bring_the_model_is_printed(
    hub: _Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    finding = _examine(NAME, tmp_path)
    assert finding.verdict is Verdict.FAIL
    assert f"hf download {NAME}" in finding.remedy
    assert not hub.asked


def test_a_model_on_the_hub_without_a_commit_is_reported_as_not_pinned(
    hub: _Hub, tmp_path: Path
) -> None:
    for revision in (None, "main", "fp16"):
        _, finding = _examine_all(NAME, tmp_path, base_model_revision=revision)
        assert finding.verdict is Verdict.WARN
        assert "BASE_MODEL_REVISION" in finding.remedy
        assert (revision or "no revision is set") in finding.detail
    assert len(_examine_all(NAME, tmp_path, base_model_revision="a" * 40)) == 1
    assert hub.asked


def test_a_folder_needs_no_revision(model: Path) -> None:
    assert len(_examine_all(model)) == 1
