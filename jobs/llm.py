"""The kind `llm`: a LoRA of a language model, from conversations.

From top to bottom: the parameters with their limits and defaults, the run that crosses the pipe to
the trainer process, the order as a spec, the check of a message's fields, and `LlmKind`.
"""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field

from jobs import epochs
from jobs.addresses import S3Location, read_address, version_of
from jobs.fields import (
    STRICT,
    Order,
    WrongField,
    check_limits,
    checked,
    naming_the_parameter,
    parameter,
    parameters_model,
    text,
)
from jobs.kinds import (
    ApiOrder,
    Claim,
    Fetched,
    Input,
    KindSettings,
    Shown,
    Standing,
    with_fields,
)
from jobs.layout import ADAPTER_WEIGHTS, CHECKPOINT_WEIGHTS, HTML_REPORT
from jobs.record import JobRecord
from utils.errors import TrainingDataUnavailable
from utils.events import Finished, Progress, from_dict

SUBJECT = re.compile(r"[A-Za-z0-9_-]{1,128}")
BASE_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
MAX_PROMPTS = 8
MAX_PROMPT = 2000
MAX_SYSTEM_PROMPT = 20_000
QUANTIZATIONS = ("auto", "none", "8bit", "4bit")
TRAIN_ON = ("answers", "last_answer", "all")
ALL_LINEAR = "all-linear"
DATA, VALIDATION = "training", "validation"
"""The roles of the inputs."""

LEFT_OUT = {
    "use_dora": "is not offered: vLLM cannot serve DoRA; set rslora or a higher rank instead",
    "modules_to_save": "is not offered: vLLM serves only LoRA weights; leave it out",
}
BYTES_OF_A_PARAMETER = {"none": 2.0, "8bit": 1.1, "4bit": 0.6}
"""Bytes of one parameter of the base on a GPU, rounded up for scales and unquantised layers."""
_MODULES = re.compile(r"all-linear|[a-z0-9_]+(?:,[a-z0-9_]+){0,15}")


