"""The compose stack is consistent, its worker's settings are valid, and its services have limits.

`scripts/lint` checks that the file is valid Compose.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import config
from config import Settings

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
TEXT = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
STACK: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = STACK["services"]
LASTING = {name: each for name, each in SERVICES.items() if each.get("restart") != "no"}
WORKER = SERVICES["worker"]
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
    assert required == set(EXAMPLE) - {"HF_TOKEN"}


def test_the_workers_environment_consists_of_valid_settings() -> None:
    given = {name: str(value) for name, value in WORKER["environment"].items()}
    assert {name.lower() for name in given} <= set(Settings.model_fields)
    filled = {
        name: re.sub(r"^\$\{.*\}$", "whsec_" + "a" * 40, text) for name, text in given.items()
    }
    values: dict[str, Any] = {name.lower(): text for name, text in filled.items()}
    settings: Settings = config.load(_env_file=None, **values)
    assert settings.http_host == "0.0.0.0"
    assert settings.shutdown_grace_seconds < _seconds(WORKER["stop_grace_period"])


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
    assert len(named) == 2 and set(named) <= set(SERVICES)
