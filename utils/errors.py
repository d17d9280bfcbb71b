"""Every error that the training server raises on purpose, as a tree.

    TrainingServerError
    ├── ConfigurationError            the settings are wrong; nothing can start
    ├── InvalidMessage                a message that can never become a job
    │   └── UnknownType               a message of a type that this worker does not serve
    ├── JobError                      a job that ends in `failed`
    │   ├── ImageDownloadFailed       too few images could be fetched
    │   ├── TrainingDataUnavailable   a file of training data could not be fetched
    │   ├── LowQualityData            too few of the fetched images are usable
    │   ├── BaseModelUnavailable      the base model could not be loaded
    │   │   └── BaseModelGated        the hub wants a token with access to it
    │   ├── GpuOutOfMemory
    │   ├── TrainingDiverged
    │   ├── TrainingFailed            training failed for a reason that has no other class
    │   │   └── CheckpointUnusable    damaged, or of another run: try an older one
    │   ├── TimeLimit
    │   ├── JobTooLarge               it needs more disk space than the workers have
    │   ├── ExportFailed              the written files do not give the trained weights
    │   ├── WorkerCrashed             the trainer process died
    │   └── Cancelled
    ├── MachineError                  this machine is unfit; the job is not at fault
    │   ├── GpuBroken
    │   ├── WrongBaseModel            BASE_MODEL names a model of another family
    │   ├── DiskFull
    │   └── NoRoomForJob              the job needs more disk than is free; the worker continues
    ├── StorageError                  S3
    │   ├── ObjectNotFound
    │   ├── AccessDenied
    │   ├── ObjectTooLarge
    │   ├── DamagedRecord             a record that cannot be read; waiting does not help
    │   ├── NewerRecord               a record that a newer worker wrote
    │   └── PreconditionFailed        a conditional write found another version
    ├── BrokerError                   RabbitMQ
    │   ├── BrokerRefused             waiting does not help: credentials, conflicting queues
    │   └── PublicationRefused        the broker does not take one message; the connection may work
    └── Stopped                       no fault: a stop of the run was requested, with a reason
        └── LeaseLost                 another worker has the job now

A class's docstring is its default message. `CODES` is the one table of the error code for the
backend and of whether a retry can help.
"""

from __future__ import annotations

import enum
import inspect


class ErrorCode(enum.StrEnum):
    """The `error_code` of a `failed` webhook and of the dead queue's `x-error-code`."""

    INVALID_MESSAGE = "INVALID_MESSAGE"
    UNKNOWN_TYPE = "UNKNOWN_TYPE"
    IMAGE_DOWNLOAD_FAILED = "IMAGE_DOWNLOAD_FAILED"
    LOW_QUALITY_DATA = "LOW_QUALITY_DATA"
    BASE_MODEL_UNAVAILABLE = "BASE_MODEL_UNAVAILABLE"
    BASE_MODEL_GATED = "BASE_MODEL_GATED"
    TRAINING_DATA_UNAVAILABLE = "TRAINING_DATA_UNAVAILABLE"
    GPU_OOM = "GPU_OOM"
    TRAINING_DIVERGED = "TRAINING_DIVERGED"
    TRAINING_FAILED = "TRAINING_FAILED"
    TIME_LIMIT = "TIME_LIMIT"
    JOB_TOO_LARGE = "JOB_TOO_LARGE"
    EXPORT_FAILED = "EXPORT_FAILED"
    STORAGE_FAILED = "STORAGE_FAILED"
    WORKER_CRASHED = "WORKER_CRASHED"
    CANCELLED = "CANCELLED"
    WEBHOOK_REJECTED = "WEBHOOK_REJECTED"
    PUBLICATION_REFUSED = "PUBLICATION_REFUSED"


class StopReason(enum.StrEnum):
    """The reason for a stop of a run."""

    CANCELLED = "cancelled"
    SHUTDOWN = "shutdown"
    PAUSED = "paused"
    LEASE_LOST = "lease_lost"
    TIME_LIMIT = "time_limit"


class TrainingServerError(Exception):
    """The training server failed. The log of the worker has the details."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.cleandoc(type(self).__doc__ or "").splitlines()[0])


class ConfigurationError(TrainingServerError):
    """The settings are wrong. Run `main.py doctor` for the problems and their remedies."""


class InvalidMessage(TrainingServerError):
    """The message cannot become a job. Compare it with docs/protocol.md, section 2.

    Attributes:
        field: The field that is wrong, in the message's own spelling (`data.parameters.seed`), or
            `body`.
        task_id: The task's id, if it could be read.
        kind: The kind of job.
        subject: The subject of the order if it could be read, by its kind; then the
            backend gets a `failed` webhook.
        webhook_url: The message's webhook address, if it could be read; not checked.
    """

    def __init__(
        self,
        message: str | None = None,
        *,
        field: str = "body",
        task_id: str | None = None,
        kind: str = "",
        subject: str | None = None,
        webhook_url: str | None = None,
    ) -> None:
        super().__init__(message)
        self.field = field
        self.task_id = task_id
        self.kind = kind
        self.subject = subject
        self.webhook_url = webhook_url


class UnknownType(InvalidMessage):
    """The message's type is none that this worker serves. The setting KINDS names the kinds."""


class JobError(TrainingServerError):
    """The job failed."""


class ImageDownloadFailed(JobError):
    """Too few images could be downloaded."""


class LowQualityData(JobError):
    """Too few of the images can be used for training."""


class BaseModelUnavailable(JobError):
    """The base model could not be loaded."""


class BaseModelGated(BaseModelUnavailable):
    """The base model is gated, and the token has no access to it."""


class TrainingDataUnavailable(JobError):
    """A file of training data could not be fetched."""