# ---- parameters ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class LlmParameters:
    """The `parameters` of a message, each with its limits and its default.

    Raises:
        ValueError: A value is outside its limits; the message names the parameter.
    """

    epochs: float = parameter(
        3.0,
        "passes over the conversations; fractions count",
        low=0.01,
        high=50.0,
        setting="num_train_epochs",
    )
    max_steps: int = parameter(0, "optimizer steps; 0 follows from epochs", low=0, high=1_000_000)
    learning_rate: float = parameter(2e-4, "peak learning rate", low=1e-7, high=1e-1)
    batch_size: int = parameter(4, "conversations a forward pass", low=1, high=64)
    gradient_accumulation_steps: int = parameter(4, "batches an optimizer step", low=1, high=1024)
    max_length: int = parameter(
        2048, "tokens of the longest row", low=16, high=32_768, setting="max_seq_length"
    )
    rank: int = parameter(
        16, "rank of the LoRA (arXiv:2106.09685)", low=1, high=64, setting="lora_r"
    )
    alpha: float = parameter(
        32.0,
        "LoRA alpha; the effect is scaled by alpha / rank",
        low=0.01,
        high=1024.0,
        setting="lora_alpha",
    )
    dropout: float = parameter(
        0.05, "dropout before the LoRA", low=0.0, high=0.9, setting="lora_dropout"
    )
    target_modules: str = parameter(
        "q_proj,v_proj",
        "layers that get a LoRA: names separated by commas, or all-linear",
        setting="lora_target_modules",
    )
    rslora: bool = parameter(False, "rank-stabilised: scaled by alpha / √rank (arXiv:2312.03732)")
    quantization: str = parameter(
        "auto",
        "bits of the frozen base (arXiv:2305.14314); auto follows USE_4BIT and USE_8BIT on a GPU, "
        "and is none on a CPU",
        choices=QUANTIZATIONS,
    )
    warmup_steps: int = parameter(
        100,
        "steps that warm up, at most a tenth of the job (arXiv:1706.02677)",
        low=0,
        high=100_000,
    )
    lr_schedule: str = parameter(
        "cosine",
        "shape of the learning rate after warm-up (arXiv:1608.03983)",
        choices=("cosine", "linear", "constant"),
    )
    weight_decay: float = parameter(0.0, "weight decay, decoupled", low=0.0, high=1.0)
    max_grad_norm: float = parameter(
        1.0, "gradient norm is clipped to this", low=0.001, high=1000.0
    )
    seed: int = parameter(42, "seed of weights, dropout, order and split", low=0, high=2**31 - 1)
    train_on: str = parameter(
        "answers", "which turns are trained: answers, last_answer, or all", choices=TRAIN_ON
    )
    validation_split: float = parameter(
        0.1,
        "part of the conversations that is held out, if no validation file is given",
        low=0.0,
        high=0.9,
    )
    eval_steps: int = parameter(
        500, "steps between evaluations; at least four a job", low=1, high=1_000_000
    )
    save_steps: int = parameter(
        500, "steps between checkpoints; at least four a job", low=1, high=1_000_000
    )
    deliver: str = parameter(
        "last",
        "which checkpoint becomes the model; best is the lowest held-out loss",
        choices=("last", "best"),
    )
    early_stopping_patience: int = parameter(
        0, "evaluations without improvement that end the training; 0 turns it off", low=0, high=100
    )
    optimizer: str = parameter(
        "adamw",
        "AdamW (arXiv:1711.05101), the same with its state in 8 bits, or Prodigy",
        choices=("adamw", "adamw8bit", "prodigy"),
    )
    attention: str = parameter(
        "auto",
        "implementation of attention; auto is sdpa",
        choices=("auto", "sdpa", "eager", "flash"),
    )
    checkpointing: str = parameter(
        "auto",
        "recompute activations to save memory; auto: on a GPU",
        choices=("auto", "true", "false"),
    )
    packing: bool = parameter(
        False,
        "join the rows of a forward pass into one sequence without padding; a row never sees "
        "another one (arXiv:2107.02027)",
    )
    merged: bool = parameter(
        False, "also publish the base model with the LoRA merged into it, in full precision"
    )
    redact: bool = parameter(False, "replace e-mail addresses, telephone numbers and keys in texts")

    def __post_init__(self) -> None:
        check_limits(self)
        if not _MODULES.fullmatch(self.target_modules):
            raise ValueError(
                f"target_modules is {self.target_modules[:80]!r}; it must be all-linear, or names "
                "of layers separated by commas, such as q_proj,v_proj"
            )

    def require_libraries(self) -> None:
        """Refuse parameters that this machine's libraries cannot serve, without importing them.

        Raises:
            ValueError: Names the library that is not installed.
        """
        needed = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(self.optimizer)
        if self.quantization in ("8bit", "4bit"):
            needed = needed or "bitsandbytes"
        if self.attention == "flash":
            needed = needed or "flash_attn"
        if needed and not importlib.util.find_spec(needed):
            name = "quantization" if needed == "bitsandbytes" else "optimizer"
            name = "attention" if needed == "flash_attn" else name
            raise ValueError(
                f"{name} needs the library {needed}, which is not installed on this worker; "
                "install it, or choose another value"
            )


PARAMETER_NAMES = tuple(field.name for field in dataclasses.fields(LlmParameters))


