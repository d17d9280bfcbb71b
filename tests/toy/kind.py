"""The kind `toy`: it counts the letters of a text on S3."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.addresses import read_address
from jobs.fields import Order, WrongField, check_limits, parameter
from jobs.kinds import Claim, Fetched, Input, KindSettings, Shown, Standing
from jobs.record import JobRecord
from utils.errors import ImageDownloadFailed
from utils.events import Finished, Progress, from_dict


@dataclasses.dataclass(frozen=True, slots=True)
class ToyOptions:
    """Settings of the worker for all orders: `TOY_PAUSE_SECONDS`."""

    pause_seconds: float = parameter(0.0, "time for each letter", low=0.0)

    def __post_init__(self) -> None:
        check_limits(self)


@dataclasses.dataclass(frozen=True, slots=True)
class ToySpec:
    """An order: a subject, and the address of a text."""

    name: str
    text: str

    @property
    def subject(self) -> str:
        """The name."""
        return self.name

    @property
    def identity(self) -> str:
        """Hash of the order."""
        return hashlib.sha256(f"{self.name} {self.text}".encode()).hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class ToyRun:
    """A run, as `tests.toy.work.ToyWork` gets it."""

    task_id: str
    claim: int
    path: str
    folder: str
    resume_from: str | None
    pause_seconds: float = 0.0


class ToyKind:
    """Orders of texts."""

    name = "toy"
    message_type = "toy_training"
    runner = "tests.toy.work:ToyWork"
    spec_type = ToySpec
    parameters_type = None
    options_type = ToyOptions
    last_file = "letters.json"
    checkpoint_file = "count.json"
    labels = ("kind", "subject")
    counters: Mapping[str, str] = {}
    gauges = {"letters": "Letters that the newest run has counted"}
    max_input_bytes = 1000
    needs_gpu = False
    shares_gpus = False

    def __init__(self, settings: KindSettings) -> None:
        self._options = ToyOptions(**settings.options)
        self._addresses = settings.addresses

    def refusal(self, base_model: str) -> str | None:  # pylint: disable=useless-return
        """None: it uses no base model."""
        del base_model
        return None

    def read(self, order: Order) -> ToySpec:
        """See `JobKind.read`."""
        name, text = order.get("name"), order.get("text")
        if not isinstance(name, str) or not name.isalnum():
            raise WrongField(order.at("name"), "must be letters and digits")
        try:
            read_address(str(text or ""), self._addresses)
        except ValueError as error:
            raise WrongField(order.at("text"), str(error)) from None
        return ToySpec(name, str(text))

    def subject_in(self, order: Mapping[str, Any]) -> str | None:
        """See `JobKind.subject_in`."""
        name = order.get("name")
        return name if isinstance(name, str) and name.isalnum() else None

    def restored(self, values: Mapping[str, Any]) -> ToySpec:
        """See `JobKind.restored`."""
        return from_dict(ToySpec, dict(values), tolerant=True)

    def order(self, spec: ToySpec) -> dict[str, Any]:
        """See `JobKind.order`."""
        return dataclasses.asdict(spec)

    def min_level(self, spec: ToySpec) -> int:
        """Every worker that knows the kind understands every order."""
        del spec
        return 0

    def inputs(self, spec: ToySpec) -> tuple[Input, ...]:
        """The text."""
        source, location = read_address(spec.text, self._addresses)
        return (Input(source, location, role="texts"),)

    def output_bytes(self, spec: ToySpec) -> int:
        """Next to nothing."""
        return 1000 + len(spec.name)

    def run(self, spec: ToySpec, fetched: Sequence[Fetched], claim: Claim) -> ToyRun:
        """See `JobKind.run`."""
        (text,) = fetched
        if text.path is None:
            raise ImageDownloadFailed(f"the text of {spec.name} {text.problem}")
        folder, path = str(claim.folder), str(text.path)
        pause = self._options.pause_seconds
        return ToyRun(claim.task_id, claim.number, path, folder, claim.resume_from, pause)

    def identity_fields(self, subject: str) -> dict[str, Any]:
        """Kind and subject."""
        return {"kind": self.name, "subject": subject}

    def beginning(self, spec: ToySpec) -> dict[str, Any]:
        """Nothing was counted yet."""
        del spec
        return {"counted": 0}

    def progress(self, progress: Progress) -> dict[str, Any]:
        """Letters counted."""
        return {"letter": progress.done, "letters": progress.total, "stage": str(progress.stage)}

    def shown(self, facts: Mapping[str, Any]) -> Shown:
        """Letters counted."""
        letters = facts.get("counted", 0)
        return Shown({"letter": letters}, {"current_letter": letters}, gauges={"letters": letters})

    def standing(self, record: JobRecord | None) -> Standing:
        """Letters counted, by the newest checkpoint."""
        saved = record.checkpoint if record else None
        return Standing(saved.step if saved else 0, None, "letter")

    def complete(self, spec: ToySpec, finished: Finished, model_url: str) -> dict[str, Any]:
        """The result."""
        return {"letters": finished.done, "of": spec.name, "at": model_url}
