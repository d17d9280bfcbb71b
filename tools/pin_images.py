"""`scripts/pin-images`: pin container images by digest and the base model by commit.

A digest comes from the image's registry: it is the SHA-256 of the manifest that the tag names now,
computed here from the bytes received. The commit comes from the Hugging Face hub. Nothing is
written if one of them cannot be asked.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
import sys
from pathlib import Path

import requests

from utils.settings.values import BASE_MODEL, BASE_MODEL_REVISION

ROOT = Path(__file__).resolve().parent.parent
WITH_IMAGES = ("Dockerfile", "deploy/compose.yaml")
WITH_REVISION = (
    "utils/settings/values.py",
    "Dockerfile",
    ".env.example",
    "docs/protocol.md",
)
RUNBOOK = "docs/operations.md"
NOT_PINNED = "Container images are not pinned by digest yet"
PINNED = "Container images are pinned by digest"
HUB = "https://huggingface.co"
DOCKER_HUB = "registry-1.docker.io"
_IMAGE = re.compile(
    r"^(?P<before># syntax=|ARG (?:FRONT_)?BASE=|\s+image: )"
    r"(?P<name>[a-z0-9./:_-]+):(?P<tag>[\w.-]+)(?P<digest>@sha256:[0-9a-f]{64})?$",
    re.MULTILINE,
)
_OURS = "training-server"
_MANIFESTS = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
_SECONDS = 30.0


class CannotAsk(Exception):
    """A registry or the hub gives no usable answer."""


@dataclasses.dataclass(frozen=True)
class Image:
    """An image that a file names.

    Attributes:
        name: Its repository, with the registry's host unless that is Docker Hub.
        tag: Its tag.
        digest: `sha256:…`, or empty if it is not pinned.
    """

    name: str
    tag: str
    digest: str = ""


def images(text: str) -> list[Image]:
    """The images that a Dockerfile or a compose file names, without those that are built here."""
    return [
        Image(found["name"], found["tag"], (found["digest"] or "").removeprefix("@"))
        for found in _IMAGE.finditer(text)
        if not found["name"].startswith(_OURS)
    ]


def pinned(text: str, digests: dict[tuple[str, str], str]) -> str:
    """The text with the digest of each image behind its tag.

    Args:
        text: A Dockerfile or a compose file.
        digests: By name and tag.
    """

    def replaced(found: re.Match[str]) -> str:
        digest = digests.get((found["name"], found["tag"]))
        whole = found[0].removesuffix(found["digest"] or "")
        return f"{whole}@{digest}" if digest else found[0]

    return _IMAGE.sub(replaced, text)


def digest_of(image: Image) -> str:
    """The digest that the image's tag has in its registry now.

    Raises:
        CannotAsk: The registry cannot be reached, knows no such image, or its answer does not have
            the digest that it announces.
    """
    host, _, path = image.name.partition("/")
    if not path or not ({".", ":"} & set(host) or host == "localhost"):
        host, path = DOCKER_HUB, image.name if path else f"library/{image.name}"
    scheme = "http" if host.partition(":")[0] in ("localhost", "127.0.0.1") else "https"
    url = f"{scheme}://{host}/v2/{path}/manifests/{image.tag}"
    answer = _get(url, {"Accept": _MANIFESTS})
    if answer.status_code == 401:
        token = _token(answer.headers.get("WWW-Authenticate", ""), url)
        answer = _get(url, {"Accept": _MANIFESTS, "Authorization": f"Bearer {token}"})
    if answer.status_code != 200:
        raise CannotAsk(f"{url} answers {answer.status_code}")
    digest = f"sha256:{hashlib.sha256(answer.content).hexdigest()}"
    if answer.headers.get("Docker-Content-Digest", digest) != digest:
        raise CannotAsk(f"{url} sends content that differs from its Docker-Content-Digest")
    return digest


def newest_commit(model: str) -> str:
    """The commit of the model's default branch on the hub.

    Raises:
        CannotAsk: The hub cannot be reached, or its answer names no commit.
    """
    answer = _get(f"{HUB}/api/models/{model}", {})
    commit = answer.json().get("sha") if answer.status_code == 200 else None
    if not re.fullmatch("[0-9a-f]{40}", str(commit)):
        raise CannotAsk(f"{HUB} answers {answer.status_code} and names no commit of {model}")
    return str(commit)


def _token(challenge: str, url: str) -> str:
    asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = asked.pop("realm", "")
    if not realm.startswith(("https://", "http://127.0.0.1:")):
        raise CannotAsk(f"{url} wants a login that this script does not know")
    answer = _get(realm, {}, asked)
    values = answer.json() if answer.status_code == 200 else {}
    token = values.get("token") or values.get("access_token")
    if not token:
        raise CannotAsk(f"{realm} answers {answer.status_code} and gives no token")
    return str(token)


def _get(
    url: str, headers: dict[str, str], query: dict[str, str] | None = None
) -> requests.Response:
    try:
        return requests.get(url, headers=headers, params=query, timeout=_SECONDS)
    except requests.RequestException as error:
        raise CannotAsk(f"{url} cannot be reached ({type(error).__name__})") from error


def changes(root: Path) -> dict[str, str]:
    """The new texts of the files that pin something, by their paths.

    Raises:
        CannotAsk: A digest or the commit cannot be had.
    """
    paths = dict.fromkeys((*WITH_IMAGES, *WITH_REVISION, RUNBOOK))
    old = {path: (root / path).read_text(encoding="utf-8") for path in paths}
    named = {(each.name, each.tag) for path in WITH_IMAGES for each in images(old[path])}
    digests = {pair: digest_of(Image(*pair)) for pair in sorted(named)}
    commit = newest_commit(BASE_MODEL)
    new = {}
    for path, text in old.items():
        if path in WITH_IMAGES:
            text = pinned(text, digests)
        if path in WITH_REVISION:
            text = text.replace(BASE_MODEL_REVISION, commit)
        if path == RUNBOOK:
            text = text.replace(NOT_PINNED, PINNED)
        if text != old[path]:
            new[path] = text
    return new


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write the pins. Exit code 1: with `--check`, something would change; 2: nothing was asked."""
    parser = argparse.ArgumentParser(prog="scripts/pin-images", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only print the changes")
    options = parser.parse_args(arguments)
    try:
        new = changes(root)
    except CannotAsk as error:
        print(f"scripts/pin-images: {error}. Nothing was changed.", file=sys.stderr)
        return 2
    for path, text in new.items():
        print(f"{'would change' if options.check else 'changed'} {path}")
        if not options.check:
            (root / path).write_text(text, encoding="utf-8")
    if not new:
        print("every image and the base model are pinned to what their tags name now")
    return int(options.check and bool(new))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
