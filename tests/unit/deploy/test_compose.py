"""The compose stack is consistent, the settings in it are valid, and its services have limits.

`scripts/lint` checks that the file is valid Compose.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import config
from api.serve import GRACE_SECONDS

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
TEXT = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
STACK: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
LASTING = {name: each for name, each in SERVICES.items() if each.get("restart") != "no"}
WORKER, API = SERVICES["worker"], SERVICES["api"]
OPTIONAL = {"HF_TOKEN", "BACKEND_API_URL", "AWS_PUBLIC_ENDPOINT_URL_S3"}
EXAMPLE = dict(
    line.split("=", 1)
    for line in (DEPLOY / "compose.env.example").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)


def _seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+)s", duration)
    assert match
    return float(match[1])


def test_the_example_lists_every_variable_and_no_secret_has_a_default() -> None:
    asked = dict(re.findall(r"\$\{(\w+)(?::?([?-][^}]*))?\}", TEXT))
    assert set(asked) - {"MINIO_USER"} == set(EXAMPLE)
    assert not any(EXAMPLE.values())
    required = {name for name, rest in asked.items() if rest.startswith("?")}
    assert required == set(EXAMPLE) - OPTIONAL


def _filled(service: dict[str, Any]) -> dict[str, str]:
    """The environment of a service, in lower case, with a value for each secret."""
    given = {name: str(value) for name, value in service["environment"].items()}
    assert set(given) <= config.setting_names()
    with_defaults = {
        name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text) for name, text in given.items()
    }
    return {
        name.lower(): re.sub(r"\$\{\w+:\?[^}]*\}", "whsec_" + "a" * 40, text)
        for name, text in with_defaults.items()
    }


def test_the_workers_environment_consists_of_valid_settings() -> None:
    values: dict[str, Any] = dict(_filled(WORKER))
    settings = config.load(_env_file=None, **values)
    assert settings.pages.http_host == "0.0.0.0"
    assert settings.worker.shutdown_grace_seconds < _seconds(WORKER["stop_grace_period"])


def test_the_workers_report_to_the_api_and_share_its_secrets_and_buckets() -> None:
    values: dict[str, Any] = dict(_filled(API))
    settings = config.load_api(_env_file=None, **values)
    assert settings.api.api_port == 8300 and not settings.api.api_open
    assert settings.api.api_database_url and settings.api.api_key_pepper
    assert _filled(WORKER)["backend_api_url"] == settings.webhooks.backend_api_url
    for name, text in WORKER["environment"].items():
        if name.startswith(("AWS", "MODEL", "STATE", "RABBITMQ", "WEBHOOK", "INTERNAL")):
            assert API["environment"][name] == text
    assert GRACE_SECONDS < _seconds(API["stop_grace_period"])


def test_the_api_has_the_names_and_ports_that_clients_of_the_documents_use() -> None:
    assert API["networks"]["default"]["aliases"] == ["ml-training"]
    assert {port.split(":", 1)[1] for port in API["ports"]} == {"8000:8300", "8300:8300"}


def test_the_stand_in_backend_starts_only_when_it_is_asked_for() -> None:
    profiles = {name: each["profiles"] for name, each in SERVICES.items() if "profiles" in each}
    assert profiles == {"backend": ["stand-in"]}


def test_the_worker_has_a_gpu_and_shared_memory_and_writes_only_to_its_volumes() -> None:
    (device,) = WORKER["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and "gpu" in device["capabilities"]
    assert WORKER["shm_size"] == "8gb" and WORKER["read_only"] is True
    targets = {each.split(":")[1] for each in WORKER["volumes"]}
    assert targets == {"/models", "/work"} and WORKER["tmpfs"][0].startswith("/tmp:")


@pytest.mark.parametrize("name", LASTING)
def test_a_service_restarts_and_has_limits_of_memory_and_log_size(name: str) -> None:
    service = LASTING[name]
    assert service["restart"] == "unless-stopped"
    assert {"max-size", "max-file"} <= set(service["logging"]["options"])
    assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"])


@pytest.mark.parametrize("name", SERVICES)
def test_an_image_is_built_here_or_has_a_fixed_tag(name: str) -> None:
    service = SERVICES[name]
    if "build" in service:
        dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
        assert f" AS {service['build']['target']}\n" in dockerfile
    else:
        assert re.search(r":(v|RELEASE\.)?\d+[.-]\d+[^:]*$", service["image"])


def test_ports_are_published_on_localhost_only() -> None:
    published = [port for each in SERVICES.values() for port in each.get("ports", ())]
    assert published and all(port.startswith("127.0.0.1:") for port in published)


def test_every_mounted_file_and_volume_exists() -> None:
    for each in SERVICES.values():
        for mount in each.get("volumes", ()):
            source = mount.split(":")[0]
            known = (DEPLOY / source).exists() if source.startswith(".") else None
            assert known if known is not None else source in STACK["volumes"]


def test_prometheus_scrapes_services_of_the_stack() -> None:
    scrapes = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    named = [
        name.split(":")[0]
        for scrape in scrapes["scrape_configs"]
        for kind, key in (("dns_sd_configs", "names"), ("static_configs", "targets"))
        for part in scrape.get(kind, ())
        for name in part[key]
    ]
    assert len(named) == 3 and set(named) <= set(SERVICES)
