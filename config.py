"""Settings: read once from the environment, `.env` and a file of `--config`, in this order.

This is the only module that reads the environment, and only the programs' starting points import
it: every other function takes the group of settings, or the few values, that it needs. Names and
defaults are those of docs/protocol.md, section 5; `.env.example` documents each of them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic import create_model as _create_model
from pydantic_settings import BaseSettings, DotEnvSettingsSource, SettingsConfigDict

from jobs import kinds as job_kinds
from jobs.addresses import AddressRules
from jobs.kinds import FIRST_KIND, REGISTRY, Kinds, TrainerOptions
from utils.confined import Confinement
from utils.errors import ConfigurationError
from utils.settings import file as settings_file
from utils.settings import names as names_of_settings
from utils.settings import values as setting_values
from utils.settings.groups import (
    ApiSettings,
    BrokerSettings,
    JobLimits,
    LogSettings,
    PageSettings,
    TelemetrySettings,
    TrainerSettings,
    WebhookSettings,
)
from utils.settings.parameters import DataclassSettings
from utils.settings.storage import StorageSettings
from utils.settings.surroundings import ROOT, confinement, trainer_environment
from utils.settings.values import Group

DEFAULT_KINDS = (FIRST_KIND,)
OF_KINDS = ("parameters", "options")
"""The two dataclasses of settings that a kind may have, as `JobKind` names them."""

_Place = tuple[str, ...]
_Loaded = TypeVar("_Loaded", bound="LocalSettings")


# ---- the settings of the kinds -------------------------------------------------------------------


def settings_of_kinds(section: str) -> dict[str, DataclassSettings]:
    """The settings of each registered kind that has any.

    Args:
        section: One of `OF_KINDS`.
    """
    classes = {name: job_kinds.load(place) for name, place in REGISTRY.items()}
    found = {name: getattr(kind, f"{section}_type") for name, kind in classes.items()}
    return {name: _kind_settings(each) for name, each in found.items() if each}


@functools.cache
def _kind_settings(dataclass: type[Any]) -> DataclassSettings:
    return DataclassSettings(dataclass)


def _of_kinds(section: str) -> Any:
    """The type of a field that holds a dataclass of each kind."""

    def read(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {
            name: (Annotated[Any, BeforeValidator(each.read)], Field({}))
            for name, each in settings_of_kinds(section).items()
        }
        return dict(_create_model(section, __base__=Group, **fields).model_validate(values))

    return Annotated[dict[str, Any], BeforeValidator(read)]


def _known_kinds(kinds: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [kind for kind in kinds if kind not in REGISTRY]:
        raise ValueError(
            f"unknown kind {', '.join(unknown)}. Known kinds: {', '.join(REGISTRY)}. Correct or "
            "remove the name; a newer kind needs a newer version of this server"
        )
    return tuple(dict.fromkeys(kinds))


# ---- the settings --------------------------------------------------------------------------------


class WorkerSettings(Group):
    """The worker process: the kinds of jobs that it takes, its folder and its shutdown."""

    kinds: Annotated[
        tuple[str, ...],
        BeforeValidator(setting_values.split),
        Field(min_length=1),
        AfterValidator(_known_kinds),
    ] = DEFAULT_KINDS
    work_dir: setting_values.AbsolutePath | None = None
    shutdown_grace_seconds: setting_values.Seconds = 8.0


class LocalSettings(Group):
    """The settings of training on this machine, without a broker, S3 and a backend.

    Attributes:
        parameters: The default parameters of each kind of job.
        options: The options of each kind of job.
        source: The file of `--config`.
    """

    trainer: TrainerSettings
    log: LogSettings
    pages: PageSettings
    parameters: _of_kinds("parameters")  # type: ignore[valid-type]
    options: _of_kinds("options")  # type: ignore[valid-type]
    source: Path | None = None

    def trainer_options(self, *, processes: int = 1) -> TrainerOptions:
        """The options of a trainer process, which it gets when it starts.

        Args:
            processes: Processes that train a run together (`TrainerSettings.processes_on`).
        """
        return TrainerOptions(
            base_model=self.trainer.base_model,
            base_model_revision=self.trainer.base_model_revision,
            mixed_precision=self.trainer.mixed_precision,
            gradient_checkpointing=self.trainer.gradient_checkpointing,
            fast_training=self.trainer.fast_training,
            allow_cpu=self.trainer.allow_cpu,
            deterministic=self.trainer.deterministic,
            log_level=self.log.log_level,
            log_format=self.log.log_format,
            processes=processes,
            fsdp=self.trainer.trainer_fsdp and processes > 1,
            stall_seconds=self.trainer.stall_seconds,
        )

    def trainer_environment(self, *, processes: int = 1) -> dict[str, str]:
        """The environment of the trainer process: ours, without the secrets it does not need.

        Args:
            processes: Processes that train a run together.
        """
        trainer = self.trainer
        return trainer_environment(
            os.environ,
            own=setting_names(),
            secrets=self.secrets(),
            hf_token=trainer.hf_token.get_secret_value() if trainer.hf_token else None,
            hf_home=trainer.hf_home,
            cuda_visible_devices=trainer.cuda_visible_devices,
            threads=trainer.omp_num_threads,
            deterministic=trainer.deterministic,
            processes=processes,
        )

    def trainer_confinement(self, *folders: Path, processes: int = 1) -> Confinement:
        """Files and processes that the trainer process cannot reach.

        Args:
            folders: Folders that the trainer works in.
            processes: Processes that train a run together; they connect to each other.
        """
        return confinement(
            os.environ,
            own=setting_names(),
            files=(Path(".env"), ROOT / ".env", *([self.source] if self.source else [])),
            writable=folders,
            caches=self.trainer_environment(),
            among_themselves=processes > 1,
        )

    def secrets(self) -> tuple[str, ...]:
        """Every secret value, for the log's redaction."""
        groups = [value for _, value in self if isinstance(value, Group)]
        found = [value for group in groups for _, value in group if isinstance(value, SecretStr)]
        return tuple(value.get_secret_value() for value in found)


