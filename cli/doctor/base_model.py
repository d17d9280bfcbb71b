"""Checks of the base model: a local folder, the hub's cache on this machine, or the hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

from huggingface_hub import (
    HfApi,
    ModelInfo,
    parse_local_safetensors_file_metadata,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    SafetensorsParsingError,
)

from cli.doctor.findings import Finding, fail, ok, warn
from jobs import base_models
from jobs.layout import STYLE
from utils.settings.groups import TrainerSettings
from utils.settings.values import not_pinned

CHECK = "base model"
_HUB_SECONDS = 15.0
_GIB = 1024**3
_UNET = "diffusion_pytorch_model"
# The files that the trainer loads; of each line, one file is enough.
NEEDED: tuple[tuple[str, ...], ...] = (
    ("scheduler/scheduler_config.json",),
    ("tokenizer/vocab.json", "tokenizer/tokenizer.json"),
    ("text_encoder/config.json",),
    ("unet/config.json",),
    ("vae/config.json",),
    ("text_encoder/model.safetensors", "text_encoder/model.safetensors.index.json"),
    (f"unet/{_UNET}.safetensors", f"unet/{_UNET}.safetensors.index.json"),
    (f"vae/{_UNET}.safetensors", f"vae/{_UNET}.safetensors.index.json"),
)


def examine(
    settings: TrainerSettings, environment: Mapping[str, str], kinds: Sequence[str] = (STYLE,)
) -> Iterator[Finding]:
    """Judge BASE_MODEL as the trainer does: as a local folder, else as a model of the hub.

    Args:
        settings: The base model and its revision.
        environment: The trainer process's environment.
        kinds: The kinds that the worker takes; only styles use BASE_MODEL.
    """
    if STYLE not in kinds:
        yield ok(CHECK, "BASE_MODEL is not used: KINDS has no style.")
        return
    name = settings.base_model
    folder = Path(name).expanduser()
    if folder.is_dir():
        yield _local(folder)
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        remedy = "Set BASE_MODEL to a diffusers folder, or to owner/name of a model on the hub."
        yield fail(CHECK, f"{name} is no folder on this machine.", remedy)
    else:
        yield _of_the_hub(settings, environment)
    if reason := not_pinned(name, settings.base_model_revision):
        remedy = "Set BASE_MODEL_REVISION to the commit that the hub shows for the model."
        yield warn(CHECK, reason, remedy)


def _local(folder: Path) -> Finding:
    if reason := base_models.unsuitable(folder):
        return _of_another_family(f"The folder {folder}", reason)
    size, problems = _examine_folder(folder)
    if not problems:
        return ok(CHECK, f"The folder {folder} is complete ({size / _GIB:.1f} GiB).")
    return fail(
        CHECK,
        f"The folder {folder} is not complete: {'; '.join(problems[:5])}.",
        "Download the model again: a whole diffusers folder of Stable Diffusion 1.5 with "
        "safetensors weights, not only an fp16 variant.",
    )


def _of_another_family(model: str, reason: str) -> Finding:
    return fail(
        CHECK,
        f"{model} {reason}.",
        "Set BASE_MODEL to a diffusers folder, or to a model on the hub, of Stable Diffusion 1.5.",
    )


def _of_the_hub(settings: TrainerSettings, environment: Mapping[str, str]) -> Finding:
    name = settings.base_model
    cache = _cache(environment)
    here = f"{name} is not in {cache}"
    if snapshot := _snapshot(name, settings.base_model_revision, cache):
        if reason := base_models.unsuitable(snapshot):
            return _of_another_family(name, reason)
        size, problems = _examine_folder(snapshot)
        if not problems:
            return ok(CHECK, f"{name} is complete in {cache} ({size / _GIB:.1f} GiB).")
        here = f"{name} is only partly in {cache}"
    return _on_the_hub(settings, environment, cache, here)


def _on_the_hub(
    settings: TrainerSettings, environment: Mapping[str, str], cache: Path, here: str
) -> Finding:
    """The finding about a model that the trainer has to download."""
    name = settings.base_model
    without_hub = (
        f"Without the hub: run `hf download {name} --local-dir FOLDER` on a machine that can reach "
        "it, copy the folder here, and set BASE_MODEL to it."
    )
    switches = (environment.get(each, "") for each in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if any(switch.upper() in ("1", "ON", "YES", "TRUE") for switch in switches):
        return fail(CHECK, f"{here}, and HF_HUB_OFFLINE forbids the download.", without_hub)
    endpoint = environment.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        info = HfApi(endpoint, _token(settings)).model_info(
            name,
            revision=settings.base_model_revision,
            files_metadata=True,
            timeout=_HUB_SECONDS,
        )
    except HfHubHTTPError as error:
        status = error.response.status_code
        return fail(CHECK, f"{here}, and {endpoint} answers {status}.", _hub_remedy(status))
    except Exception as error:  # pylint: disable=broad-exception-caught  # of httpx, JSON, sockets
        return fail(CHECK, f"{here}, and {endpoint} cannot be reached ({error}).", without_hub)
    return _offered(info, name, here, cache)


def _offered(info: ModelInfo, name: str, here: str, cache: Path) -> Finding:
    """The finding about a model that the hub has."""
    if reason := base_models.of_another_family(_pipeline(info)):
        return _of_another_family(name, reason)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if lacking := _missing(sizes):
        remedy = "Choose a diffusers model of Stable Diffusion 1.5 with safetensors weights."
        return fail(CHECK, f"{here}, and on the hub it lacks {', '.join(lacking)}.", remedy)
    if info.id != name:
        return warn(CHECK, f"{here}. The hub calls it {info.id} now.", f"Set BASE_MODEL={info.id}.")
    return _download(here, sizes, cache)


def _pipeline(info: ModelInfo) -> str | None:
    """The pipeline's class by the hub, which reads it from the model's model_index.json."""
    about = (info.config or {}).get("diffusers")
    found = about.get("_class_name") if isinstance(about, dict) else None
    return found if isinstance(found, str) else None


def _snapshot(name: str, revision: str | None, cache: Path) -> Path | None:
    try:
        return Path(
            snapshot_download(name, revision=revision, cache_dir=cache, local_files_only=True)
        )
    except IncompleteSnapshotError as error:  # the trainer needs only some of the files
        return Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        return None


def _token(settings: TrainerSettings) -> str | bool:
    """False: no token of a file in the home folder either."""
    return settings.hf_token.get_secret_value() if settings.hf_token else False


def _download(here: str, sizes: Mapping[str, int], cache: Path) -> Finding:
    loaded = re.compile(r"(scheduler|text_encoder|tokenizer|unet|vae)/.*\.(safetensors|json|txt)")
    variant = re.compile(r"\.(fp16|non_ema)\.")
    size = sum(
        size for name, size in sizes.items() if loaded.fullmatch(name) and not variant.search(name)
    )
    free = shutil.disk_usage(next(each for each in (cache, *cache.parents) if each.is_dir())).free
    detail = (
        f"{here}. The worker downloads it at start ({size / _GIB:.1f} GiB; "
        f"{free / _GIB:.1f} GiB are free)."
    )
    if free < size * 1.1:
        return fail(CHECK, detail, "Free space, or set HF_HOME to a larger disk.")
    return warn(CHECK, detail, "Put HF_HOME on a persistent volume, to download it only once.")


def _hub_remedy(status: int) -> str:
    if status in (401, 403, 404):
        return (
            "Check BASE_MODEL and BASE_MODEL_REVISION. A private or gated model needs an HF_TOKEN "
            "of an account that has accepted its terms."
        )
    return "The hub, or a proxy in front of it, has a problem: try again later."


def _cache(environment: Mapping[str, str]) -> Path:
    """The folder of huggingface_hub's cache, by the rules of its `constants.py`.

    Its own constants are read from this process's environment, not from the trainer's.
    """
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    base = Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(environment.get("HF_HOME") or base).expanduser() / "hub"


def _missing(names: Container[str]) -> list[str]:
    """The files that the trainer needs and that are not among these names."""
    return [choice[0] for choice in NEEDED if not any(name in names for name in choice)]


def _examine_folder(folder: Path) -> tuple[int, list[str]]:
    """The size in bytes of a model's weights, and the problems of the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]  # no broken links
    names = {path.relative_to(folder).as_posix(): path for path in files}
    problems = [f"{name} is missing" for name in _missing(names)]
    size = 0
    for choice in NEEDED:
        weights = next((names[name] for name in choice if name in names), None)
        for path in _weights(weights) if weights else ():
            if problem := _damage(path):
                problems.append(f"{path.relative_to(folder).as_posix()} {problem}")
            size += path.stat().st_size if path.is_file() else 0
    return size, problems


def _weights(path: Path) -> list[Path]:
    """The safetensors files of a file that is one, or that is an index of several."""
    if not path.name.endswith(".index.json"):
        return [path] if path.suffix == ".safetensors" else []
    try:
        parts = set(json.loads(path.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return [path.with_suffix("").with_suffix("")]  # reported under the name of the whole file
    return [path.parent / str(part) for part in sorted(parts, key=str)]


def _damage(path: Path) -> str:
    """The problem of a safetensors file, by its header and its size; empty if there is none."""
    try:
        tensors = parse_local_safetensors_file_metadata(path).tensors.values()
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        end = 8 + header + max((int(each.data_offsets[1]) for each in tensors), default=0)
    except (OSError, SafetensorsParsingError, AttributeError, TypeError, ValueError):
        return "is not a valid safetensors file"
    return "is truncated" if path.stat().st_size < end else ""
