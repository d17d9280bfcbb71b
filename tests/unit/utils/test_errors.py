"""The error classes: the drawn tree is true, and every class has a code and a sentence."""

from __future__ import annotations

import inspect
import re

import pytest

from utils import errors
from utils.errors import (
    CODES,
    REPORTABLE,
    BrokerError,
    ConfigurationError,
    ErrorCode,
    InvalidMessage,
    LeaseLost,
    Stopped,
    StopReason,
    TrainingFailed,
    TrainingServerError,
    UnknownType,
    code_of,
    is_retryable,
)

# These never become a job's ending, so they need no separate code.
NEVER_TOLD = (ConfigurationError, BrokerError, Stopped)

FAMILY = [
    cls
    for cls in vars(errors).values()
    if inspect.isclass(cls) and issubclass(cls, TrainingServerError)
]

# The codes of docs/protocol.md, section 3, and whether a retry can help.
TABLE = {
    "InvalidMessage": ("INVALID_MESSAGE", False),
    "UnknownType": ("UNKNOWN_TYPE", False),
    "ImageDownloadFailed": ("IMAGE_DOWNLOAD_FAILED", False),
    "LowQualityData": ("LOW_QUALITY_DATA", False),
    "BaseModelUnavailable": ("BASE_MODEL_UNAVAILABLE", True),
    "BaseModelGated": ("BASE_MODEL_GATED", False),
    "TrainingDataUnavailable": ("TRAINING_DATA_UNAVAILABLE", False),
    "GpuOutOfMemory": ("GPU_OOM", False),
    "TrainingDiverged": ("TRAINING_DIVERGED", False),
    "TrainingFailed": ("TRAINING_FAILED", False),
    "CheckpointUnusable": ("TRAINING_FAILED", False),
    "TimeLimit": ("TIME_LIMIT", False),
    "JobTooLarge": ("JOB_TOO_LARGE", False),
    "ExportFailed": ("EXPORT_FAILED", False),
    "WorkerCrashed": ("WORKER_CRASHED", True),
    "Cancelled": ("CANCELLED", False),
    "MachineError": ("WORKER_CRASHED", True),
    "GpuBroken": ("WORKER_CRASHED", True),
    "WrongBaseModel": ("WORKER_CRASHED", True),
    "DiskFull": ("WORKER_CRASHED", True),
    "NoRoomForJob": ("WORKER_CRASHED", True),
    "StorageError": ("STORAGE_FAILED", True),
    "ObjectNotFound": ("STORAGE_FAILED", True),
    "AccessDenied": ("STORAGE_FAILED", True),
    "ObjectTooLarge": ("STORAGE_FAILED", False),
    "DamagedRecord": ("STORAGE_FAILED", True),
    "NewerRecord": ("STORAGE_FAILED", True),
    "PreconditionFailed": ("STORAGE_FAILED", True),
}


def drawn() -> dict[str, str]:
    """The tree of the module's docstring: class to parent, by their names."""
    parents: dict[str, str] = {}
    line_of_descent: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^    ((?:│   |    )*)(?:[├└]── )?([A-Z]\w+)(?:\s\s|$)", line)
        if not match or ("──" not in line and match[2] != "TrainingServerError"):
            continue
        depth = len(match[1]) // 4 + ("──" in line)
        line_of_descent[depth:] = [match[2]]
        parents[match[2]] = line_of_descent[depth - 1] if depth else "Exception"
    return parents


def make(cls: type[TrainingServerError]) -> TrainingServerError:
    """An error of a class, with its default message."""
    return cls(StopReason.SHUTDOWN) if cls is Stopped else cls()


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert drawn() == {cls.__name__: cls.__bases__[0].__name__ for cls in FAMILY}


@pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
def test_every_class_is_in_the_table_of_codes_or_never_reported(
    cls: type[TrainingServerError],
) -> None:
    listed = any(ancestor in CODES for ancestor in cls.__mro__)
    exempt = issubclass(cls, NEVER_TOLD) or cls in (TrainingServerError, errors.JobError)
    assert listed != exempt


@pytest.mark.parametrize("name", TABLE)
def test_each_error_has_its_code_and_its_retryability(name: str) -> None:
    error = make(getattr(errors, name))
    assert (code_of(error), is_retryable(error)) == (ErrorCode(TABLE[name][0]), TABLE[name][1])


def test_the_table_of_this_test_has_every_class_that_is_reported() -> None:
    assert set(TABLE) == {
        cls.__name__ for cls in FAMILY if any(ancestor in CODES for ancestor in cls.__mro__)
    }


def test_every_code_of_the_contract_belongs_to_an_error() -> None:
    # No job ends with it: the backend refuses an ending, and only the dead queue has the code.
    in_the_dead_queue_only = {ErrorCode.WEBHOOK_REJECTED, ErrorCode.PUBLICATION_REFUSED}
    assert {code for code, _ in CODES.values()} == set(ErrorCode) - in_the_dead_queue_only


@pytest.mark.parametrize("error", [ValueError("x"), errors.JobError("x"), KeyboardInterrupt()])
def test_an_error_without_a_code_is_a_failed_training_without_retry(
    error: BaseException,
) -> None:
    assert (code_of(error), is_retryable(error)) == CODES[TrainingFailed]


@pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)
def test_a_classs_docstring_is_its_default_message(cls: type[TrainingServerError]) -> None:
    message = str(make(cls))
    assert message == inspect.cleandoc(cls.__dict__["__doc__"]).splitlines()[0]
    assert message.endswith(".") and len(message) < 100


def test_a_given_message_replaces_the_default_one() -> None:
    assert str(errors.GpuOutOfMemory("batch 8 does not fit")) == "batch 8 does not fit"


def test_an_invalid_message_has_its_field_and_its_subject() -> None:
    error = UnknownType(
        "no", field="type", task_id="t", kind="style", subject="7", webhook_url="https://a.com"
    )
    assert (error.field, error.task_id, error.subject) == ("type", "t", "7")
    assert error.webhook_url == "https://a.com"
    assert InvalidMessage().field == "body"


def test_a_stop_has_a_reason() -> None:
    assert Stopped(StopReason.CANCELLED).reason is StopReason.CANCELLED
    assert LeaseLost().reason is StopReason.LEASE_LOST


def test_an_error_that_crosses_the_pipe_is_found_by_its_class_name() -> None:
    assert all(REPORTABLE[name].__name__ == name for name in REPORTABLE)
    assert all(issubclass(cls, TrainingServerError) for cls in REPORTABLE.values())