class GpuOutOfMemory(JobError):
    """The GPU ran out of memory."""


class TrainingDiverged(JobError):
    """Training diverged: the loss was not a finite number too often."""


class TrainingFailed(JobError):
    """Training failed."""


class CheckpointUnusable(TrainingFailed):
    """The checkpoint cannot be used to resume training."""


class TimeLimit(JobError):
    """The job exceeded its time limit (MAX_JOB_SECONDS)."""


class JobTooLarge(JobError):
    """The job needs more disk space than the workers have."""


class ExportFailed(JobError):
    """The exported model does not reproduce the trained weights."""


class WorkerCrashed(JobError):
    """The trainer process died."""


class Cancelled(JobError):
    """The job was cancelled."""


class MachineError(TrainingServerError):
    """This machine cannot train now."""


class GpuBroken(MachineError):
    """The GPU does not compute any more."""


class WrongBaseModel(MachineError):
    """BASE_MODEL names a model that this worker cannot train."""


class DiskFull(MachineError):
    """The worker's disk is full."""


class NoRoomForJob(MachineError):
    """The job needs more disk space than is free on this machine."""


class StorageError(TrainingServerError):
    """S3 could not be used."""


class ObjectNotFound(StorageError):
    """The object does not exist."""


class AccessDenied(StorageError):
    """S3 refuses access."""


class ObjectTooLarge(StorageError):
    """The object is larger than allowed."""


class DamagedRecord(StorageError):
    """The record is damaged."""


class NewerRecord(StorageError):
    """A newer worker wrote the record. Update this worker."""


class PreconditionFailed(StorageError):
    """The object was changed by another program."""


class BrokerError(TrainingServerError):
    """RabbitMQ could not be used."""


class BrokerRefused(BrokerError):
    """RabbitMQ refuses this worker, and waiting does not help."""


class Refusal(enum.StrEnum):
    """The reason why a publication was not accepted."""

    FORM = "form"
    """Its headers or its size: the broker or the client refuses the message itself."""
    ROUTE = "route"
    """Its queue does not exist."""
    FULL = "full"
    """Its queue takes no message at the moment."""
    LOST = "lost"
    """The broker closed the connection or the channel, or the network did."""
    UNANSWERED = "unanswered"
    """The broker did not confirm it in time."""


class PublicationRefused(BrokerError):
    """RabbitMQ does not accept this message.

    Attributes:
        refusal: The reason.
    """

    def __init__(self, message: str | None = None, refusal: Refusal = Refusal.LOST) -> None:
        super().__init__(message)
        self.refusal = refusal


class Stopped(TrainingServerError):
    """A stop of the run was requested."""

    def __init__(self, reason: StopReason, message: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason


class LeaseLost(Stopped):
    """Another worker has the job now."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(StopReason.LEASE_LOST, message)


# class -> (the error code for the backend, whether another attempt can help)
CODES: dict[type[TrainingServerError], tuple[ErrorCode, bool]] = {
    InvalidMessage: (ErrorCode.INVALID_MESSAGE, False),
    UnknownType: (ErrorCode.UNKNOWN_TYPE, False),
    ImageDownloadFailed: (ErrorCode.IMAGE_DOWNLOAD_FAILED, False),
    LowQualityData: (ErrorCode.LOW_QUALITY_DATA, False),
    TrainingDataUnavailable: (ErrorCode.TRAINING_DATA_UNAVAILABLE, False),
    BaseModelUnavailable: (ErrorCode.BASE_MODEL_UNAVAILABLE, True),
    BaseModelGated: (ErrorCode.BASE_MODEL_GATED, False),
    GpuOutOfMemory: (ErrorCode.GPU_OOM, False),
    TrainingDiverged: (ErrorCode.TRAINING_DIVERGED, False),
    TrainingFailed: (ErrorCode.TRAINING_FAILED, False),
    TimeLimit: (ErrorCode.TIME_LIMIT, False),
    JobTooLarge: (ErrorCode.JOB_TOO_LARGE, False),
    ExportFailed: (ErrorCode.EXPORT_FAILED, False),
    WorkerCrashed: (ErrorCode.WORKER_CRASHED, True),
    Cancelled: (ErrorCode.CANCELLED, False),
    MachineError: (ErrorCode.WORKER_CRASHED, True),
    StorageError: (ErrorCode.STORAGE_FAILED, True),
    # A missing or forbidden object is retried like any problem of S3: a whole bucket can be missing
    # or forbidden until an operator corrects a policy. An object's size does not change.
    ObjectTooLarge: (ErrorCode.STORAGE_FAILED, False),
}


def code_of(error: BaseException) -> ErrorCode:
    """The code for the backend: the nearest ancestor in `CODES`, else `TRAINING_FAILED`."""
    return _entry(error)[0]


def is_retryable(error: BaseException) -> bool:
    """Whether another attempt at the same job can help."""
    return _entry(error)[1]


def _entry(error: BaseException) -> tuple[ErrorCode, bool]:
    for ancestor in type(error).__mro__:
        if ancestor in CODES:
            return CODES[ancestor]
    return CODES[TrainingFailed]


# The errors that the trainer process may report, by class name: the pipe carries the name, never an
# object.
REPORTABLE: dict[str, type[TrainingServerError]] = {
    cls.__name__: cls
    for cls in (
        ImageDownloadFailed,
        LowQualityData,
        BaseModelUnavailable,
        BaseModelGated,
        TrainingDataUnavailable,
        GpuOutOfMemory,
        TrainingDiverged,
        TrainingFailed,
        CheckpointUnusable,
        TimeLimit,
        ExportFailed,
        WorkerCrashed,
        GpuBroken,
        WrongBaseModel,
        DiskFull,
    )
}
