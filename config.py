"""Settings: read once from the environment, `.env` and a file of `--config`, in this order; frozen;
every problem reported at once.

This is the only module that reads the environment. Names and defaults are those of
docs/protocol.md, section 5; `.env.example` documents each of them.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from jobs.style import HyperParameters, TrainerOptions
from utils.confined import Confinement
from utils.errors import ConfigurationError
from utils.settings import file as settings_file
from utils.settings import names as names_of_settings
from utils.settings import values as setting_values
from utils.settings.storage import Bucket, StorageSettings
from utils.settings.surroundings import ROOT, confinement, trainer_environment
from utils.urls import base_of, origin_of

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

SETTING_OF = {
    "rank": "lora_rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target": "lora_target",
}
"""Hyper-parameters whose setting has another name."""

PARAMETER_OF = {
    SETTING_OF.get(field.name, field.name): field.name
    for field in dataclasses.fields(HyperParameters)
}
"""The hyper-parameter that each training setting is the default of."""


def setting_names(kind: type[BaseSettings]) -> frozenset[str]:
    """The names of all settings of a kind, as the environment spells them."""
    return frozenset(name.upper() for name in tuple(kind.model_fields))


AbsolutePath = Annotated[Path, BeforeValidator(setting_values.path)]
Host = Annotated[str, AfterValidator(setting_values.host)]
Hosts = Annotated[
    tuple[Host, ...], NoDecode, BeforeValidator(setting_values.split), Field(min_length=1)
]
Delays = Annotated[
    tuple[Annotated[float, Field(gt=0, le=86400)], ...],
    NoDecode,
    BeforeValidator(setting_values.split),
    Field(min_length=1),
]
Origin = Annotated[str, AfterValidator(base_of)]
Origins = Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(setting_values.split)]
Buckets = Annotated[
    tuple[Bucket, ...], NoDecode, BeforeValidator(setting_values.split), Field(min_length=1)
]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class TrainerSettings(BaseSettings):
    """What training itself needs: enough for `python main.py train`."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    source: ClassVar[Path | None] = None  # the file of --config

    base_model: setting_values.BaseModel = setting_values.BASE_MODEL
    base_model_revision: setting_values.BaseModelRevision = None
    hf_token: SecretStr | None = None
    hf_home: AbsolutePath | None = None
    mixed_precision: Literal["fp16", "bf16", "no"] = "fp16"
    gradient_checkpointing: Literal["true", "false", "auto"] = "true"
    cuda_visible_devices: str | None = None
    allow_cpu: bool = False
    omp_num_threads: str | None = Field(None, pattern=r"^[1-9]\d*(,[1-9]\d*)*$")

    epochs: int = 100
    learning_rate: float = 1e-4
    optimizer: str = "adamw"
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    resolution: int = 512
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_target: str = "attention"
    rslora: bool = False
    lora_dropout: float = 0.1
    seed: int = 42
    snr_gamma: float = 5.0
    noise_offset: float = 0.0
    lr_schedule: str = "cosine"
    warmup_ratio: float = 0.05
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    caption_dropout: float = 0.1
    shuffle_tags: bool = False
    deliver: str = "last"

    min_images: int = Field(3, ge=1, le=200)
    max_image_bytes: int = Field(50 * 1024**2, ge=1024)
    max_image_pixels: int = Field(100_000_000, ge=64 * 64)
    checkpoint_interval: int = Field(10, ge=1)
    preview_share: float = Field(0.1, ge=0, le=1)
    sample_steps: int = Field(25, ge=1, le=100)
    tensorboard: Annotated[bool, AfterValidator(setting_values.tensorboard)] = False
    stall_seconds: Seconds = 300.0

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["json", "text"] = "json"
    work_dir: AbsolutePath | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _is_filled_in(cls, value: Any) -> Any:
        return setting_values.filled_in(value)

    @field_validator("gradient_checkpointing", "mixed_precision", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value

    # By field, as every check here: a check of the whole model would not run where another field is
    # wrong, and a person would find the problems one restart at a time.
    @field_validator(*PARAMETER_OF)
    @classmethod
    def _is_within_the_limits(cls, value: Any, info: ValidationInfo) -> Any:
        HyperParameters(**{PARAMETER_OF[str(info.field_name)]: value}).require_libraries()
        return value

    def hyper_parameters(self, **overrides: Any) -> HyperParameters:
        """The defaults of these settings with a message's own parameters over them.

        Raises:
            ValueError: A parameter is outside its limits, or asks for a library that is not there.
        """
        values = {name: getattr(self, setting) for setting, name in PARAMETER_OF.items()}
        parameters = HyperParameters(**(values | overrides))
        parameters.require_libraries()
        return parameters

    def trainer_options(self) -> TrainerOptions:
        """What the trainer process is told when it starts."""
        return TrainerOptions(
            base_model=self.base_model,
            base_model_revision=self.base_model_revision,
            mixed_precision=self.mixed_precision,
            gradient_checkpointing=self.gradient_checkpointing,
            allow_cpu=self.allow_cpu,
            log_level=self.log_level,
            log_format=self.log_format,
        )

    def trainer_environment(self) -> dict[str, str]:
        """The environment of the trainer process: ours, less the secrets it has no use for."""
        return trainer_environment(
            os.environ,
            own=setting_names(Settings),
            secrets=self.secrets(),
            hf_token=self.hf_token.get_secret_value() if self.hf_token else None,
            hf_home=self.hf_home,
            cuda_visible_devices=self.cuda_visible_devices,
            threads=self.omp_num_threads,
        )

    def trainer_confinement(self, *folders: Path) -> Confinement:
        """What the trainer process cannot reach: settings files, keys, other processes.

        Args:
            folders: Where it works.
        """
        return confinement(
            os.environ,
            own=setting_names(Settings),
            files=(Path(".env"), ROOT / ".env", *([self.source] if self.source else [])),
            writable=folders,
            caches=self.trainer_environment(),
        )

    def secrets(self) -> tuple[str, ...]:
        """Every secret value, for the log's redaction."""
        values = (getattr(self, name.lower()) for name in sorted(setting_names(type(self))))
        return tuple(value.get_secret_value() for value in values if isinstance(value, SecretStr))


class Settings(TrainerSettings, StorageSettings):
    """Everything that the worker needs; immutable."""

    rabbitmq_host: Hosts = ("localhost",)
    rabbitmq_port: int = Field(5672, ge=1, le=65535)
    rabbitmq_user: str = "guest"
    rabbitmq_pass: SecretStr = SecretStr("guest")
    rabbitmq_vhost: str = "/"
    rabbitmq_tls: bool = False
    rabbitmq_heartbeat_seconds: int = Field(20, ge=2, le=600)
    training_queue: str = Field("model_training", pattern=r"^[A-Za-z0-9._-]{1,100}$")

    image_buckets: Buckets = Field(
        default_factory=lambda data: tuple(
            dict.fromkeys((data["aws_storage_bucket_name"], data["model_bucket_name"]))
        )
    )

    allow_insecure_webhooks: bool = False  # the addresses below are judged by it, so it comes first
    backend_api_url: Origin
    internal_api_token: SecretStr
    webhook_signing_secret: SecretStr | None = None
    webhook_allowed_origins: Origins = ()
    webhook_ca_file: Annotated[AbsolutePath, AfterValidator(setting_values.certificates)] | None = (
        None
    )
    webhook_proxy: SecretStr | None = None

    progress_interval_seconds: Seconds = 30.0
    lease_ttl_seconds: float = Field(120.0, ge=1, allow_inf_nan=False)
    max_attempts: int = Field(3, ge=1, le=100)
    retry_delays_seconds: Delays = (10.0, 60.0, 600.0)
    ending_retry_delays_seconds: Delays = (60.0, 300.0, 1800.0, 7200.0)
    deduplication_window_seconds: float = Field(600.0, ge=0, allow_inf_nan=False)
    max_job_seconds: Seconds = 6 * 3600.0
    max_wait_seconds: Seconds | None = None
    max_job_bytes: int = Field(10 * 1024**3, ge=1024)
    max_machines: int = Field(3, ge=1)
    record_retention_days: float | None = Field(None, ge=1, allow_inf_nan=False)
    shutdown_grace_seconds: Seconds = 8.0

    http_host: str = "127.0.0.1"
    http_port: int = Field(8080, ge=0, le=65535)

    otel_exporter_otlp_endpoint: (
        Annotated[str, AfterValidator(setting_values.http_address)] | None
    ) = None
    otel_exporter_otlp_headers: SecretStr | None = None
    otel_service_name: str = "training-server"
    sentry_dsn: SecretStr | None = None
    sentry_environment: str | None = None

    @field_validator("internal_api_token")
    @classmethod
    def _token_is_long_enough(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value()) < 32:
            raise ValueError("must have 32 characters or more")
        return value

    @field_validator("webhook_signing_secret")
    @classmethod
    def _signing_secrets_are_well_formed(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            setting_values.signing_secrets(value.get_secret_value())
        return value

    @field_validator("backend_api_url", "webhook_allowed_origins")
    @classmethod
    def _webhooks_are_private(cls, value: Any, info: ValidationInfo) -> Any:
        # Where the switch itself is wrong it is not in the data; that problem is told by itself.
        if info.data.get("allow_insecure_webhooks", True):
            return value
        for origin in (value,) if isinstance(value, str) else value:
            parts = urlsplit(origin)
            if parts.scheme == "http" and parts.hostname not in LOCAL_HOSTS:
                raise ValueError(
                    f"{origin} is plain http and would show the token to the network; "
                    "use https, or set ALLOW_INSECURE_WEBHOOKS=true"
                )
        return value

    @field_validator("webhook_allowed_origins")
    @classmethod
    def _each_origin_has_one_path(cls, value: Any, info: ValidationInfo) -> Any:
        bases = {*value, *filter(None, [info.data.get("backend_api_url")])}
        if len({origin_of(base) for base in bases}) < len(bases):
            raise ValueError(
                "names an origin with two paths, counting BACKEND_API_URL; a message names an "
                "origin only, so each can have one path"
            )
        return value

    @field_validator("webhook_proxy")
    @classmethod
    def _the_proxy_is_an_address(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            setting_values.proxy(value.get_secret_value())
        return value

    def signing_secrets(self) -> tuple[str, ...]:
        """The keys that sign webhooks, `whsec_…`; derived from the token where none is set."""
        if self.webhook_signing_secret:
            return tuple(setting_values.split(self.webhook_signing_secret.get_secret_value()))
        return (setting_values.derived_signing_secret(self.internal_api_token.get_secret_value()),)

    def secrets(self) -> tuple[str, ...]:
        """Every secret value, the derived ones too."""
        return super().secrets() + self.signing_secrets()


def load(
    kind: type[TrainerSettings] = Settings, *, file: Path | None = None, **overrides: Any
) -> Any:
    """Read the settings.

    Args:
        kind: `Settings` for the worker, `TrainerSettings` for local training.
        file: More settings, in TOML or JSON; the environment and `.env` win over it.
        overrides: Values that win over the environment.

    Raises:
        ConfigurationError: One line a problem, by the setting's name; values are never shown.
    """
    try:
        return (_over(file, kind) if file else kind)(**overrides)
    except ValidationError as error:
        # A required setting may be missing because its name is another one by now.
        unknown = unknown_names(file)
        raise ConfigurationError(_explain(error) + (f"\n  {unknown}" if unknown else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise ConfigurationError(f"The file .env cannot be read: {reason}") from None


def _over(file: Path, kind: type[TrainerSettings]) -> type[TrainerSettings]:
    """The same settings, with a file below all other sources."""
    values = settings_file.read(file)

    class WithFile(kind):  # type: ignore[valid-type, misc]
        """As `kind`."""

        source: ClassVar[Path | None] = file

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,  # pylint: disable=unused-argument
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            """pydantic-settings' hook: the first source counts."""
            last = InitSettingsSource(settings_cls, values)
            return init_settings, env_settings, dotenv_settings, last

    return WithFile


def unknown_names(file: Path | None = None) -> str | None:
    """A sentence about the names in `.env` and in a file of `--config` that are no setting's, or
    None where there are none.

    Only the files are ours alone: the environment is full of other programs' names.
    """
    found = {".env": {name.upper() for name in DotEnvSettingsSource(Settings).env_vars}}
    if file:
        found[str(file)] = {name.upper() for name in settings_file.read(file)}
    environment = {name for name, value in os.environ.items() if value}
    return names_of_settings.unknown(found, setting_names(Settings), environment)


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_input=False, include_url=False):
        # A default that is made from a wrong setting is no problem of its own.
        if problem["type"] == "default_factory_not_called":
            continue
        name, *item = problem["loc"]
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "missing":
            text = "is required and not set"
        position = f"item {int(item[0]) + 1}: " if item else ""
        lines.append(f"  {str(name).upper()}: {position}{text}")
    return "The settings are wrong (see .env.example):\n" + "\n".join(lines)