class Settings(LocalSettings):
    """The settings of the worker and of the operators' commands."""

    worker: WorkerSettings
    limits: JobLimits
    broker: BrokerSettings
    storage: StorageSettings
    webhooks: WebhookSettings
    telemetry: TelemetrySettings
    api: ApiSettings

    def kinds(self, *, every: bool = False) -> Kinds:
        """All kinds of job, configured.

        Args:
            every: Serve all of them, not only those of `KINDS`: an operator's command deals with
                the jobs of every worker.
        """
        addresses = AddressRules(
            default_bucket=self.storage.aws_storage_bucket_name,
            allowed=self.storage.image_buckets,
            endpoint=self.storage.s3_endpoint,
        )
        configured = {
            name: job_kinds.KindSettings(
                addresses,
                dataclasses.asdict(self.parameters[name]) if name in self.parameters else {},
                dataclasses.asdict(self.options[name]) if name in self.options else {},
            )
            for name in REGISTRY
        }
        return Kinds(
            configured, addresses=addresses, served=tuple(REGISTRY) if every else self.worker.kinds
        )

    def trainer_options(self, *, processes: int = 1) -> TrainerOptions:
        """The options of a trainer process, which is ready for the first kind of `KINDS`."""
        runner = next(iter(self.kinds())).runner
        return dataclasses.replace(super().trainer_options(processes=processes), runner=runner)

    def trainer_processes(self, gpus: int) -> int:
        """The processes of the trainer on a machine with so many GPUs.

        Raises:
            ConfigurationError: More than one is set, and no kind of `KINDS` can use them, or the
                machine has fewer GPUs.
        """
        share = [kind.name for kind in self.kinds(every=True) if kind.shares_gpus]
        if set(share) & set(self.worker.kinds):
            return self.trainer.processes_on(gpus)
        if self.trainer.trainer_processes not in ("auto", 1):
            raise ConfigurationError(
                f"TRAINER_PROCESSES={self.trainer.trainer_processes}: of the kinds, only "
                f"{', '.join(share)} can train on several GPUs, and KINDS has "
                f"{', '.join(self.worker.kinds)}. Remove TRAINER_PROCESSES, and start one worker "
                "for each GPU (CUDA_VISIBLE_DEVICES)."
            )
        return 1

    def secrets(self) -> tuple[str, ...]:
        """Every secret value, with the signing secrets that are derived from the token."""
        return super().secrets() + self.webhooks.signing_secrets()

    def may_use_cpu(self) -> bool:
        """Whether a machine without a GPU may take the jobs of `KINDS`."""
        return self.trainer.allow_cpu or not any(kind.needs_gpu for kind in self.kinds())