@dataclasses.dataclass(frozen=True, slots=True)
class LlmOptions:
    """Settings of the worker for all language models.

    Raises:
        ValueError: A value is outside its limits; the message names the option.
    """

    base_models: str = parameter(
        "meta-llama/*,mistralai/*,TinyLlama/*,Qwen/*,HuggingFaceTB/*",
        "base models that a message may choose: names or patterns of the hub, or name=folder, "
        "separated by commas",
    )
    default_base_model: str = parameter("", "base model of messages that choose none")
    min_training_samples: int = parameter(
        1, "fewer usable conversations fail the run; fewer than 100 are warned of", low=1
    )
    max_file_bytes: int = parameter(2 * 1024**3, "larger files are not fetched", low=1024)
    use_4bit: bool = parameter(True, "quantization auto means 4 bits on a GPU")
    use_8bit: bool = parameter(False, "quantization auto means 8 bits on a GPU")

    def __post_init__(self) -> None:
        check_limits(self)
        for name, _, folder in self.entries():
            if folder and not folder.startswith("/"):
                raise ValueError(f"base_models maps {name} to {folder}; give an absolute folder")

    def entries(self) -> tuple[tuple[str, str, str], ...]:
        """The allow-list: name or pattern, `=` or nothing, and folder or nothing."""
        given = (entry.strip() for entry in self.base_models.split(","))
        parted = (entry.partition("=") for entry in given if entry)
        return tuple((name.strip(), sign, folder.strip()) for name, sign, folder in parted)

    def source_of(self, name: str) -> str | None:
        """The hub name or local folder of a base model; None if it is not allowed."""
        for pattern, _, folder in self.entries():
            if name == pattern and folder:
                return folder
            if not folder and fnmatch.fnmatchcase(name, pattern):
                return name
        return None


# ---- the run that crosses the pipe ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class LlmRun:
    """One claim's worth of training.

    Attributes:
        task_id: The job.
        subject: The model that the job makes.
        claim: Number of the claim; it is written into every checkpoint.
        base_model: Public name of the base.
        base_source: Hub name or local folder of the base.
        training_file: The conversations.
        validation_file: Held-out conversations; None to hold a part of the training file out.
        parameters: Parameters in force.
        work_folder: Absolute folder of the run; the trainer writes only below it.
        template_date: Date that chat templates see, `YYYY-MM-DD`: one for the whole job.
        resume_from: Absolute folder of a complete checkpoint of this job, or None.
        system_prompt: Added to conversations that have none; or the empty string.
        prompts: Answered by the base and by the tuned model; without any, held-out questions.
        min_training_samples: Fewer usable conversations fail the run.
        use_4bit, use_8bit: Meaning of the quantization `auto` on a GPU.
    """

    task_id: str
    subject: str
    claim: int
    base_model: str
    base_source: str
    training_file: str
    validation_file: str | None
    parameters: LlmParameters
    work_folder: str
    template_date: str
    resume_from: str | None = None
    system_prompt: str = ""
    prompts: tuple[str, ...] = ()
    min_training_samples: int = 1
    use_4bit: bool = True
    use_8bit: bool = False


# ---- spec ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class DataFile:
    """A file of conversations: its address as the message spells it, and its location."""

    source: str
    location: S3Location


@dataclasses.dataclass(frozen=True, slots=True)
class LlmSpec:
    """The order of a language model.

    Attributes:
        subject: The model that the job makes.
        base_model: Public name of the base.
        training_file: The conversations.
        template_date: Date that chat templates see: the message's, or the day of its first reading.
        llm_parameters: Parameters in force.
        validation_file: Held-out conversations, if the message names them.
        parameters: Parameters that the message sets.
        org_id: The organisation, or the empty string.
        system_prompt: Added to conversations that have none, or the empty string.
        prompts: Test prompts.
        date_given: Whether the message sets `template_date`.
    """

    subject: str
    base_model: str
    training_file: DataFile
    template_date: str
    llm_parameters: LlmParameters
    validation_file: DataFile | None = None
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    org_id: str = ""
    system_prompt: str = ""
    prompts: tuple[str, ...] = ()
    date_given: bool = False

    @property
    def identity(self) -> str:
        """SHA-256 (hex) of what is ordered."""
        meaning = {
            "subject": self.subject,
            "base_model": self.base_model,
            "files": [
                [each.location.bucket, each.location.key, version_of(each.source)]
                for each in (self.training_file, self.validation_file)
                if each
            ],
            "parameters": self.parameters,
            "org_id": self.org_id,
            "system_prompt": self.system_prompt,
            "prompts": list(self.prompts),
            "template_date": self.template_date if self.date_given else "",
        }
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()


