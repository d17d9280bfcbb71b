"""The kinds of job: what the worker, the records and the commands know of a kind, and a registry.

A kind is one file in this folder and one folder of training code. `REGISTRY` names the module and
the class of each, so that nothing is imported before it is needed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jobs.addresses import AddressRules, S3Location
from jobs.fields import Order, WrongField
from jobs.record import JobRecord
from utils.errors import NewerRecord
from utils.events import Finished, Progress

REGISTRY = {
    "style": "jobs.style:StyleKind",
    "llm": "jobs.llm:LlmKind",
}
"""Every kind, by its name: `module:class`. A message without a type is of the first of `KINDS`."""
FIRST_KIND = next(iter(REGISTRY))
"""The kind of workers and commands if none is given."""


class Spec(Protocol):
    """The understood order of a kind: a frozen dataclass of JSON values, kept in the job record."""

    @property
    def subject(self) -> str:
        """The thing that the job makes, such as a style's id."""

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of what is ordered. Two messages with one task id must agree in it."""


@dataclasses.dataclass(frozen=True, slots=True)
class TextBeside:
    """Objects next to an input that may hold its text. The first one that exists is read.

    Attributes:
        places: The objects, the usual one first.
        max_bytes: A larger object is not read.
        too_large: Why it is ignored, for the customer.
        read: Returns the text in an object's bytes, and why it is ignored; None if it is used.
    """

    places: tuple[S3Location, ...]
    max_bytes: int
    too_large: str
    read: Callable[[bytes], tuple[str, str | None]]


@dataclasses.dataclass(frozen=True, slots=True)
class Input:
    """One object that a job reads.

    Attributes:
        source: Its address, in a form that its sender recognises.
        location: Bucket and key; None if no object can have this address.
        version_id: The object's version; None for the present one.
        problem: Why there is no location; None if there is one.
        role: The kind's name for this sort of input; each role has a separate folder.
        text: The text that belongs to it; None if the order gives none.
        text_source: The place of its text if the order gives none; None if it has no text.
    """

    source: str
    location: S3Location | None
    version_id: str | None = None
    problem: str | None = None
    role: str = "inputs"
    text: str | None = None
    text_source: TextBeside | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Fetched:
    """The result of fetching an `Input`.

    Attributes:
        input: The input.
        path: The local file; None if the object could not be fetched.
        text: The input's text, or that of an object next to it.
        problem: The reason if there is no file, for the customer; None if there is one.
        text_problem: Why the text next to the input is ignored; None if it is used.
    """

    input: Input
    path: Path | None
    text: str | None = None
    problem: str | None = None
    text_problem: str | None = None


class KindRun(Protocol):
    """A kind's own run: a frozen dataclass that crosses the pipe as JSON."""

    @property
    def task_id(self) -> str:
        """The job."""

    @property
    def claim(self) -> int:
        """Number of the claim."""

    @property
    def resume_from(self) -> str | None:
        """Absolute folder of the checkpoint to resume from; None to start from the beginning."""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """The work of one claim, as it is sent to the trainer process.

    Attributes:
        task_id: The job.
        claim: Number of the claim under which the run is done.
        runner: The class that does it, as `module:class`; see `training.runtime.child`.
        log_fields: Fields for every log line of the run.
        order: The kind's own run as JSON values.
    """

    task_id: str
    claim: int
    runner: str
    log_fields: dict[str, Any]
    order: dict[str, Any]

    @classmethod
    def of(cls, own: KindRun, runner: str, log_fields: dict[str, Any]) -> Run:
        """Wrap a kind's own run for its runner."""
        order = json.dumps(dataclasses.asdict(own))  # type: ignore[call-overload]  # a dataclass
        return cls(own.task_id, own.claim, runner, log_fields, json.loads(order))


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """The circumstances of one run.

    Attributes:
        task_id: The job.
        number: Number of the claim.
        folder: The job's folder on this machine.
        resume_from: Absolute folder of a complete checkpoint, or None.
    """

    task_id: str
    number: int
    folder: Path
    resume_from: str | None


