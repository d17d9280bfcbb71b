"""Names that are no settings: settings of earlier programs, misspellings, and names of others."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping

_ALIKE = 0.75
"""How alike two words of a name must be to count as one word misspelled."""


@dataclasses.dataclass(frozen=True, slots=True)
class OldName:
    """A name of the earlier documents or of a prototype.

    Attributes:
        now: The settings that replaced it; empty where there is none.
        note: What else to know.
        ours: Whether no other program uses it, so that it is also looked for in the environment.
    """

    now: tuple[str, ...]
    note: str = ""
    ours: bool = True

    def told(self) -> str:
        """What became of it, in a few words."""
        replaced = f"now {' and '.join(self.now)}" if self.now else ""
        return "; ".join(filter(None, (replaced, self.note)))


_GOOGLE = "see docs/operations.md, Google Cloud Storage"
_REGION = OldName(("AWS_S3_REGION_NAME",), "the name for boto3 is not read")
_NO_TEXT_MODELS = OldName((), "for language models, which this server does not train")
_CONTAINER = OldName((), "read by the container runtime, not by this program", ours=False)
_OTHER_SERVICE = OldName((), "a setting of another service", ours=False)

OLD_NAMES: dict[str, OldName] = {
    "S3_BUCKET": OldName(("MODEL_BUCKET_NAME",), "the bucket of the models"),
    "S3_BUCKET_NAME": OldName(("AWS_STORAGE_BUCKET_NAME",)),
    "AWS_S3_BUCKET": OldName(("AWS_STORAGE_BUCKET_NAME",)),
    "AWS_S3_BUCKET_NAME": OldName(("AWS_STORAGE_BUCKET_NAME",)),
    "AWS_BUCKET_NAME": OldName(("AWS_STORAGE_BUCKET_NAME",)),
    "GCS_BUCKET": OldName(("AWS_STORAGE_BUCKET_NAME",), _GOOGLE),
    "GCS_BUCKET_NAME": OldName(("AWS_STORAGE_BUCKET_NAME",), _GOOGLE),
    "GS_BUCKET_NAME": OldName(("AWS_STORAGE_BUCKET_NAME",), _GOOGLE),
    "GS_PROJECT_ID": OldName((), f"an HMAC key is enough, {_GOOGLE}"),
    "GCS_PROJECT_ID": OldName((), f"an HMAC key is enough, {_GOOGLE}"),
    "GOOGLE_APPLICATION_CREDENTIALS": OldName(
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), f"an HMAC key, {_GOOGLE}", ours=False
    ),
    "AWS_KEY": OldName(("AWS_ACCESS_KEY_ID",)),
    "AWS_SECRET": OldName(("AWS_SECRET_ACCESS_KEY",)),
    "AWS_SECURITY_TOKEN": OldName(("AWS_SESSION_TOKEN",)),
    "AWS_REGION": _REGION,
    "AWS_DEFAULT_REGION": _REGION,
    "S3_REGION": OldName(("AWS_S3_REGION_NAME",)),
    "S3_ENDPOINT": OldName(("AWS_ENDPOINT_URL_S3",)),
    "S3_ENDPOINT_URL": OldName(("AWS_ENDPOINT_URL_S3",)),
    "AWS_S3_ENDPOINT_URL": OldName(("AWS_ENDPOINT_URL_S3",)),
    "RABBITMQ_PASSWORD": OldName(("RABBITMQ_PASS",)),
    "RABBITMQ_USERNAME": OldName(("RABBITMQ_USER",)),
    "RABBITMQ_QUEUE": OldName(("TRAINING_QUEUE",)),
    "RABBITMQ_URL": OldName(
        ("RABBITMQ_HOST", "RABBITMQ_PORT", "RABBITMQ_USER", "RABBITMQ_PASS", "RABBITMQ_VHOST"),
        "an address is not taken apart",
    ),
    "BACKEND_URL": OldName(("BACKEND_API_URL",), ours=False),
    "INTERNAL_TOKEN": OldName(("INTERNAL_API_TOKEN",), ours=False),
    "WEBHOOK_SECRET": OldName(("WEBHOOK_SIGNING_SECRET",), ours=False),
    "HUGGINGFACE_TOKEN": OldName(("HF_TOKEN",)),
    "HUGGING_FACE_HUB_TOKEN": OldName(("HF_TOKEN",)),
    "DEFAULT_BASE_MODEL": OldName(("BASE_MODEL",)),
    "COMPILE_FROM_STEPS": OldName((), "has no effect: compilation was removed"),
    "LORA_R": OldName(("LORA_RANK",)),
    "LORA_TARGET_MODULES": OldName(("LORA_TARGET",), "attention, or attention+ff"),
    "NUM_TRAIN_EPOCHS": OldName(("EPOCHS",)),
    "CHECKPOINT_DIR": OldName(("WORK_DIR",), "checkpoints are stored in STATE_BUCKET_NAME"),
    "USE_4BIT": _NO_TEXT_MODELS,
    "USE_8BIT": _NO_TEXT_MODELS,
    "MAX_SEQ_LENGTH": _NO_TEXT_MODELS,
    "NVIDIA_VISIBLE_DEVICES": _CONTAINER,
    "NVIDIA_DRIVER_CAPABILITIES": _CONTAINER,
    "DOCKER_BUILDKIT": _CONTAINER,
    "AI_PROVIDER": _OTHER_SERVICE,
    "ML_TRAINING_URL": _OTHER_SERVICE,
}
"""Names of the earlier documents and of prototypes, with what became of each. The table in
docs/operations.md shows the same."""


def unknown(
    places: Mapping[str, Collection[str]], known: Collection[str], environment: Collection[str]
) -> str | None:
    """A sentence about names that are no settings, or None where there are none.

    Args:
        places: The names that each file has, in capitals, by the file's name.
        known: The names of all settings.
        environment: The names in the environment. It is full of other programs' names, so only old
            names of ours are looked for there, where none of their successors is set.
    """
    told = []
    for place, names in places.items():
        if strangers := sorted(set(names) - set(known)):
            listed = ", ".join(_explained(name, known) for name in strangers)
            told.append(f"unknown settings in {place}: {listed}")
    every_name = set(environment).union(*places.values())
    old = [
        f"{name} ({OLD_NAMES[name].told()})"
        for name in sorted(set(environment) & set(OLD_NAMES))
        if OLD_NAMES[name].ours and not every_name & set(OLD_NAMES[name].now)
    ]
    if old:
        told.append(f"old names in the environment: {', '.join(old)}")
    return "; ".join(told) or None


def _explained(name: str, known: Collection[str]) -> str:
    if name in OLD_NAMES:
        return f"{name} ({OLD_NAMES[name].told()})"
    near = misspelled(name, known)
    return f"{name} (did you mean {near}?)" if near else name


def misspelled(name: str, known: Collection[str]) -> str | None:
    """The setting that a name is a misspelling of, word by word; None where that is a guess.

    A name that only ends like a setting is not suggested: to put a public bucket's name into
    `STATE_BUCKET_NAME` because `MEDIA_BUCKET_NAME` looks like it would publish the job records.
    """
    for near in difflib.get_close_matches(name, known, n=5, cutoff=_ALIKE):
        if near.replace("_", "") == name.replace("_", ""):
            return near
        words, near_words = name.split("_"), near.split("_")
        if len(words) == len(near_words) and all(
            difflib.SequenceMatcher(None, *pair).ratio() >= _ALIKE
            for pair in zip(words, near_words)
        ):
            return near
    return None