# ---- fields of a message -------------------------------------------------------------------------

Parameters = parameters_model(LlmParameters)
Prompt = text(MAX_PROMPT)
Name = Annotated[str, Field(max_length=128)]


class LlmOrder(BaseModel):
    """The fields of an order."""

    model_config = STRICT

    subject: Annotated[str, Field(pattern=f"^{SUBJECT.pattern}$")]
    org_id: Annotated[str, Field(pattern=f"^{SUBJECT.pattern}$")] | None = None
    base_model: Annotated[str, Field(max_length=200)] | None = None
    training_file: Annotated[str, Field(max_length=8192)]
    validation_file: Annotated[str, Field(max_length=8192)] | None = None
    system_prompt: Annotated[str, Field(max_length=MAX_SYSTEM_PROMPT)] | None = None
    prompts: (
        Annotated[list[Prompt], Field(max_length=MAX_PROMPTS)] | None  # type: ignore[valid-type]
    ) = None
    template_date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")] | None = None
    parameters: Parameters | None = None  # type: ignore[valid-type]

    def given_parameters(self) -> dict[str, Any]:
        """The parameters that the message sets."""
        return self.parameters.model_dump(exclude_none=True) if self.parameters else {}


# ---- the kind ------------------------------------------------------------------------------------

OUTPUT_BYTES = 4 * 1024**3
"""Adapter, checkpoints and report of a model of ordinary size, estimated from above."""
MERGED_BYTES = 16 * 1024**3
"""A merged model of eight billion parameters in 16 bits. The base's size is not known here."""


