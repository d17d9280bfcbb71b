"""The groups of the settings. Each function takes the group, or the few values, that it needs.

A field's name is the setting's name in lower case, so a search for a setting finds its uses.
`utils.settings.storage` has the group of the object storage. Groups are frozen, and each has
defaults for all that is not required, so a test makes one with the values that it is about.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)

from utils.errors import ConfigurationError
from utils.settings import values
from utils.settings.values import AbsolutePath, Group, Seconds
from utils.urls import base_of, origin_of

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

Host = Annotated[str, AfterValidator(values.host)]
Hosts = Annotated[tuple[Host, ...], BeforeValidator(values.split), Field(min_length=1)]
Delays = Annotated[
    tuple[Annotated[float, Field(gt=0, le=86400)], ...],
    BeforeValidator(values.split),
    Field(min_length=1),
]
Origin = Annotated[str, AfterValidator(base_of)]
Origins = Annotated[tuple[Origin, ...], BeforeValidator(values.split)]


class TrainerSettings(Group):
    """The trainer process: its base model, its device and its computing."""

    base_model: values.BaseModelName = values.BASE_MODEL
    base_model_revision: values.BaseModelRevision = None
    hf_token: SecretStr | None = None
    hf_home: AbsolutePath | None = None
    mixed_precision: Annotated[Literal["fp16", "bf16", "no"], BeforeValidator(values.lower)] = (
        "fp16"
    )
    gradient_checkpointing: Annotated[
        Literal["true", "false", "auto"], BeforeValidator(values.lower)
    ] = "true"
    fast_training: bool = True
    cuda_visible_devices: str | None = None
    allow_cpu: bool = False
    deterministic: bool = False
    omp_num_threads: str | None = Field(default=None, pattern=r"^[1-9]\d*(,[1-9]\d*)*$")
    stall_seconds: Seconds = 300.0
    trainer_processes: (
        Annotated[int, Field(ge=1, le=64)]
        | Annotated[Literal["auto"], BeforeValidator(values.lower)]
    ) = 1
    trainer_fsdp: bool = False

    def processes_on(self, gpus: int) -> int:
        """The processes of a trainer on a machine with so many GPUs.

        Raises:
            ConfigurationError: The machine has fewer GPUs than processes are set.
        """
        if self.trainer_processes == "auto":
            return max(1, gpus)
        if 0 < gpus < self.trainer_processes:
            raise ConfigurationError(
                f"TRAINER_PROCESSES={self.trainer_processes} needs a GPU for each process, and the "
                f"trainer may see {gpus}. Set TRAINER_PROCESSES=auto, or give it more GPUs "
                "(CUDA_VISIBLE_DEVICES)."
            )
        return self.trainer_processes


class LogSettings(Group):
    """The log of this process and of the trainer process."""

    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(values.upper)
    ] = "INFO"
    log_format: Literal["json", "text"] = "json"


class BrokerSettings(Group):
    """RabbitMQ: hosts, credentials and the queue."""

    rabbitmq_host: Hosts = ("localhost",)
    rabbitmq_port: int = Field(default=5672, ge=1, le=65535)
    rabbitmq_user: str = "guest"
    rabbitmq_pass: SecretStr = SecretStr("guest")
    rabbitmq_vhost: str = "/"
    rabbitmq_tls: bool = False
    rabbitmq_heartbeat_seconds: int = Field(default=20, ge=2, le=600)
    training_queue: str = Field(default="model_training", pattern=r"^[A-Za-z0-9._-]{1,100}$")


class WebhookSettings(Group):
    """The backend that receives webhooks, and how they are sent and signed."""

    # The addresses below are checked against this setting, so it comes first.
    allow_insecure_webhooks: bool = False
    backend_api_url: Origin = Field(description="the base URL of the backend")
    internal_api_token: SecretStr = Field(description="the bearer token that the backend expects")
    webhook_signing_secret: SecretStr | None = None
    webhook_allowed_origins: Origins = ()
    webhook_ca_file: Annotated[AbsolutePath, AfterValidator(values.certificates)] | None = None
    webhook_proxy: SecretStr | None = None

    @field_validator("internal_api_token")
    @classmethod
    def _token_fits_into_a_header(cls, value: SecretStr) -> SecretStr:
        token = value.get_secret_value()
        if len(token) < 32:
            raise ValueError("must have 32 characters or more")
        if not token.isascii() or " " in token:
            raise ValueError("must be ASCII without spaces, because an HTTP header carries it")
        return value

    @field_validator("webhook_signing_secret")
    @classmethod
    def _signing_secrets_are_well_formed(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            values.signing_secrets(value.get_secret_value())
        return value

    @field_validator("backend_api_url", "webhook_allowed_origins")
    @classmethod
    def _plain_http_stays_on_this_machine(cls, value: Any, info: ValidationInfo) -> Any:
        # If the switch itself is wrong, it is not in the data and is reported as its own problem.
        if info.data.get("allow_insecure_webhooks", True):
            return value
        for origin in (value,) if isinstance(value, str) else value:
            parts = urlsplit(origin)
            if parts.scheme == "http" and parts.hostname not in LOCAL_HOSTS:
                raise ValueError(
                    f"{origin} is plain http, which would show the token to the network. "
                    "Use https, or set ALLOW_INSECURE_WEBHOOKS=true"
                )
        return value

    @field_validator("webhook_allowed_origins")
    @classmethod
    def _each_origin_has_one_path(cls, value: Any, info: ValidationInfo) -> Any:
        bases = {*value, *filter(None, [info.data.get("backend_api_url")])}
        if len({origin_of(base) for base in bases}) < len(bases):
            raise ValueError(
                "lists an origin with two paths (BACKEND_API_URL counts). A message names only "
                "the origin, so each origin can have one path"
            )
        return value

    @field_validator("webhook_proxy")
    @classmethod
    def _the_proxy_is_an_address(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            values.proxy(value.get_secret_value())
        return value

    def signing_secrets(self) -> tuple[str, ...]:
        """The keys that sign webhooks, `whsec_…`; derived from the token if none is set."""
        if self.webhook_signing_secret:
            return tuple(values.split(self.webhook_signing_secret.get_secret_value()))
        return (values.derived_signing_secret(self.internal_api_token.get_secret_value()),)


class JobLimits(Group):
    """Limits, delays and intervals of a job's life."""

    progress_interval_seconds: Seconds = 30.0
    lease_ttl_seconds: float = Field(default=120.0, ge=1, allow_inf_nan=False)
    max_attempts: int = Field(default=3, ge=1, le=100)
    retry_delays_seconds: Delays = (10.0, 60.0, 600.0)
    ending_retry_delays_seconds: Delays = (60.0, 300.0, 1800.0, 7200.0)
    deduplication_window_seconds: float = Field(default=600.0, ge=0, allow_inf_nan=False)
    max_job_seconds: Seconds = 6 * 3600.0
    max_wait_seconds: Seconds | None = None
    max_job_bytes: int = Field(default=10 * 1024**3, ge=1024)
    max_machines: int = Field(default=3, ge=1)
    record_retention_days: float | None = Field(default=None, ge=1, allow_inf_nan=False)


