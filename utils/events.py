"""The messages between the front desk and the trainer process.

They are frozen facts, one JSON object per line.

The trainer receives a `Run` (see `jobs.kinds`) and a `Stop`. It sends `Started`, `Progress`,
`CheckpointSaved`, `Finished` and `Failed`, and also between runs `BaseModelReady`. Nothing else
crosses the pipe, and nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import types
import typing
from typing import Any, TypeVar

from utils.errors import StopReason

T = TypeVar("T")


class Stage(enum.StrEnum):
    """The stage of a job; `progress.stage` on the wire."""

    QUEUED = "queued"
    PREPARING = "preparing"
    TRAINING = "training"
    EXPORTING = "exporting"
    UPLOADING = "uploading"
    PAUSED = "paused"


@dataclasses.dataclass(frozen=True, slots=True)
class Stop:
    """Ask one run to stop at the next optimizer step.

    Attributes:
        reason: The reason.
        task_id, claim: The run to stop. Any other run ignores the request.
    """

    reason: StopReason
    task_id: str
    claim: int


def _facts() -> Any:
    """The field for facts of the job's kind (JSON values)."""
    return dataclasses.field(default_factory=dict)  # pylint: disable=invalid-field-call


@dataclasses.dataclass(frozen=True, slots=True)
class Started:
    """The inputs are ready; the work itself follows.

    Attributes:
        done: Units of work that earlier runs of the job did; 0 if there were none.
        total: Units of work of the whole job.
        unit: Name of one unit, such as `step`.
        facts: Facts of the job's kind.
        warnings: Sentences for the report.
    """

    task_id: str
    done: int
    total: int
    unit: str = "step"
    facts: dict[str, Any] = _facts()
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run. Sent when a stage begins, then at most a few times per second.

    Attributes:
        done: Completed units of work of the job.
        total: Units of work of the whole job; 0 while it is not known.
        unit: Name of one unit, such as `step`.
        per_second: Units per second, measured over this run; None before there is a measurement.
        gpu_memory_allocated: Bytes of the GPU that the trainer's tensors use; None without a GPU.
        gpu_memory_reserved: Bytes of the GPU that the trainer holds, free ones included.
        facts: Facts of the job's kind (see `JobKind.shown`).
    """

    task_id: str
    stage: Stage
    done: int
    total: int
    unit: str = "step"
    per_second: float | None = None
    gpu_memory_allocated: int | None = None
    gpu_memory_reserved: int | None = None
    facts: dict[str, Any] = _facts()

    @property
    def seconds_left(self) -> int | None:
        """The remaining seconds by the measured rate; None before there is one."""
        return round((self.total - self.done) / self.per_second) if self.per_second else None


@dataclasses.dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A complete checkpoint is in `folder`, with its manifest. The trainer no longer changes it.

    Attributes:
        name: Its folder's name: `epoch-0010`, `epoch-0012-step-0123` inside an epoch, with
            `-retake-1` after training had to start over.
        epoch: Completed epochs.
        step: Completed optimizer steps of the job.
        folder: The checkpoint's absolute local folder.
        seconds: Seconds for which training paused.
    """

    task_id: str
    name: str
    epoch: int
    step: int
    folder: str
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """The run ended without an error: its results are exported, or it obeyed a stop.

    Attributes:
        folder: Folder of the files to publish; empty after a stop.
        files: File names in `folder`, in the order of their publication.
        done: Completed units of work of the job.
        seconds: Wall time of the run in the trainer process.
        stopped: The reason for an early stop; None for a finished run.
        facts: Facts of the job's kind (see `JobKind.shown`).
        summary: A short report for the `complete` webhook (JSON values only).
    """

    task_id: str
    folder: str
    files: tuple[str, ...]
    done: int
    seconds: float
    stopped: StopReason | None = None
    facts: dict[str, Any] = _facts()
    summary: dict[str, Any] = _facts()


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """The run failed.

    Attributes:
        error: Class name of the error, one of `utils.errors.REPORTABLE`.
        message: A sentence for people, without a stack trace or a path of this machine's disk.
        trainer_usable: False if the process must be replaced before the next run (a broken CUDA
            context).
    """

    task_id: str
    error: str
    message: str
    trainer_usable: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class BaseModelReady:
    """The base model has been loaded, or dropped to be loaded again. It belongs to no run.

    Attributes:
        ready: Whether the base model is in memory.
        seconds: Seconds that loading took.
    """

    ready: bool
    seconds: float = 0.0


Event = Started | Progress | CheckpointSaved | Finished | Failed
EVENTS: tuple[type[Any], ...] = (Started, Progress, CheckpointSaved, Finished, Failed)


def encode(fact: Any) -> bytes:
    """One fact (a dataclass instance) as one line of JSON, newline included."""
    return json.dumps({"kind": type(fact).__name__, **dataclasses.asdict(fact)}).encode() + b"\n"


def decode(line: bytes, kinds: tuple[type[Any], ...]) -> Any:
    """The fact that `encode` wrote.

    Args:
        line: One line of JSON.
        kinds: The dataclasses that may arrive here.

    Raises:
        ValueError: The line is not one of `kinds` with exactly its fields.
    """
    try:
        values = json.loads(line)
        kind = {cls.__name__: cls for cls in kinds}[values.pop("kind")]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"not one of {[cls.__name__ for cls in kinds]}: {line[:200]!r}") from error
    return from_dict(kind, values)


UNKNOWN = "unknown"
"""Name of the field in which a dataclass keeps unknown values; see `from_dict`."""


def from_dict(cls: type[T], values: dict[str, Any], *, tolerant: bool = False) -> T:
    """Build a frozen dataclass from JSON values.

    Nested dataclasses, tuples, enums and optionals are built too.

    A dataclass with a field `unknown` keeps the values of names that it does not have there, so
    that a newer version's fields survive being read and written back.

    Args:
        cls: The dataclass.
        values: JSON values.
        tolerant: Names that a dataclass does not have are dropped instead of refused.

    Raises:
        ValueError: A field is missing, unknown, or of another type.
    """
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = {name: value for name, value in values.items() if name not in fields - {UNKNOWN}}
    if unknown and UNKNOWN not in fields and not tolerant:
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}")
    hints = _hints(cls)  # type: ignore[arg-type]
    known = {
        name: _value(hints[name], value, name, tolerant)
        for name, value in values.items()
        if name not in unknown
    }
    if unknown and UNKNOWN in fields:
        known[UNKNOWN] = unknown
    try:
        return cls(**known)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _value(  # pylint: disable=too-many-return-statements
    hint: Any, value: Any, name: str, tolerant: bool
) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _value(typing.get_args(hint)[0], value, name, tolerant)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(typing.get_args(hint)[0], item, name, tolerant) for item in value)
    if origin is dict and isinstance(value, dict):
        return value
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type[Any], hint), value, tolerant=tolerant)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # In Python a bool is an int; here it is not.
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and isinstance(value, bool) == (hint is bool)
    ):
        return value
    raise ValueError(f"{name} is {value!r}, not {hint}")
