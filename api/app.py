"""The application: `create` puts settings, services, routes and duties together.

`main.py api` serves it, and so does any ASGI server: `gunicorn -k uvicorn_worker.UvicornWorker
'api.app:create()'`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from sqlalchemy import select

import config
from api.compat import chat_service, training_api
from api.duties.courier import Courier
from api.duties.hub import Hub
from api.duties.reconciler import Reconciler
from api.duties.relay import BrokerPart, Relay
from api.gate import problems
from api.gate.keys import ADMIN, DEFAULT_ORG, Keyring, ensure_organization
from api.gate.limits import Rates
from api.gate.requests import RequestMiddleware
from api.life.line import WaitingLine
from api.page.site import add_page
from api.reference import add_reference
from api.routes import (
    endpoints,
    events,
    experiments,
    files,
    jobs,
    models,
    ops,
    organization,
    uploads,
    webhooks,
)
from api.services import Buckets, Services
from api.store.database import Database, Writing
from api.store.migrating import migrate
from api.store.tables import ApiKeyRow
from services.broker.settlement import Queue
from services.s3.s3_service import open_store
from services.s3.uploads import open_uploads
from services.telemetry.tracing import Tracing, open_tracing
from services.webhooks.customers import CustomerWebhooks
from services.webhooks.verification import WebhookVerifier
from utils import logger
from utils.metrics import ApiMetrics

log = logger.get_logger(__name__)

DEFAULT_DATABASE = Path("data") / "api.db"
TITLE = "Training server"
LAST_SPANS_SECONDS = 3.0
_DESCRIPTION = "Order, follow and steer training jobs. Fine-tuning routes have OpenAI's form."


def create(settings: config.Settings | None = None) -> FastAPI:
    """The application.

    Args:
        settings: The settings; read from the environment if None.

    Raises:
        ConfigurationError: The settings are wrong.
    """
    settings = settings or config.load_api()
    logger.configure(
        level=settings.log.log_level, log_format=settings.log.log_format, secrets=settings.secrets()
    )
    services, broker = open_services(settings)
    duties = Duties(services, broker)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        duties.start()
        try:
            yield
        finally:
            duties.stop()

    app = FastAPI(
        title=TITLE,
        description=_DESCRIPTION,
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
    )
    app.state.services = services
    app.state.duties = duties
    app.state.relay = duties.relay
    problems.add_handlers(app)
    _add_routes(app)
    _describe_keys(app)
    app.add_middleware(RequestMiddleware, metrics=services.metrics)
    add_reference(app)
    add_page(app)
    return app


def _add_routes(app: FastAPI) -> None:
    for prefix, label in (("/v1/fine_tuning/jobs", "fine tuning"), ("/v1/jobs", "jobs")):
        app.include_router(jobs.routes(prefix, label))
        app.include_router(events.routes(prefix, label))
    for router in (
        events.everything,
        files.router,
        uploads.router,
        models.router,
        experiments.router,
        organization.router,
        endpoints.router,
        chat_service.router,
        training_api.router,
        webhooks.router,
        ops.router,
    ):
        app.include_router(router)


def _operation_id(route: APIRoute) -> str:
    return route.operation_id or route.name


def _describe_keys(app: FastAPI) -> None:
    """The way of authentication in the OpenAPI description."""
    original = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = original()
            schemes = schema.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes["key"] = {"type": "http", "scheme": "bearer"}
        return app.openapi_schema or {}

    setattr(app, "openapi", described)


def database_url(settings: config.Settings) -> str:
    """The address of the database: the setting, or SQLite below this folder."""
    given = settings.api.api_database_url
    if given is not None:
        return given.get_secret_value()
    return f"sqlite:///{DEFAULT_DATABASE.absolute()}"


def pepper_of(settings: config.Settings) -> bytes:
    """The secret of the hashes of API keys."""
    given = settings.api.api_key_pepper
    if given is not None:
        return given.get_secret_value().encode()
    token = settings.webhooks.internal_api_token.get_secret_value()
    return hmac.new(token.encode(), b"training-server api keys v1", hashlib.sha256).digest()


def _customers(settings: config.Settings) -> CustomerWebhooks:
    proxy = settings.webhooks.webhook_proxy
    return CustomerWebhooks(
        only_public=not settings.api.api_private_webhooks,
        ca_file=settings.webhooks.webhook_ca_file,
        proxy=proxy.get_secret_value() if proxy else None,
    )


def _tracing(settings: config.Settings) -> Tracing:
    telemetry = settings.telemetry
    headers = telemetry.otel_exporter_otlp_headers
    return open_tracing(
        telemetry.otel_exporter_otlp_endpoint,
        headers=headers.get_secret_value() if headers else "",
        service=f"{telemetry.otel_service_name}-api",
        secrets=settings.secrets(),
    )


def open_services(settings: config.Settings) -> tuple[Services, BrokerPart]:
    """The services of the settings, and the broker's connection. Nothing runs yet.

    The tables are brought to this version.

    Raises:
        ConfigurationError: The settings are wrong.
    """
    api, storage = settings.api, settings.storage
    url = database_url(settings)
    if api.api_database_url is None:
        DEFAULT_DATABASE.parent.mkdir(parents=True, exist_ok=True)
    database = Database(url)
    migrate(database)
    kinds = settings.kinds(every=True)
    s3 = open_store(storage.main_store())
    queues = tuple(Queue.of_kind(name) for name in kinds.served)
    broker = BrokerPart(settings.broker, queues)
    services = Services(
        settings=api,
        database=database,
        metrics=ApiMetrics(),
        keys=Keyring(database, pepper_of(settings)),
        rates=Rates(api.api_requests_per_minute),
        kinds=kinds,
        s3=s3,
        state_s3=open_store(storage.state_store()),
        uploads=open_uploads(s3, storage.main_store(), api.aws_public_endpoint_url_s3),
        buckets=Buckets(
            storage.aws_storage_bucket_name, storage.model_bucket_name, storage.state_bucket_name
        ),
        verifier=WebhookVerifier(
            settings.webhooks.internal_api_token.get_secret_value(),
            settings.webhooks.signing_secrets(),
        ),
        line=WaitingLine(api.broker_depth),
        hub=Hub(database),
        backend_url=settings.webhooks.backend_api_url,
        wake=threading.Event(),
        broker_state=broker.problem,
        customers=_customers(settings),
        tracing=_tracing(settings),
        is_open=api.api_open,
    )
    return services, broker


def first_key(app: FastAPI, settings: config.Settings) -> str | None:
    """An admin key for a database on this machine that has none; None for any other."""
    services: Services = app.state.services
    if settings.api.api_database_url is not None:
        return None

    def act(session: Writing) -> str | None:
        if session.scalar(select(ApiKeyRow.id).limit(1)) is not None:
            return None
        ensure_organization(session, DEFAULT_ORG, "Default")
        return services.keys.create(session, DEFAULT_ORG, name="first", scopes=[ADMIN])[1]

    return services.database.write(act)


class Duties:
    """The threads that run next to the routes.

    Args:
        services: The services.
        broker: The broker's connection.
    """

    def __init__(self, services: Services, broker: BrokerPart) -> None:
        self.relay = Relay(services, broker)
        self.reconciler = Reconciler(services)
        self.courier = Courier(services)
        self._services = services
        self._broker = broker
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start all of them."""
        self._broker.start()
        self._services.hub.begin()
        for name, run in (
            ("relay", self.relay.run),
            ("reconciler", self.reconciler.run),
            ("courier", self.courier.run),
            ("hub", self._services.hub.run),
        ):
            thread = threading.Thread(target=run, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)
        log.info("api_started", database=self._services.database.engine.dialect.name)

    def stop(self) -> None:
        """Stop all of them."""
        self._services.hub.stop()
        self.relay.stop()
        self.reconciler.stop()
        self.courier.stop()
        self._broker.stop()
        for thread in self._threads:
            thread.join(10)
        self._services.tracing.close(LAST_SPANS_SECONDS)
        self._services.database.close()
