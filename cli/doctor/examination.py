"""All checks, side by side, each within its time; and what comes out of them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from cli.doctor import backend, base_model, broker, machine, storage
from cli.doctor.findings import Finding, Verdict, fail, ok, warn
from cli.doctor.storage_rights import least_policy
from config import Settings
from utils.errors import TrainingServerError
from utils.settings.storage import Store

_SECONDS = 90.0
_GPU_SECONDS = 150.0  # `check_machine` gives up by itself before

Check = Callable[[Settings], list[Finding]]

CHECKS: tuple[tuple[str, Check, float], ...] = (
    ("broker", broker.examine, _SECONDS),
    ("storage", storage.examine, _SECONDS),
    ("backend", backend.examine, _SECONDS),
    ("GPU", machine.examine_gpu, _GPU_SECONDS),
    ("RAM", machine.examine_memory, _SECONDS),
    ("disk", machine.examine_disk, _SECONDS),
    ("trainer's confinement", machine.examine_confinement, _SECONDS),
    ("base model", base_model.examine, _SECONDS),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was found.

    Attributes:
        findings: In the checks' order.
        iam_policy: The least that S3 must allow the worker; None where the settings are wrong.
    """

    findings: tuple[Finding, ...]
    iam_policy: dict[str, Any] | None = None

    @property
    def healthy(self) -> bool:
        """Nothing failed."""
        return all(finding.verdict is not Verdict.FAIL for finding in self.findings)


def examine(
    settings: Settings,
    checks: tuple[tuple[str, Check, float], ...] = CHECKS,
    *,
    unknown: str | None = None,
) -> Diagnosis:
    """Run all checks. One that fails, breaks or hangs hides none of the others.

    Args:
        settings: What to examine.
        checks: How.
        unknown: A sentence about names that are no settings, where there are some.
    """
    running = [_Bounded(name, check, seconds, settings) for name, check, seconds in checks]
    findings = [_settings(settings, unknown)]
    for each in running:
        findings += each.findings()
    return Diagnosis(tuple(findings), least_policy(settings))


def _settings(settings: Settings, unknown: str | None) -> Finding:
    parts = (
        f"RabbitMQ {', '.join(settings.rabbitmq_host)}, queue {settings.training_queue}",
        f"images from {', '.join(settings.image_buckets)}",
        f"models to {settings.model_bucket_name}",
        f"state in {settings.state_bucket_name}",
        f"S3 at {_place(settings.main_store())}",
        *([f"state at {_place(settings.state_store())}"] if _apart(settings) else []),
        f"backend {settings.backend_api_url}",
        f"base model {settings.base_model}",
    )
    if unknown:
        return warn("settings", "; ".join((*parts, unknown)), "correct these names, or remove them")
    return ok("settings", "; ".join(parts))


def _place(store: Store) -> str:
    return store.endpoint or store.region


def _apart(settings: Settings) -> bool:
    return settings.state_store() != settings.main_store()


class _Bounded:
    """One check in a thread of its own, which is left alone when its time is over."""

    def __init__(self, name: str, check: Check, seconds: float, settings: Settings) -> None:
        self._name = name
        self._check = check
        self._seconds = seconds
        self._settings = settings
        self._end = time.monotonic() + seconds
        self._found: list[Finding] | None = None
        self._thread = threading.Thread(target=self._run, name=f"doctor-{name}", daemon=True)
        self._thread.start()

    def findings(self) -> list[Finding]:
        """What it found; or that it did not end."""
        self._thread.join(max(0.0, self._end - time.monotonic()))
        if self._found is None:
            detail = f"the check did not end within {self._seconds:.0f} s"
            return [fail(self._name, detail, "look at the network between here and there")]
        return self._found

    def _run(self) -> None:
        try:
            self._found = self._check(self._settings)
        except TrainingServerError as error:
            self._found = [fail(self._name, str(error))]
        except Exception as error:  # pylint: disable=broad-exception-caught  # the others go on
            detail = f"the check itself broke: {type(error).__name__}: {error}"
            self._found = [fail(self._name, detail, "please report this")]