class LlmKind:
    """Orders of language models.

    Args:
        settings: Default parameters, `LlmOptions`, and the buckets of files.
    """

    name = "llm"
    message_type = "llm_training"
    runner = "training.language.work:LanguageWork"
    spec_type = LlmSpec
    parameters_type = LlmParameters
    options_type = LlmOptions
    last_file = ADAPTER_WEIGHTS
    checkpoint_file = CHECKPOINT_WEIGHTS
    labels = ("kind", "subject")
    counters, gauges = epochs.COUNTERS, epochs.GAUGES
    needs_gpu = True
    shares_gpus = True
    subject_is_number = False

    def __init__(self, settings: KindSettings) -> None:
        self._defaults = LlmParameters(**settings.parameters)
        self._options = LlmOptions(**settings.options)
        self._addresses = settings.addresses
        self.max_input_bytes = self._options.max_file_bytes

    def refusal(self, base_model: str) -> str | None:  # pylint: disable=useless-return
        """None: each order names its base model, and `BASE_MODEL` is not used."""
        del base_model
        return None

    # --- from a message to a spec, and back

    def read(self, order: Order) -> LlmSpec:
        """Check an order; see `JobKind.read`."""
        found = {name: order.get(name) for name in tuple(LlmOrder.model_fields)}
        given = checked(
            LlmOrder,
            {name: value for name, value in found.items() if value is not None},
            order,
            parameters=PARAMETER_NAMES,
            left_out=LEFT_OUT,
        )
        parameters = given.given_parameters()
        validation = given.validation_file
        return LlmSpec(
            subject=given.subject,
            base_model=self._base(given.base_model, order),
            training_file=self._file(given.training_file, "training_file", order),
            template_date=_date(given.template_date, order),
            llm_parameters=self._with_defaults(parameters, order),
            validation_file=(
                self._file(validation, "validation_file", order) if validation else None
            ),
            parameters=parameters,
            org_id=given.org_id or "",
            system_prompt=given.system_prompt or "",
            prompts=tuple(prompt for prompt in given.prompts or () if prompt),
            date_given=given.template_date is not None,
        )

    def _base(self, given: str | None, order: Order) -> str:
        name = given or self._options.default_base_model
        if not name:
            raise WrongField(order.at("base_model"), "is required: the worker has no default")
        if not BASE_NAME.fullmatch(name) or ".." in name:
            raise WrongField(order.at("base_model"), "is not the name of a model")
        if self._options.source_of(name) is None:
            raise WrongField(
                order.at("base_model"),
                "is not allowed on this worker; the operator allows base models in "
                "LLM_BASE_MODELS",
            )
        return name

    def _file(self, address: str, field: str, order: Order) -> DataFile:
        try:
            source, location = read_address(address, self._addresses)
        except ValueError as error:
            raise WrongField(order.at(field), str(error)) from None
        return DataFile(source, location)

    def _with_defaults(self, parameters: dict[str, Any], order: Order) -> LlmParameters:
        with naming_the_parameter(order, PARAMETER_NAMES):
            made = dataclasses.replace(self._defaults, **parameters)
            made.require_libraries()
        return made

    def subject_in(self, order: Mapping[str, Any]) -> str | None:
        """See `JobKind.subject_in`."""
        value = order.get("subject")
        return value if isinstance(value, str) and SUBJECT.fullmatch(value) else None

    def restored(self, values: Mapping[str, Any]) -> LlmSpec:
        """The spec of a record; see `JobKind.restored`."""
        return from_dict(LlmSpec, dict(values), tolerant=True)

    def order(self, spec: LlmSpec) -> dict[str, Any]:
        """The `data` of a message; see `JobKind.order`."""
        data = {
            "subject": spec.subject,
            "org_id": spec.org_id or None,
            "base_model": spec.base_model,
            "training_file": spec.training_file.source,
            "validation_file": spec.validation_file.source if spec.validation_file else None,
            "system_prompt": spec.system_prompt or None,
            "prompts": list(spec.prompts) or None,
            "template_date": spec.template_date if spec.date_given else None,
            "parameters": spec.parameters or None,
        }
        return {name: value for name, value in data.items() if value is not None}

    def api_order(self, order: ApiOrder) -> dict[str, Any]:
        """The `data` of a message for an order of the API; see `OrderedOverApi`."""
        training, validation = order.training_files, order.validation_files
        if len(training) != 1:
            raise WrongField("training_files", "must name one file of conversations")
        if len(validation) > 1:
            raise WrongField("validation_files", "must name one file of conversations, or none")
        data = {
            "subject": order.subject,
            "base_model": order.model or None,
            "training_file": training[0].address,
            "validation_file": validation[0].address if validation else None,
            "parameters": order.own_parameters(self._defaults.learning_rate) or None,
        }
        return with_fields(data, order.fields)

    def min_level(self, spec: LlmSpec) -> int:
        """The level of the first workers that know the kind."""
        del spec
        return 1

    # --- from a spec to a run

    def inputs(self, spec: LlmSpec) -> tuple[Input, ...]:
        """The training file, and the validation file if there is one."""
        files = ((DATA, spec.training_file), (VALIDATION, spec.validation_file))
        return tuple(
            Input(file.source, file.location, version_of(file.source), role=role)
            for role, file in files
            if file
        )

    def output_bytes(self, spec: LlmSpec) -> int:
        """Adapter, checkpoints and report."""
        per_rank = 64 * 1024**2 * (8 if spec.llm_parameters.target_modules == ALL_LINEAR else 1)
        merged = MERGED_BYTES if spec.llm_parameters.merged else 0
        return merged + min(OUTPUT_BYTES, 512 * 1024**2 + per_rank * spec.llm_parameters.rank)

    def run(self, spec: LlmSpec, fetched: Sequence[Fetched], claim: Claim) -> LlmRun:
        """The training run; see `JobKind.run`.

        Raises:
            TrainingDataUnavailable: A file could not be fetched.
        """
        paths = {each.input.role: each.path for each in fetched}
        for each in fetched:
            if each.path is None:
                raise TrainingDataUnavailable(f"The file {each.input.source} {each.problem}.")
        source = self._options.source_of(spec.base_model)
        if source is None:
            raise TrainingDataUnavailable(
                f"The base model {spec.base_model} is not allowed on this worker any more. Allow "
                "it in LLM_BASE_MODELS, or order another base model."
            )
        return LlmRun(
            task_id=claim.task_id,
            subject=spec.subject,
            claim=claim.number,
            base_model=spec.base_model,
            base_source=source,
            training_file=str(paths[DATA]),
            validation_file=str(paths[VALIDATION]) if VALIDATION in paths else None,
            parameters=spec.llm_parameters,
            work_folder=str(claim.folder),
            template_date=spec.template_date,
            resume_from=claim.resume_from,
            system_prompt=spec.system_prompt,
            prompts=spec.prompts,
            min_training_samples=self._options.min_training_samples,
            use_4bit=self._options.use_4bit,
            use_8bit=self._options.use_8bit,
        )

    # --- webhooks

    def identity_fields(self, subject: str) -> dict[str, Any]:
        """Kind and subject."""
        return {"kind": self.name, "subject": subject}

    def beginning(self, spec: LlmSpec) -> dict[str, Any]:
        """The facts of a job that has not trained yet."""
        del spec
        return {"step": 0}

    def progress(self, progress: Progress) -> dict[str, Any]:
        """Steps, epoch and loss; see `JobKind.progress`."""
        facts = progress.facts
        done = progress.done / progress.total if progress.total else 0.0
        told: dict[str, Any] = {
            "step": progress.done,
            "total_steps": progress.total,
            "progress_percent": int(100 * done),
            "estimated_seconds": progress.seconds_left or 0,
            "stage": str(progress.stage),
        }
        names = ("epoch", "loss", "held_out_loss", "tokens_per_second")
        return told | {name: facts[name] for name in names if facts.get(name) is not None}

    def shown(self, facts: Mapping[str, Any]) -> Shown:
        """Epochs and loss; see `JobKind.shown`."""
        return epochs.shown(facts)

    def standing(self, record: JobRecord | None) -> Standing:
        """Epochs and loss; see `JobKind.standing`."""
        parameters = (record.message.get("llm_parameters") if record else None) or {}
        # A limit of steps ends the job sooner than its epochs do.
        total = None if parameters.get("max_steps") else parameters.get("epochs")
        return epochs.standing(record, total)

    def complete(self, spec: LlmSpec, finished: Finished, model_url: str) -> dict[str, Any]:
        """Steps, losses and counts; see `JobKind.complete`."""
        summary = finished.summary
        return {
            "metadata": {
                "base_model": spec.base_model,
                "training_steps": finished.done,
                "lora_rank": spec.llm_parameters.rank,
                "lora_alpha": spec.llm_parameters.alpha,
            },
            "training_metric": {
                "loss": finished.facts.get("loss"),
                "epochs": finished.facts.get("epoch"),
                "perplexity_before": summary.get("perplexity_before"),
                "perplexity_after": summary.get("perplexity_after"),
                "verdict": summary.get("verdict"),
                "rows_used": summary.get("rows_used"),
                "rows_left_out": summary.get("rows_left_out"),
                "report_url": f"{model_url.rpartition('/')[0]}/{HTML_REPORT}",
            },
        }


def _date(given: str | None, order: Order) -> str:
    if given is None:
        return datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        return datetime.date.fromisoformat(given).isoformat()
    except ValueError:
        raise WrongField(order.at("template_date"), "is not a date such as 2026-05-31") from None
