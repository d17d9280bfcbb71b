"""The base model: on this machine and whole, or to be had from the Hugging Face hub?"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli.doctor.findings import Finding, fail, ok, warn
from cli.doctor.model_files import examine_folder, missing
from config import Settings
from utils.settings.values import not_pinned

CHECK = "base model"
_HUB_SECONDS = 15.0
_LARGEST_ANSWER = 16 * 1024**2
_GIB = 1024**3
_OFFLINE = (
    "without the hub: download the model on a machine that has it (hf download {name} --local-dir "
    "FOLDER), bring the folder here, and set BASE_MODEL to it"
)


def examine(settings: Settings) -> list[Finding]:
    """Judge BASE_MODEL as the trainer will: a local folder, the hub's cache, the hub."""
    findings = _files(settings)
    if reason := not_pinned(settings.base_model, settings.base_model_revision):
        remedy = "set BASE_MODEL_REVISION to the commit that the hub shows for the model"
        findings.append(warn(CHECK, reason, remedy))
    return findings


def _files(settings: Settings) -> list[Finding]:
    name = settings.base_model
    folder = Path(name).expanduser()
    if folder.is_dir():
        return [_local(folder, f"the folder {folder}")]
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        remedy = "BASE_MODEL must name a diffusers folder, or a model on the hub as owner/name"
        return [fail(CHECK, f"{name} is no folder on this machine", remedy)]
    environment = settings.trainer_environment()
    hub = _hub_cache(environment)
    snapshot = _snapshot(hub, name, settings.base_model_revision or "main")
    if snapshot is not None:
        size, problems = examine_folder(snapshot)
        if not problems:
            return [ok(CHECK, f"{name} lies whole in {hub} ({size / _GIB:.1f} GiB)")]
    return [_from_the_hub(settings, environment, hub, partly=snapshot is not None)]


def _local(folder: Path, what: str) -> Finding:
    size, problems = examine_folder(folder)
    if problems:
        return fail(
            CHECK,
            f"{what} is not whole: {'; '.join(problems[:5])}",
            "it must be a whole diffusers folder of Stable Diffusion 1.5 with safetensors weights "
            "(no fp16 variant alone): download it anew",
        )
    return ok(CHECK, f"{what} is whole ({size / _GIB:.1f} GiB)")


def _hub_cache(environment: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps models, by its own rules (its `constants.py`)."""
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := environment.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def _snapshot(hub: Path, name: str, revision: str) -> Path | None:
    """The folder of a revision in the cache: `refs` names the commit, `snapshots` holds it."""
    repository = hub / f"models--{name.replace('/', '--')}"
    commit = revision
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        try:
            commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
        except OSError:
            return None
    folder = repository / "snapshots" / commit
    return folder if folder.is_dir() else None


def _from_the_hub(
    settings: Settings, environment: Mapping[str, str], hub: Path, *, partly: bool
) -> Finding:
    name = settings.base_model
    here = "is only partly" if partly else "is not"
    here = f"{name} {here} in {hub}"
    offline = _OFFLINE.format(name=name)
    if any(
        environment.get(switch, "").upper() in ("1", "ON", "YES", "TRUE")
        for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        return fail(CHECK, f"{here}, and HF_HUB_OFFLINE keeps it from being fetched", offline)
    endpoint = environment.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        sizes = _sizes_on_the_hub(settings, endpoint)
    except urllib.error.HTTPError as error:
        with error:
            return fail(CHECK, f"{here}; {endpoint} answers {error.code}", _hub_remedy(error.code))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return fail(CHECK, f"{here}, and {endpoint} cannot be reached ({reason})", offline)
    if lacking := missing(sizes):
        return fail(
            CHECK,
            f"{here}, and on the hub it lacks {', '.join(lacking)}",
            "choose a diffusers model of Stable Diffusion 1.5 with safetensors weights",
        )
    return _download(here, sizes, hub)


def _download(here: str, sizes: Mapping[str, int], hub: Path) -> Finding:
    size = sum(
        count
        for name, count in sizes.items()
        if name.endswith((".safetensors", ".json", ".txt"))
        and name.startswith(("scheduler/", "text_encoder/", "tokenizer/", "unet/", "vae/"))
        and not re.search(r"\.(fp16|non_ema)\.", name)
    )
    parent = next(folder for folder in (hub, *hub.parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    detail = (
        f"{here}; the hub has it ({size / _GIB:.1f} GiB, {free / _GIB:.1f} GiB free): the worker "
        "fetches it when it starts"
    )
    if free < size * 1.1:
        return fail(CHECK, detail, "make room, or set HF_HOME to a larger disk")
    return warn(CHECK, detail, "put HF_HOME on a volume that stays, so that it is fetched once")


def _sizes_on_the_hub(settings: Settings, endpoint: str) -> dict[str, int]:
    """The model's files on the hub, with their sizes in bytes."""
    path = f"/api/models/{urllib.parse.quote(settings.base_model)}"
    if settings.base_model_revision:
        path += f"/revision/{urllib.parse.quote(settings.base_model_revision, safe='')}"
    request = urllib.request.Request(f"{endpoint}{path}?blobs=true")
    if settings.hf_token:
        request.add_header("Authorization", f"Bearer {settings.hf_token.get_secret_value()}")
    opener = urllib.request.build_opener(_StayHere())
    with opener.open(request, timeout=_HUB_SECONDS) as answer:
        values: Any = json.loads(answer.read(_LARGEST_ANSWER))
    try:
        return {file["rfilename"]: int(file.get("size") or 0) for file in values["siblings"]}
    except (KeyError, TypeError) as error:
        raise ValueError("the answer is not the hub's") from error


class _StayHere(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the token would go along."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """None makes an error of it."""


def _hub_remedy(status: int) -> str:
    if status in (401, 403, 404):
        return (
            "check BASE_MODEL and BASE_MODEL_REVISION; a private or gated model needs an HF_TOKEN "
            "whose owner has accepted its terms"
        )
    if 300 <= status < 400:
        return "the model was renamed: put its present name into BASE_MODEL"
    return "the hub, or a proxy before it, is in trouble: try again later"