# ---- reading them --------------------------------------------------------------------------------


def load(*, file: Path | None = None, **overrides: Any) -> Settings:
    """Read the settings of the worker and of the operators' commands.

    Args:
        file: More settings, in TOML or JSON; the environment and `.env` win over it.
        overrides: Values, by the settings' names in lower case, that win over the environment;
            `_env_file` names another file in place of `.env`, or None for no such file.

    Raises:
        ConfigurationError: One line for each problem, by the setting's name. It shows no value of
            a secret.
    """
    return _load(Settings, file, overrides)


def load_api(*, file: Path | None = None, **overrides: Any) -> Settings:
    """Read the settings of the API server; arguments and errors as for `load`.

    The API is the backend of its workers, so `BACKEND_API_URL` defaults to its own address.
    """
    return _load(Settings, file, overrides, is_backend=True)


def load_local(*, file: Path | None = None, **overrides: Any) -> LocalSettings:
    """Read the settings of local training; arguments and errors as for `load`."""
    return _load(LocalSettings, file, overrides)


def child_environment(
    settings: Mapping[str, str], *, without: Collection[str] = ()
) -> dict[str, str]:
    """The environment of a child process that this program configures.

    Settings of the environment and of `.env` are passed on, except those of some groups.

    Args:
        settings: Settings of the child, by name; they win.
        without: Names of groups, such as `broker`.
    """
    given = _reader(setting_names())().model_dump(exclude_unset=True)
    places = _places(Settings, _first_kind(given))
    own = setting_names()
    passed_on = {
        name.upper(): str(value)
        for name, value in given.items()
        if name in places and places[name][0] not in without
    }
    rest = {name: value for name, value in os.environ.items() if name.upper() not in own}
    return rest | passed_on | dict(settings)


def setting_names(*, every_spelling: bool = True) -> frozenset[str]:
    """The names of all settings, as the environment spells them.

    Args:
        every_spelling: Include the aliases, and the kinds' names without their prefix.
    """
    if not every_spelling:
        return frozenset(name.upper() for name in _canonical(_places(Settings, "")).values())
    return frozenset(name.upper() for kind in REGISTRY for name in _places(Settings, kind))


def unknown_names(file: Path | None = None) -> str | None:
    """A sentence about unknown names in `.env` and in a file of `--config`, or None.

    Only these files belong to this program: the environment is full of other programs' names.
    """
    found = {".env": {name.upper() for name in DotEnvSettingsSource(_Sources).env_vars}}
    if file:
        names = settings_file.read(file).keys() - names_of_settings.ALIASES_IN_FILES.keys()
        found[str(file)] = {name.upper() for name in names}
    environment = {name for name, value in os.environ.items() if value}
    given = (settings_file.read(file) if file else {}) | _reader(frozenset({"KINDS"}))().model_dump(
        exclude_unset=True
    )
    known = frozenset(name.upper() for name in _places(Settings, _first_kind(given)))
    return names_of_settings.unknown(found, known, environment)