def runner_of_first_kind() -> str:
    """The class that does the runs of the first kind, as `module:class`."""
    runner: str = load(REGISTRY[FIRST_KIND]).runner
    return runner


@dataclasses.dataclass(frozen=True, slots=True)
class TrainerOptions:
    """Options of the trainer process for its whole life.

    Attributes:
        base_model: Hub name or local folder of the base model, for kinds whose orders name none.
        base_model_revision: Hub revision; None for the default branch.
        mixed_precision: `fp16`, `bf16` or `no`; on a CPU always `no`.
        gradient_checkpointing: `true`, `false` or `auto`.
        fast_training: Train with fewer and larger operations. False gives the weights of earlier
            versions, to the bit in fp32 on a CPU.
        allow_cpu: Train on the CPU if there is no CUDA, instead of failing.
        deterministic: Use only algorithms that give the same bits each time, also on a GPU.
        log_level: Level of the trainer's own log lines.
        log_format: `json` or `text`.
        runner: The class whose base model is loaded before the first run, as `module:class`.
        processes: Processes that train a run together, for the kinds that can.
        fsdp: Share the weights of a language model out among the processes.
        stall_seconds: A process waits this long for a sum with the others.
        rank: Number of this process; 0 for the one that the desk starts.
        meeting: Folder in which the processes find each other; set by process 0.
    """

    base_model: str
    base_model_revision: str | None = None
    mixed_precision: str = "fp16"
    gradient_checkpointing: str = "true"
    fast_training: bool = True
    allow_cpu: bool = False
    deterministic: bool = False
    log_level: str = "INFO"
    log_format: str = "json"
    runner: str = dataclasses.field(default_factory=runner_of_first_kind)
    processes: int = 1
    fsdp: bool = False
    stall_seconds: float = 300.0
    rank: int = 0
    meeting: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """A kind's facts about a running job, by the names under which other programs know them.

    Attributes:
        status: Fields of the job in `/status`.
        numbers: Fields of `/metrics` as JSON.
        counts: The amounts that the kind's counters count, from the job's beginning.
        gauges: Values of the kind's gauges; None for those that are not measured yet.
        record: Fields of the job record.
    """

    status: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    gauges: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Standing:
    """How far a job is, by its record, for operators.

    Attributes:
        done: Completed units of work.
        total: Units of the whole job; None if not known.
        unit: Name of one unit, such as `epoch`.
        measured: Other numbers, by their names; None for those not known.
    """

    done: float
    total: float | None
    unit: str
    measured: Mapping[str, float | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class KindSettings:
    """The configuration of a kind.

    Attributes:
        parameters: Defaults of the order's parameters, by name.
        options: Settings of the worker for this kind, by name.
        addresses: The buckets and hosts that inputs may be read from.
    """

    addresses: AddressRules
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class OrderedFile:
    """A file that an order of the API names.

    Attributes:
        address: `s3://bucket/key`.
        name: The client's name of the file.
    """

    address: str
    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class ApiOrder:
    """An order as it came over the API, before its kind has read it.

    Attributes:
        subject: The thing that the job makes, as the API names it: a number as text for a kind with
            `subject_is_number`, else a name.
        org_id: The organisation.
        model: The base model, as the client names it.
        training_files, validation_files: The files.
        parameters: The kind's own parameters.
        hyperparameters: OpenAI's names, as far as they were given: `n_epochs`, `batch_size`,
            `learning_rate_multiplier`.
        seed: The seed, if one was given.
        fields: Fields of the order that only the kind understands.
    """

    subject: str
    org_id: str
    model: str
    training_files: tuple[OrderedFile, ...]
    validation_files: tuple[OrderedFile, ...]
    parameters: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    seed: int | None
    fields: Mapping[str, Any]

    def own_parameters(self, learning_rate: float) -> dict[str, Any]:
        """The parameters under the kind's names. The kind's own win over OpenAI's.

        Args:
            learning_rate: The kind's default, which OpenAI's multiplier multiplies.
        """
        names = {"n_epochs": "epochs", "batch_size": "batch_size"}
        given = self.hyperparameters
        found = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
        if "learning_rate_multiplier" in given:
            found["learning_rate"] = learning_rate * given["learning_rate_multiplier"]
        if self.seed is not None:
            found["seed"] = self.seed
        return found | dict(self.parameters)


@runtime_checkable
class OrderedOverApi(Protocol):
    """A kind that writes its orders itself. Orders of every other kind are of `order_of`'s form.

    Attributes:
        subject_is_number: The API counts the kind's subjects, so that none is used twice.
    """

    subject_is_number: bool

    def api_order(self, order: ApiOrder) -> dict[str, Any]:
        """The `data` of the message.

        Raises:
            WrongField: A field cannot be used; the field is named as in the request.
        """


def order_of(kind: Any, order: ApiOrder) -> dict[str, Any]:
    """The `data` of the message for an order of the API.

    Raises:
        WrongField: A field cannot be used.
    """
    if isinstance(kind, OrderedOverApi):
        return kind.api_order(order)
    training, validation = order.training_files, order.validation_files
    parameters = dict(order.parameters)
    if "n_epochs" in order.hyperparameters:
        parameters.setdefault("epochs", order.hyperparameters["n_epochs"])
    if "batch_size" in order.hyperparameters:
        parameters.setdefault("batch_size", order.hyperparameters["batch_size"])
    if order.seed is not None:
        parameters.setdefault("seed", order.seed)
    data: dict[str, Any] = {
        "subject": order.subject,
        "base_model": order.model or None,
        "training_file": training[0].address if training else None,
        "training_files": [each.address for each in training] if len(training) > 1 else None,
        "validation_file": validation[0].address if validation else None,
        "parameters": parameters or None,
    }
    return with_fields(data, order.fields)


def with_fields(data: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The `data` of a message, with the fields that only its kind understands.

    Args:
        data: The fields that the API sets; None for those that the order leaves out.
        fields: The others.

    Raises:
        WrongField: A field is one that the API sets.
    """
    if both := [name for name in fields if name in data]:
        raise WrongField(
            f"options.{both[0]}", "is set from the other parameters of the request. Leave it out"
        )
    return {name: value for name, value in {**fields, **data}.items() if value is not None}


class JobKind(Protocol):
    """Everything that is particular to one kind of job, outside its training code.

    Attributes:
        name: The kind's name in records, settings and queue names.
        message_type: The `type` of its messages.
        runner: The class that does its runs, as `module:class`.
        spec_type: The dataclass of its specs.
        parameters_type: The dataclass of its parameters, or None. The settings `{KIND}_{FIELD}` are
            the defaults of its fields.
        options_type: The dataclass of the worker's settings for this kind, or None.
        last_file: The published file that is written when all others are in place.
        checkpoint_file: The file that stays of an old checkpoint, and of each one of a completed
            job.
        max_input_bytes: Larger inputs are not fetched.
        labels: Names of the fields of `identity_fields`. They label error reports.
        counters, gauges: The kind's metrics, by name, each with its help text. Kinds may share one.
        needs_gpu: A machine without a GPU is unfit for this kind unless `ALLOW_CPU` is set.
        shares_gpus: Whether several processes, one to a GPU, can do one of its runs together.
    """

    name: str
    message_type: str
    runner: str
    spec_type: type[Any]
    parameters_type: type[Any] | None
    options_type: type[Any] | None
    last_file: str
    checkpoint_file: str
    max_input_bytes: int
    labels: tuple[str, ...]
    counters: Mapping[str, str]
    gauges: Mapping[str, str]
    needs_gpu: bool
    shares_gpus: bool

    def refusal(self, base_model: str) -> str | None:
        """Why a worker with this `BASE_MODEL` cannot do the kind's jobs; None if it can."""

    def read(self, order: Order) -> Any:
        """Check an order.

        Raises:
            WrongField: The order can never become a job.
        """

    def subject_in(self, order: Mapping[str, Any]) -> str | None:
        """The subject of an order that may have other errors; None if it cannot be read."""

    def restored(self, values: Mapping[str, Any]) -> Any:
        """The spec that a record holds.

        Raises:
            ValueError: The values are not a spec.
        """

    def order(self, spec: Any) -> dict[str, Any]:
        """The `data` of a message that `read` understands as this spec."""

    def min_level(self, spec: Any) -> int:
        """The lowest protocol level of a worker that understands the order."""

    def inputs(self, spec: Any) -> Sequence[Input]:
        """The objects to fetch."""

    def output_bytes(self, spec: Any) -> int:
        """An upper estimate of the bytes that the run has in its folder at one time."""

    def run(self, spec: Any, fetched: Sequence[Fetched], claim: Claim) -> KindRun:
        """The run for the trainer process.

        Raises:
            JobError: There are too few usable inputs.
        """

    def identity_fields(self, subject: str) -> dict[str, Any]:
        """The fields that name the subject in webhooks and log lines."""

    def beginning(self, spec: Any) -> dict[str, Any]:
        """The facts of a job that has done nothing yet, for its first reports."""

    def progress(self, progress: Progress) -> dict[str, Any]:
        """The kind's part of a progress webhook's `progress`."""

    def shown(self, facts: Mapping[str, Any]) -> Shown:
        """The facts of an event of the trainer, for pages, metrics and the record."""

    def standing(self, record: JobRecord | None) -> Standing:
        """How far a job is; with None, of a job whose record cannot be read."""

    def complete(self, spec: Any, finished: Finished, model_url: str) -> dict[str, Any]:
        """The kind's part of a `complete` webhook."""


class Kinds:
    """The registered kinds, configured for one worker.

    Args:
        settings: The configuration of each kind. A kind without one has its defaults: this worker
            does not serve it, but may find its records.
        served: Names of the kinds that this worker serves.
        addresses: The buckets and hosts that inputs may be read from.
    """

    def __init__(
        self,
        settings: Mapping[str, KindSettings],
        *,
        addresses: AddressRules,
        served: Sequence[str] = (FIRST_KIND,),
    ) -> None:
        self.served = tuple(served)
        self._settings = settings
        self._addresses = addresses
        self._made: dict[str, JobKind] = {}

    def __iter__(self) -> Iterator[JobKind]:
        """The kinds that this worker serves."""
        return map(self.of, self.served)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of all served kinds, each once."""
        return tuple(dict.fromkeys(label for kind in self for label in kind.labels))

    def standing(self, record: JobRecord | None) -> Standing:
        """How far a job is, by its record.

        Raises:
            NewerRecord: This version does not know the kind.
        """
        return self.of(record.kind if record else self.served[0]).standing(record)

    def of(self, name: str) -> JobKind:
        """The kind of this name.

        Raises:
            NewerRecord: This version does not know the kind.
        """
        if name not in REGISTRY:
            raise NewerRecord(
                f"The kind of job {name!r} is not known to this version. Update the worker."
            )
        if name not in self._made:
            settings = self._settings.get(name, KindSettings(self._addresses))
            self._made[name] = load(REGISTRY[name])(settings)
        return self._made[name]

    def of_type(self, message_type: str | None) -> JobKind | None:
        """The served kind whose messages have this type; None if there is none.

        Messages without a type are of the first kind that is served.
        """
        if message_type is None:
            return self.of(self.served[0])
        return next((kind for kind in self if kind.message_type == message_type), None)


def load(place: str) -> Any:
    """The class at `module:class`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
