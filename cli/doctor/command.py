"""The doctor's runner and printer: settings in; a report, JSON or the S3 policy out."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import config
from cli.doctor import api_server, backend, base_model, broker, machine, storage
from cli.doctor.findings import Finding, Verdict, fail, ok, warn
from cli.doctor.storage_rights import least_policy
from config import Settings
from utils import logger
from utils.errors import ConfigurationError, TrainingServerError
from utils.wording import counted

HEALTHY, ILL, SETTINGS_WRONG = 0, 1, 2
_STYLES = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}
_SECONDS = 90.0
_GPU_SECONDS = 150.0  # longer than the time limit of the GPU test itself

Check = tuple[str, Callable[[Settings], Iterable[Finding]], float]
CHECKS: tuple[Check, ...] = (
    ("broker", lambda all_: broker.examine(all_.broker, all_.limits, all_.worker.kinds), _SECONDS),
    ("storage", lambda all_: storage.examine(all_.storage), _SECONDS),
    ("backend", lambda all_: backend.examine(all_.webhooks), _SECONDS),
    (
        "API",
        lambda all_: api_server.examine(all_.api, all_.webhooks.backend_api_url),
        _SECONDS,
    ),
    (
        "GPU",
        lambda all_: machine.examine_gpu(
            all_.trainer_environment(),
            allow_cpu=all_.trainer.allow_cpu,
            needed=any(kind.needs_gpu for kind in all_.kinds()),
            processes=all_.trainer_processes,
        ),
        _GPU_SECONDS,
    ),
    ("RAM", lambda _: machine.examine_memory(), _SECONDS),
    ("disk", lambda all_: machine.examine_disk(all_.worker.work_dir), _SECONDS),
    ("trainer's confinement", lambda _: machine.examine_confinement(), _SECONDS),
    (
        "base model",
        lambda all_: base_model.examine(all_.trainer, all_.trainer_environment()),
        _SECONDS,
    ),
)
"""Name, function and time limit in seconds of each check."""


def run(
    *,
    as_json: bool,
    show_all: bool = False,
    config_file: Path | None = None,
    console: Console | None = None,
) -> int:
    """Run all checks and report on standard output.

    Args:
        as_json: Print JSON with every detail.
        show_all: Also print the findings without a problem in full.
        config_file: A file with more settings.
        console: Standard output if None.

    Returns:
        0: a worker can be started; 1: a check failed; 2: the settings are wrong.
    """
    console = console or Console(emoji=False)
    try:
        settings = config.load(file=config_file)
    except ConfigurationError as error:
        remedy = "Set them in the environment, in .env or in a file named by --config."
        _report([fail("settings", str(error), remedy)], None, as_json, show_all, console)
        return SETTINGS_WRONG
    logger.configure(level="ERROR", log_format="text", secrets=settings.secrets())
    with Console(stderr=True).status("Running all checks. This can take up to two minutes."):
        findings = examine(settings, unknown=config.unknown_names(config_file))
    _report(_redacted(findings, settings), settings, as_json, show_all, console)
    return HEALTHY if is_healthy(findings) else ILL


def print_policy(*, config_file: Path | None = None, console: Console | None = None) -> int:
    """Print the least IAM policy that the worker needs.

    Returns:
        0; 2 if the settings are wrong.
    """
    try:
        settings = config.load(file=config_file)
    except ConfigurationError as error:
        Console(stderr=True).print(Text(str(error), "red"), soft_wrap=True)
        return SETTINGS_WRONG
    _print_whole(
        json.dumps(least_policy(settings.storage), indent=2), console or Console(emoji=False)
    )
    return HEALTHY


def is_healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.verdict is not Verdict.FAIL for finding in findings)


def examine(
    settings: Settings, checks: Sequence[Check] = CHECKS, *, unknown: str | None = None
) -> list[Finding]:
    """Run checks in parallel. A check that fails, breaks or hangs does not stop the others.

    Args:
        settings: The settings that are tested.
        checks: The checks, in the order of their findings.
        unknown: A sentence about unknown setting names, if there are any.
    """
    end_of = [_started(*check, settings) for check in checks]
    return [_settings(settings, unknown), *(each for end in end_of for each in end())]


def _started(
    name: str,
    check: Callable[[Settings], Iterable[Finding]],
    seconds: float,
    settings: Settings,
) -> Callable[[], list[Finding]]:
    """Start a check in a thread; the result waits for its findings."""
    found: list[Finding] = []

    def work() -> None:
        try:
            for finding in check(settings):
                found.append(finding)
        except TrainingServerError as error:
            found.append(fail(name, str(error), "Correct this and run the doctor again."))
        except Exception as error:  # pylint: disable=broad-exception-caught  # the others go on
            detail = f"The check itself failed: {type(error).__name__}: {error}"
            found.append(fail(name, detail, "Please report this as a bug."))

    thread = threading.Thread(target=work, name=f"doctor-{name}", daemon=True)
    thread.start()
    end = time.monotonic() + seconds

    def wait() -> list[Finding]:
        thread.join(max(0.0, end - time.monotonic()))
        if thread.is_alive():
            detail = f"The check did not end within {seconds:.0f} s."
            return [*found, fail(name, detail, "Check the network between this machine and it.")]
        return found

    return wait


def _settings(settings: Settings, unknown: str | None) -> Finding:
    broker_, storage_ = settings.broker, settings.storage
    main, state = storage_.main_store(), storage_.state_store()
    parts = (
        f"RabbitMQ {', '.join(broker_.rabbitmq_host)}, queue {broker_.training_queue}",
        f"images from {', '.join(storage_.image_buckets)}",
        f"models to {storage_.model_bucket_name}",
        f"state in {storage_.state_bucket_name}",
        f"S3 at {main.endpoint or main.region}",
        *([f"state at {state.endpoint or state.region}"] if state != main else []),
        f"backend {settings.webhooks.backend_api_url}",
        f"base model {settings.trainer.base_model}",
    )
    if unknown:
        return warn("settings", "; ".join((*parts, unknown)), "Correct or remove these names.")
    return ok("settings", "; ".join(parts))


def _redacted(findings: Iterable[Finding], settings: Settings) -> list[Finding]:
    """The findings without secrets: an answer of a backend or broker may repeat what was sent."""
    cleaned: Any = logger.Redactor(settings.secrets()).clean(
        [dataclasses.asdict(finding) for finding in findings]
    )
    return [Finding(**(values | {"verdict": Verdict(values["verdict"])})) for values in cleaned]


def _report(
    findings: list[Finding],
    settings: Settings | None,
    as_json: bool,
    show_all: bool,
    console: Console,
) -> None:
    if as_json:
        values = {
            "healthy": is_healthy(findings),
            "findings": [dataclasses.asdict(finding) for finding in findings],
            "iam_policy": least_policy(settings.storage) if settings else None,
        }
        print(json.dumps(values, indent=2), file=console.file)
        return
    # The last lines are the ones that a terminal still shows.
    findings = sorted(findings, key=lambda finding: list(Verdict).index(finding.verdict))
    _print_findings(findings, show_all, console)
    for finding in findings:
        if finding.command and (show_all or finding.verdict is not Verdict.OK):
            console.print(f"\nThe command ({finding.check}):\n", markup=False, highlight=False)
            _print_whole(finding.command, console)
    console.print()
    for line in _summary(findings, show_all):
        console.print(Text(line))


def _print_findings(findings: Iterable[Finding], show_all: bool, console: Console) -> None:
    """One line for each finding without a problem; a paragraph with the remedy for all others."""
    grid = Table.grid("verdict", "words", padding=(0, 2))
    grid.columns[1].overflow = "fold"
    for finding in findings:
        brief = finding.verdict is Verdict.OK and not show_all
        words = Text.assemble((finding.check, "bold"), ": ", finding.detail)
        if brief:
            words.no_wrap, words.overflow = True, "ellipsis"
        grid.add_row(Text(str(finding.verdict), _STYLES[finding.verdict]), words)
        if finding.remedy and not brief:
            grid.add_row("", Text(f"→ {finding.remedy}"))
    console.print(grid)


def _print_whole(text: str, console: Console) -> None:
    """Print without line breaks, so that the text can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _summary(findings: Sequence[Finding], show_all: bool) -> Iterator[str]:
    named = {
        verdict: [finding.check for finding in findings if finding.verdict is verdict]
        for verdict in Verdict
    }
    counts = (
        f"{len(named[Verdict.OK])} ok, {counted(len(named[Verdict.WARN]), 'warning')}, "
        f"{len(named[Verdict.FAIL])} failed"
    )
    if named[Verdict.OK] and not show_all:
        yield "--all prints every finding in full, with advice; --policy prints the S3 policy."
    if failed := named[Verdict.FAIL]:
        yield f"{counts} ({', '.join(failed)}): fix what failed, then run the doctor again."
    else:
        yield f"{counts}: a worker can be started."
