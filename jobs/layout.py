"""Every S3 key and every published file name.

    images' bucket training/{style_id}/{task_id}/             images that `main.py publish` uploads
    state bucket   jobs/{task_id}.json, .cancel, .pause, .settled   the record and its marks
                   jobs/invalid/{id}.json                     the record of an invalid message
                   orders/{task_id}.json                      an order that the API accepted
                   jobs/live/{task_id}                        index of the unsettled records
                   jobs/inventory                             the last inventory of all records
                   jobs/{place}.turn                          the publisher of a folder
                   checkpoints/{place}/{task_id}/             checkpoints and curves
                   staging/{task_id}/{claim}/                 a model that is about to be published
                   archive/{place}/{task_id}/                 models that were replaced
                   previews/{task_id}/{claim}/{step}/{n}.webp small samples of each checkpoint
    model bucket   models/{place}/                            the published model

`{place}` is `style_{style_id}` for a style. Every other kind has a folder per job:
`{kind}/{subject}/{task_id}` for models, and `{kind}` for checkpoints.
"""

from __future__ import annotations

import dataclasses

from jobs.addresses import S3Location

STYLE = "style"
"""The first kind. Its keys, its queue and its records are older than kinds."""

RECORDS = "jobs/"
LIVE = RECORDS + "live/"
INVENTORY = RECORDS + "inventory"
RECORD_SUFFIX = ".json"
SETTLED_SUFFIX = ".settled"
CANCEL_SUFFIX = ".cancel"
PAUSE_SUFFIX = ".pause"
ORDERS = "orders/"
"""Orders that the API server has accepted, from which it restores jobs that its database lost."""
INVALID_PREFIX = "invalid/"
UPLOADS = "training/"
MODELS = "models/"
CHECKPOINTS = "checkpoints/"
STAGING = "staging/"
ARCHIVE = "archive/"
PREVIEWS = "previews/"
PREVIEW_FOLDER = "previews"
"""Folder of the small samples in a run's work folder: `{step}/{n}.webp`."""
PREVIEW_SUFFIX = ".webp"

# Files of a style's model. Published names are part of the protocol.
WEIGHTS = "lora_weights.safetensors"
KOHYA_WEIGHTS = "lora_weights_kohya.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
REPORT = "training_report.json"
HTML_REPORT = "training_report.html"
SAMPLES = "samples.png"
LOSS_CURVE = "loss_curve.png"
MODEL_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, KOHYA_WEIGHTS, WEIGHTS)
"""The model of a style, in each of its formats."""
STYLE_FILES = (*(REPORT, HTML_REPORT, LOSS_CURVE, SAMPLES), *MODEL_FILES)
"""All files of a published style, in the order of their upload. The last one is the signal that the
others are in place."""
CHECKPOINT_WEIGHTS = "lora.safetensors"
"""The trained weights in a checkpoint of any kind (see `training.runtime.checkpoint`). An old
checkpoint, and one of a completed job, keeps only this file."""
CURVES = "tensorboard"
"""Folder of the event files, in a run's work folder and among its checkpoints."""


def record_at(bucket: str, task_id: str) -> S3Location:
    """Location of a job's record."""
    return S3Location(bucket, f"{RECORDS}{task_id}{RECORD_SUFFIX}")


def cancel_file_at(bucket: str, task_id: str) -> S3Location:
    """Location of the file that cancels a job."""
    return S3Location(bucket, f"{RECORDS}{task_id}{CANCEL_SUFFIX}")


def pause_file_at(bucket: str, task_id: str) -> S3Location:
    """Location of the file that pauses a job."""
    return S3Location(bucket, f"{RECORDS}{task_id}{PAUSE_SUFFIX}")


def order_at(bucket: str, task_id: str) -> S3Location:
    """Location of the order that the API server accepted for a job."""
    return S3Location(bucket, f"{ORDERS}{task_id}{RECORD_SUFFIX}")


def live_mark_at(bucket: str, task_id: str) -> S3Location:
    """Location of the empty object that marks a record as unsettled."""
    return S3Location(bucket, LIVE + task_id)


def settled_mark_at(bucket: str, task_id: str) -> S3Location:
    """Location of the empty object that marks a record as settled."""
    return S3Location(bucket, f"{RECORDS}{task_id}{SETTLED_SUFFIX}")


def staging_of(task_id: str, claim: int | None = None) -> str:
    """Key prefix of the staged files of a job, or of one claim on it."""
    return f"{STAGING}{task_id}/" + ("" if claim is None else f"{claim}/")


def previews_of(task_id: str) -> str:
    """Key prefix of the small samples of a job."""
    return f"{PREVIEWS}{task_id}/"


def preview_at(bucket: str, task_id: str, claim: int, step: int, number: int) -> S3Location:
    """Location of one small sample: of a claim, after a step, of a prompt; all are numbers."""
    name = f"{claim}/{step}/{number}{PREVIEW_SUFFIX}"
    return S3Location(bucket, previews_of(task_id) + name)


def uploads_of(subject: str, task_id: str) -> str:
    """Key prefix of the inputs that a command uploads for a job."""
    return f"{UPLOADS}{subject}/{task_id}/"


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Key prefixes and keys of one job's results.

    Attributes:
        models: Folder of the published model, in the model bucket.
        archive: Folder of the models that the folder had before, in the state bucket.
        turn: Key of the record of the folder's publisher.
        checkpoints: Folder of the job's checkpoints, in the state bucket.
    """

    models: str
    archive: str
    turn: str
    checkpoints: str

    @property
    def curves(self) -> str:
        """Folder of the job's curves."""
        return f"{self.checkpoints}{CURVES}/"


def jobs_folders_of(kind: str, subject: str) -> tuple[str, ...]:
    """Key prefixes, in the state bucket, that are followed by the ids of a subject's jobs."""
    if kind == STYLE:
        return (f"{CHECKPOINTS}style_{subject}/", f"{ARCHIVE}style_{subject}/")
    return (f"{ARCHIVE}{kind}/{subject}/",)


def queue_suffix_of(kind: str) -> str:
    """The part of a queue's name that follows `TRAINING_QUEUE`; none for the first kind."""
    return "" if kind == STYLE else f".{kind}"


def place_of(kind: str, subject: str, task_id: str) -> Place:
    """The place of a job.

    Args:
        kind: The kind of the job.
        subject: The subject; for a style its id.
        task_id: The job.
    """
    if kind == STYLE:
        style = f"style_{subject}"
        return Place(
            models=f"{MODELS}{style}/",
            archive=f"{ARCHIVE}{style}/",
            turn=f"{RECORDS}{style}.turn",
            checkpoints=f"{CHECKPOINTS}{style}/{task_id}/",
        )
    own = f"{kind}/{subject}/{task_id}"
    return Place(
        models=f"{MODELS}{own}/",
        archive=f"{ARCHIVE}{own}/",
        turn=f"{RECORDS}{own}.turn",
        checkpoints=f"{CHECKPOINTS}{kind}/{task_id}/",
    )
