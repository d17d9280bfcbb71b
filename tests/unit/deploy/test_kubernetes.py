"""The manifests are valid by Kubernetes' own schemas and KEDA's, strictly, and fit the worker."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda import v1alpha1 as keda
from typer.testing import CliRunner

import config
import main
from api.serve import GRACE_SECONDS
from utils.errors import ConfigurationError
from utils.settings.groups import JobLimits

FOLDER = Path(__file__).parents[3] / "deploy" / "kubernetes"
KUBERNETES = "1.37.0"


def _documents() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{path.name} {document['kind']}", document)
        for path in sorted(FOLDER.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    ]


DOCUMENTS = _documents()
NAMED = dict(DOCUMENTS)
SCALED_JOB = NAMED["jobs.yaml ScaledJob"]
DEPLOYMENT = NAMED["deployment.yaml Deployment"]
API = NAMED["api.yaml Deployment"]
API_POD = API["spec"]["template"]["spec"]


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """The same schema, with every field refused that it does not know."""
    closed = copy.deepcopy(schema)
    for each in (closed, *closed.get("$defs", {}).values()):
        if "properties" in each:
            each.setdefault("additionalProperties", False)
    return closed


def _validate(document: dict[str, Any]) -> None:
    if document["apiVersion"].startswith("keda.sh/"):
        model = getattr(keda, document["kind"])
        jsonschema.validate(document, _strict(model.model_json_schema(by_alias=True)))
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def _pods() -> list[dict[str, Any]]:
    return [
        SCALED_JOB["spec"]["jobTargetRef"]["template"]["spec"],
        DEPLOYMENT["spec"]["template"]["spec"],
    ]


@pytest.mark.parametrize("name", NAMED)
def test_every_manifest_is_valid(name: str) -> None:
    _validate(NAMED[name])


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("jobs.yaml ScaledJob", ("spec", "rollout", "strategi"), "gradual"),
        ("jobs.yaml ScaledJob", ("spec", "maxReplicaCount"), "many"),
        ("deployment.yaml ScaledObject", ("spec", "cooldown"), 3),
        ("deployment.yaml Deployment", ("spec", "strategy", "maxSurge"), 0),
        ("deployment.yaml PodDisruptionBudget", ("spec", "selector"), "all"),
    ],
)
def test_a_manifest_with_a_mistake_is_not(name: str, path: tuple[str, ...], value: Any) -> None:
    document = copy.deepcopy(NAMED[name])
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        _validate(document)


def test_the_scaled_jobs_template_is_a_valid_job() -> None:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}}
    kubernetes_validate.validate(
        job | {"spec": SCALED_JOB["spec"]["jobTargetRef"]}, KUBERNETES, strict=True
    )


def test_a_message_starts_one_pod_and_never_two() -> None:
    spec = SCALED_JOB["spec"]
    assert spec["rollout"]["strategy"] == "gradual"
    assert spec["jobTargetRef"]["backoffLimit"] == 0
    assert {each["metadata"]["protocol"] for each in spec["triggers"]} == {"http"}
    queues = {each["metadata"]["queueName"] for each in spec["triggers"]}
    assert queues == {"model_training", "model_training.endings"}
    longest = JobLimits().max_job_seconds
    assert spec["jobTargetRef"]["activeDeadlineSeconds"] >= longest + 3600


def _pods_for(training: int, endings: int) -> int:
    """The pods that KEDA starts for ready messages while none runs.

    After `pkg/scaling/scaledjob/metrics.go` and the strategy `accurate` of KEDA 2.16 to 2.20.
    """
    spec = SCALED_JOB["spec"]
    ready = {"model_training": training, "model_training.endings": endings}
    metrics = [
        (ready[each["metadata"]["queueName"]], float(each["metadata"]["value"]))
        for each in spec["triggers"]
    ]
    active = [(length, length / value) for length, value in metrics if length > 0]
    assert spec["scalingStrategy"]["multipleScalersCalculation"] == "sum"
    wanted: int = math.ceil(min(sum(pods for _, pods in active), spec["maxReplicaCount"]))
    return int(min(sum(length for length, _ in active), wanted))


@pytest.mark.parametrize(
    ("training", "endings", "pods"),
    [(0, 0, 0), (1, 0, 1), (3, 0, 3), (0, 1, 1), (0, 100, 1), (3, 50, 4), (50, 50, 10)],
)
def test_a_single_ending_starts_a_pod_and_many_endings_take_none_from_the_jobs(
    training: int, endings: int, pods: int
) -> None:
    assert _pods_for(training, endings) == pods


def test_the_pod_for_one_message_runs_an_existing_command() -> None:
    container = _pods()[0]["containers"][0]
    assert "command" not in container, "the image's own entry point"
    asked = CliRunner().invoke(main.app, [*container["args"], "--help"])
    assert asked.exit_code == 0, asked.output


@pytest.mark.parametrize("pod", _pods())
def test_a_pod_has_one_gpu_no_rights_and_time_to_save(pod: dict[str, Any]) -> None:
    container = pod["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["securityContext"]["runAsUser"] == 1000
    assert pod["automountServiceAccountToken"] is False
    grace = float(NAMED["worker.yaml ConfigMap"]["data"]["SHUTDOWN_GRACE_SECONDS"])
    assert grace < pod["terminationGracePeriodSeconds"]
    mounted = {each["mountPath"] for each in container["volumeMounts"]}
    assert {"/models", "/work", "/tmp"} <= mounted


def test_the_config_map_has_valid_settings_and_secrets_are_references() -> None:
    values = NAMED["worker.yaml ConfigMap"]["data"]
    values = values | NAMED["api.yaml ConfigMap"]["data"]
    assert set(values) <= config.setting_names()
    secret = {
        "API_DATABASE_URL",
        "API_KEY_PEPPER",
        "RABBITMQ_PASS",
        "AWS_SECRET_ACCESS_KEY",
        "INTERNAL_API_TOKEN",
        "HF_TOKEN",
    }
    assert not secret & set(values)
    assert not [name for name, _ in DOCUMENTS if name.endswith(" Secret")]
    required = {"internal_api_token": "t" * 32, "backend_api_url": "https://backend.example"}
    config.load(_env_file=None, **{k.lower(): v for k, v in values.items()} | required)


def test_the_manifest_does_not_start_before_its_placeholder_is_replaced() -> None:
    values = {k.lower(): v for k, v in NAMED["worker.yaml ConfigMap"]["data"].items()}
    with pytest.raises(ConfigurationError, match="BACKEND_API_URL: still names the placeholder"):
        config.load(_env_file=None, **values | {"internal_api_token": "t" * 32})


def test_a_worker_connects_to_dns_the_broker_and_https_only() -> None:
    policy = NAMED["worker.yaml NetworkPolicy"]
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    rules = policy["spec"]["egress"]
    assert {port["port"] for rule in rules for port in rule["ports"]} == {53, 5672, 5671, 443}
    (block,) = [
        peer["ipBlock"] for rule in rules for peer in rule.get("to", ()) if "ipBlock" in peer
    ]
    assert "169.254.169.254/32" in block["except"]


@pytest.mark.parametrize("pod", _pods())
def test_shared_memory_fits_into_the_pods_memory(pod: dict[str, Any]) -> None:
    (shared,) = [volume for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert pod["containers"][0]["resources"]["limits"]["memory"] == "16Gi"


# ---- the API -------------------------------------------------------------------------------------


def _environment(container: dict[str, Any]) -> list[tuple[str, str]]:
    return [(kind, each[kind]["name"]) for each in container["envFrom"] for kind in each.keys()]


def test_the_api_runs_twice_and_is_updated_without_a_pause() -> None:
    assert API["spec"]["replicas"] == 2
    assert API["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    (container,) = API_POD["containers"]
    stop = container["lifecycle"]["preStop"]["sleep"]["seconds"] + GRACE_SECONDS
    assert stop < API_POD["terminationGracePeriodSeconds"]


def test_a_broker_or_store_that_is_away_does_not_take_the_api_out_of_service() -> None:
    (container,) = API_POD["containers"]
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready?check=database"


def test_a_pod_of_the_api_migrates_first_with_the_same_image_and_settings() -> None:
    (container,), (first,) = API_POD["containers"], API_POD["initContainers"]
    assert first["image"] == container["image"]
    assert _environment(first) == _environment(container)
    for each in (first, container):
        asked = CliRunner().invoke(main.app, [*each["args"], "--help"])
        assert asked.exit_code == 0, asked.output


def test_a_pod_of_the_api_has_no_rights_and_no_gpu() -> None:
    assert API_POD["securityContext"]["runAsUser"] == 1000
    assert API_POD["automountServiceAccountToken"] is False
    for each in (*API_POD["containers"], *API_POD["initContainers"]):
        assert each["securityContext"]["readOnlyRootFilesystem"] is True
        assert "nvidia.com/gpu" not in each["resources"]["limits"]


def test_the_settings_of_the_api_are_those_of_the_workers_and_its_own() -> None:
    values = {
        **NAMED["worker.yaml ConfigMap"]["data"],
        **NAMED["api.yaml ConfigMap"]["data"],
        "INTERNAL_API_TOKEN": "t" * 32,
        "API_DATABASE_URL": "postgresql+psycopg://user:password@host/name",
        "API_KEY_PEPPER": "p" * 32,
    }
    given: dict[str, Any] = {name.lower(): value for name, value in values.items()}
    with pytest.raises(ConfigurationError, match="BACKEND_API_URL: still names the placeholder"):
        config.load_api(_env_file=None, **given)
    given["backend_api_url"] = "https://train.example.org"
    settings = config.load_api(_env_file=None, **given)
    (container,) = API_POD["containers"]
    assert settings.api.api_port == container["ports"][0]["containerPort"]