class _Sources(BaseSettings):
    """Reads values as they are written, from the environment and `.env`."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,
    )


@functools.cache
def _reader(names: frozenset[str]) -> type[_Sources]:
    fields: dict[str, Any] = {name.lower(): (Any, None) for name in names}
    return _create_model("Given", __base__=_Sources, **fields)


def _load(
    kind: type[_Loaded],
    file: Path | None,
    overrides: Mapping[str, Any],
    *,
    is_backend: bool = False,
) -> _Loaded:
    given = _given(file, overrides, is_backend=is_backend)
    places = _places(kind, _first_kind(given), in_file=file is not None)
    values: dict[str, Any] = {place[0]: {} for place in places.values()}
    used: dict[_Place, str] = {}
    problems = []
    for name in [name for name in places if name in given]:
        other = used.setdefault(places[name], name)
        if str(given[other]) != str(given[name]):
            problems.append(
                f"{other.upper()} and {name.upper()}: two names of one setting, set to different "
                "values. Remove one of them"
            )
        _put(values, places[other], given[other])
    try:
        settings = kind.model_validate(values | {"source": file})
    except ValidationError as error:
        problems += _explained(error, _canonical(places) | used)
    if problems:
        # A required setting may be missing because it is set under a name that is not one.
        problems += filter(None, [unknown_names(file)])
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigurationError(f"The settings are wrong (see .env.example):{lines}")
    return settings


def _given(file: Path | None, overrides: Mapping[str, Any], *, is_backend: bool) -> dict[str, Any]:
    """The values that are set, by the names under which they are set, in lower case."""
    try:
        given = _reader(setting_names())(**overrides).model_dump(exclude_unset=True)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigurationError(f"The file .env cannot be read: {reason}.") from None
    if file:
        given = settings_file.read(file) | given
    if is_backend and not given.get("backend_api_url"):
        own = f"http://127.0.0.1:{given.get('api_port') or 8000}"
        given["backend_api_url"] = given.get("api_public_url") or own
    return given


def _places(kind: type[LocalSettings], first: str, *, in_file: bool = False) -> dict[str, _Place]:
    """Every accepted name, in lower case, with the place of its value in the settings.

    Args:
        kind: The settings.
        first: The kind of job whose settings also have a name without a prefix; empty for none.
        in_file: Include the names that only a file may have.
    """
    found: dict[str, _Place] = {}
    for group, field in dict(kind.model_fields).items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            found |= {name: (group, name) for name in field.annotation.model_fields}
    for section in OF_KINDS:
        for job, each in settings_of_kinds(section).items():
            for name, field_name in each.names.items():
                found[f"{job}_{name}"] = (section, job, field_name)
                if job == first:
                    found[name] = (section, job, field_name)
    aliases = names_of_settings.ALIASES | (names_of_settings.ALIASES_IN_FILES if in_file else {})
    return found | {alias: found[name] for alias, name in aliases.items() if name in found}


def _canonical(places: Mapping[str, _Place]) -> dict[_Place, str]:
    """The documented name of each place: the first one of several."""
    return {place: name for name, place in reversed(tuple(places.items()))}


def _first_kind(given: Mapping[str, Any]) -> str:
    kinds = setting_values.split(given.get("kinds", DEFAULT_KINDS))
    named = [str(kind) for kind in kinds] if isinstance(kinds, (tuple, list)) else []
    return next((kind for kind in named if kind in REGISTRY), *DEFAULT_KINDS)


def _put(values: dict[str, Any], place: _Place, value: Any) -> None:
    for part in place[:-1]:
        values = values.setdefault(part, {})
    values[place[-1]] = value


def _explained(error: ValidationError, names: Mapping[_Place, str]) -> Iterator[str]:
    """One line for each problem, by the name that the setting was set under."""
    for problem in error.errors(include_input=False, include_url=False):
        # A default that is derived from a wrong setting is not a second problem.
        if problem["type"] == "default_factory_not_called":
            continue
        place = tuple(map(str, problem["loc"]))
        name = names[place[: 3 if place[0] in OF_KINDS else 2]]
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            text = f"not set. Set it to {_description(place)}"
        item = problem["loc"][-1]
        position = f"item {item + 1}: " if isinstance(item, int) else ""
        yield f"{name.upper()}: {position}{text}"


def _description(place: _Place) -> str:
    group = dict(Settings.model_fields)[place[0]].annotation
    assert isinstance(group, type) and issubclass(group, Group)
    return group.model_fields[place[1]].description or "a value"
