"""Names that are not settings: aliases, names of earlier programs, and misspellings."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping

# Similarity of two words, from 0 to 1, from which one counts as a misspelling of the other.
_ALIKE = 0.75


@dataclasses.dataclass(frozen=True, slots=True)
class OldName:
    """A name of the earlier documents or of a prototype.

    Attributes:
        now: The settings that replaced it; empty if there are none.
        note: Further information.
        ours: Whether no other program uses the name. Then it is also reported if it is in the
            environment.
    """

    now: tuple[str, ...]
    note: str = ""
    ours: bool = True

    def __str__(self) -> str:
        """The successors and the note."""
        replaced = f"now {' and '.join(self.now)}" if self.now else ""
        return "; ".join(filter(None, (replaced, self.note)))


_GOOGLE = "see docs/operations.md, Google Cloud Storage"
_REGION = OldName(("AWS_S3_REGION_NAME",), "the name for boto3 is not read")
_ATTENTION = OldName((), "PyTorch chooses the fastest attention of the GPU", ours=False)
_CONTAINER = OldName((), "read by the container runtime, not by this program", ours=False)
_OTHER_SERVICE = OldName((), "a setting of another service", ours=False)

ALIASES: dict[str, tuple[str, ...]] = {
    "s3_bucket": ("model_bucket_name",),
    "huggingface_token": ("hf_token",),
}
"""Second names of settings, in lower case, accepted everywhere. The first setting that the first
kind of `KINDS` has is meant."""

ALIASES_IN_FILES: dict[str, tuple[str, ...]] = {
    "model_name": ("default_base_model", "base_model"),
    "num_train_epochs": ("epochs",),
    "per_device_train_batch_size": ("batch_size",),
    "lora_r": ("lora_rank",),
}
"""Names of the earlier training container's `config.json`, accepted only in a file of `--config`:
other programs have environment variables of these names."""

OLD_NAMES: dict[str, OldName] = {
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
    "HUGGING_FACE_HUB_TOKEN": OldName(("HF_TOKEN",)),
    "DEFAULT_BASE_MODEL": OldName(("BASE_MODEL",)),
    "COMPILE_FROM_STEPS": OldName((), "has no effect: compilation was removed"),
    "LORA_R": OldName(("LORA_RANK",)),
    "LORA_TARGET_MODULES": OldName(("LORA_TARGET",), "attention, or attention+ff"),
    "NUM_TRAIN_EPOCHS": OldName(("EPOCHS",)),
    "CHECKPOINT_DIR": OldName(("WORK_DIR",), "checkpoints are stored in STATE_BUCKET_NAME"),
    "USE_4BIT": OldName(("LLM_USE_4BIT",), "for language models"),
    "USE_8BIT": OldName(("LLM_USE_8BIT",), "for language models"),
    "MAX_SEQ_LENGTH": OldName(("LLM_MAX_SEQ_LENGTH",), "for language models"),
    "USE_FLASH_ATTENTION": _ATTENTION,
    "LOGGING_STEPS": OldName(("PROGRESS_INTERVAL_SECONDS",), "in seconds", ours=False),
    "NVIDIA_VISIBLE_DEVICES": _CONTAINER,
    "NVIDIA_DRIVER_CAPABILITIES": _CONTAINER,
    "DOCKER_BUILDKIT": _CONTAINER,
    "AI_PROVIDER": _OTHER_SERVICE,
    "ML_TRAINING_URL": _OTHER_SERVICE,
}
"""Names of earlier documents and prototypes. The table in docs/operations.md lists the same."""


def unknown(
    places: Mapping[str, Collection[str]], known: Collection[str], environment: Collection[str]
) -> str | None:
    """A sentence about names that are not settings, or None if there are none.

    Args:
        places: The names in each file, in capitals, by the file's name.
        known: The names of all settings.
        environment: The names in the environment. It is full of other programs' names, so only the
            old names are reported, and only if none of their successors is set.
    """
    found = []
    for place, names in places.items():
        if strangers := sorted(set(names) - set(known)):
            listed = ", ".join(_explained(name, known) for name in strangers)
            found.append(f"unknown settings in {place}: {listed}")
    every_name = set(environment).union(*places.values())
    old = [
        f"{name} ({OLD_NAMES[name]})"
        for name in sorted(set(environment) & set(OLD_NAMES))
        if OLD_NAMES[name].ours and name not in known and not every_name & set(OLD_NAMES[name].now)
    ]
    if old:
        found.append(f"old names in the environment: {', '.join(old)}")
    return "; ".join(found) or None


def _explained(name: str, known: Collection[str]) -> str:
    if name in OLD_NAMES:
        return f"{name} ({OLD_NAMES[name]})"
    near = misspelled(name, known)
    return f"{name} (did you mean {near}?)" if near else name


def misspelled(name: str, known: Collection[str]) -> str | None:
    """The setting of which a name is a misspelling, word by word; None if that is uncertain.

    A name that only ends like a setting gets no suggestion: the suggestion `STATE_BUCKET_NAME` for
    `MEDIA_BUCKET_NAME` could put the job records into a public bucket.
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