class PageSettings(Group):
    """The address of the health and metrics pages."""

    http_host: str = "127.0.0.1"
    http_port: int = Field(default=8080, ge=0, le=65535)


class TelemetrySettings(Group):
    """OpenTelemetry traces and Sentry error reports."""

    otel_exporter_otlp_endpoint: Annotated[str, AfterValidator(values.http_address)] | None = None
    otel_exporter_otlp_headers: SecretStr | None = None
    otel_service_name: str = "training-server"
    sentry_dsn: SecretStr | None = None
    sentry_environment: str | None = None


class ApiSettings(Group):
    """The API server: its address, its database, its keys, and the limits of organisations."""

    api_database_url: SecretStr | None = None
    api_host: str = "127.0.0.1"
    api_port: int = Field(default=8000, ge=0, le=65535)
    api_key_pepper: SecretStr | None = None
    api_open: bool = False
    api_public_url: Origin | None = None
    api_style_id_start: int = Field(default=1_000_000_000, ge=1, le=2**53)
    api_max_file_bytes: int = Field(default=512 * 1024**2, ge=1)
    api_max_storage_bytes: int = Field(default=100 * 1024**3, ge=1)
    api_requests_per_minute: int = Field(default=1200, ge=1)
    api_creates_per_minute: int = Field(default=120, ge=1)
    api_silent_seconds: Seconds = 120.0
    api_private_webhooks: bool = False
    gpu_price_per_hour: float | None = Field(default=None, ge=0, le=1_000_000, allow_inf_nan=False)
    api_notice: str | None = Field(default=None, max_length=500)
    max_concurrent_trainings: int = Field(default=2, ge=1)
    broker_depth: int = Field(default=2, ge=1)
    aws_public_endpoint_url_s3: Annotated[str, AfterValidator(values.endpoint)] | None = None

    @field_validator("api_open")
    @classmethod
    def _open_only_on_this_machine(cls, value: bool, info: ValidationInfo) -> bool:
        host = info.data.get("api_host", "127.0.0.1")
        if value and host not in LOCAL_HOSTS:
            raise ValueError(
                f"serves every caller without a key, so it needs API_HOST=127.0.0.1, not {host}. "
                "Set API_OPEN=false, or bind to the loopback address"
            )
        return value

    @field_validator("api_key_pepper")
    @classmethod
    def _pepper_is_long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 32:
            raise ValueError("must have 32 characters or more")
        return value
