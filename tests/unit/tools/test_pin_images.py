"""Images are pinned to the digest that their registry sends, and to no other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tools import pin_images
from tools.pin_images import CannotAsk, Image, digest_of, images, main, newest_commit, pinned
from utils.settings.values import BASE_MODEL, BASE_MODEL_REVISION

ROOT = Path(__file__).parents[3]
COMMIT = "f" * 40
DIGEST = f"sha256:{'a' * 64}"


@dataclasses.dataclass
class _Registry:
    """A registry that requires a token, and a hub, on one port."""

    host: str = ""
    manifest: bytes = b'{"schemaVersion": 2}'
    announced: str = ""
    commit: str = COMMIT

    @property
    def digest(self) -> str:
        """Of the manifest that it sends."""
        return f"sha256:{hashlib.sha256(self.manifest).hexdigest()}"


@pytest.fixture(name="registry")
def _registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Registry]:
    registry = _Registry()

    class Handler(BaseHTTPRequestHandler):
        """Answers as Docker's registry API and the hub's do."""

        def do_GET(self) -> None:  # pylint: disable=invalid-name,missing-function-docstring
            url = urlsplit(self.path)
            if url.path == "/token":
                repository = parse_qs(url.query)["scope"][0]
                self._answer(200, json.dumps({"token": f"for {repository}"}).encode())
            elif url.path.startswith("/api/models/"):
                self._answer(200, json.dumps({"sha": registry.commit}).encode())
            else:
                self._answer_manifest(url.path)

        def _answer_manifest(self, path: str) -> None:
            repository = path.removeprefix("/v2/").partition("/manifests/")[0]
            scope = f"repository:{repository}:pull"
            if self.headers["Authorization"] != f"Bearer for {scope}":
                realm = f'Bearer realm="http://{registry.host}/token",scope="{scope}"'
                self._answer(401, b"", **{"WWW-Authenticate": realm})
            elif not path.endswith("/1.0"):
                self._answer(404, b"")
            else:
                digest = registry.announced or registry.digest
                self._answer(200, registry.manifest, **{"Docker-Content-Digest": digest})

        def _answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:  # pylint: disable=arguments-differ
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        registry.host = f"127.0.0.1:{server.server_port}"
        monkeypatch.setattr(pin_images, "HUB", f"http://{registry.host}")
        yield registry
        server.shutdown()
        thread.join()


@pytest.fixture(name="tree")
def _tree(tmp_path: Path, registry: _Registry) -> Path:
    """A copy of the files that pin something, whose images are in the registry."""
    for path in {*pin_images.WITH_IMAGES, *pin_images.WITH_REVISION, pin_images.RUNBOOK}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    for path in pin_images.WITH_IMAGES:
        text = (tmp_path / path).read_text(encoding="utf-8")
        for image in images(text):
            name = f"{registry.host}/{image.name}:1.0"
            pin = f"@{image.digest}" if image.digest else ""
            text = text.replace(f"{image.name}:{image.tag}{pin}\n", f"{name}\n")
        (tmp_path / path).write_text(text, encoding="utf-8")
    return tmp_path


def test_every_foreign_image_is_found_and_none_of_this_project() -> None:
    dockerfile, compose = ((ROOT / path).read_text("utf-8") for path in pin_images.WITH_IMAGES)
    assert {image.name for image in images(dockerfile)} == {
        *("docker/dockerfile", "nvidia/cuda", "ubuntu"),
    }
    assert len(images(compose)) == compose.count("image: ") - 3
    assert not [image for image in images(compose) if "training-server" in image.name]


def test_the_digest_is_that_of_the_manifest_which_the_registry_sends(registry: _Registry) -> None:
    assert digest_of(Image(f"{registry.host}/owner/name", "1.0")) == registry.digest


def test_a_manifest_that_is_not_what_the_registry_announces_is_refused(
    registry: _Registry,
) -> None:
    registry.announced = DIGEST
    with pytest.raises(CannotAsk, match="differs"):
        digest_of(Image(f"{registry.host}/owner/name", "1.0"))


def test_a_tag_that_the_registry_does_not_have_is_reported(registry: _Registry) -> None:
    with pytest.raises(CannotAsk, match="answers 404"):
        digest_of(Image(f"{registry.host}/owner/name", "2.0"))


def test_an_answer_without_a_commit_is_no_revision(registry: _Registry) -> None:
    assert newest_commit(BASE_MODEL) == COMMIT
    registry.commit = "main"
    with pytest.raises(CannotAsk, match="no commit"):
        newest_commit(BASE_MODEL)


def test_a_digest_is_written_behind_the_tag_and_replaces_an_older_one() -> None:
    text = "ARG BASE=nvidia/cuda:13\n    image: rabbitmq:4\n    image: training-server:local\n"
    once = pinned(text, {("nvidia/cuda", "13"): DIGEST, ("rabbitmq", "4"): DIGEST})
    assert once == (
        f"ARG BASE=nvidia/cuda:13@{DIGEST}\n    image: rabbitmq:4@{DIGEST}\n"
        "    image: training-server:local\n"
    )
    newer = f"sha256:{'b' * 64}"
    assert pinned(once, {("rabbitmq", "4"): newer}).count(newer) == 1
    assert images(once)[1] == Image("rabbitmq", "4", DIGEST)


def test_all_pins_are_written_at_once_and_the_runbook_is_updated(
    tree: Path, registry: _Registry
) -> None:
    assert main(["--check"], tree) == 1
    assert main([], tree) == 0
    for path in pin_images.WITH_IMAGES:
        found = images((tree / path).read_text(encoding="utf-8"))
        assert found and {image.digest for image in found} == {registry.digest}
    for path in pin_images.WITH_REVISION:
        text = (tree / path).read_text(encoding="utf-8")
        assert COMMIT in text and BASE_MODEL_REVISION not in text
    assert pin_images.PINNED in (tree / pin_images.RUNBOOK).read_text(encoding="utf-8")


def test_nothing_is_written_if_one_answer_is_missing(tree: Path, registry: _Registry) -> None:
    registry.commit = ""
    before = {path: path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    assert main([], tree) == 2
    assert before == {path: path.read_bytes() for path in before}


def test_the_runbook_states_whether_the_images_are_pinned() -> None:
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in pin_images.WITH_IMAGES]
    all_pinned = all(image.digest for text in texts for image in images(text))
    runbook = (ROOT / pin_images.RUNBOOK).read_text(encoding="utf-8")
    says = pin_images.PINNED if all_pinned else pin_images.NOT_PINNED
    assert runbook.count(f"{says}") == 1
