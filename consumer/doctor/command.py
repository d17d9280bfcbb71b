"""The doctor's command: settings in, a report for a person or JSON out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import config
from consumer.doctor.examination import Diagnosis, examine
from consumer.doctor.findings import Finding, Verdict, fail
from utils import logger
from utils.errors import ConfigurationError

HEALTHY, ILL, SETTINGS_WRONG = 0, 1, 2
_STYLES = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def run(*, as_json: bool, config_file: Path | None = None, console: Console | None = None) -> int:
    """Examine everything and report on standard output.

    Args:
        as_json: For scripts.
        config_file: More settings.
        console: Where to; standard output by default.

    Returns:
        0: a worker can be started; 1: something failed; 2: the settings are wrong.
    """
    console = console or Console(emoji=False)
    try:
        settings: config.Settings = config.load(file=config_file)
    except ConfigurationError as error:
        problem = fail("settings", str(error), "set them in the environment, .env or --config")
        _report(Diagnosis((problem,)), (), as_json, console)
        return SETTINGS_WRONG
    logger.configure(level="ERROR", log_format="text", secrets=settings.secrets())
    waiting = Console(stderr=True)
    with waiting.status("Looking at everything. What does not answer takes up to two minutes."):
        diagnosis = examine(settings, unknown=config.unknown_names(config_file))
    _report(diagnosis, settings.secrets(), as_json, console)
    return HEALTHY if diagnosis.healthy else ILL


def _report(diagnosis: Diagnosis, secrets: Iterable[str], as_json: bool, console: Console) -> None:
    # Foreign words (a backend's answer, a broker's) may hold what we sent them.
    cleaned: Any = logger.Redactor(secrets).clean(
        [dataclasses.asdict(finding) for finding in diagnosis.findings]
    )
    if as_json:
        values = {
            "healthy": diagnosis.healthy,
            "findings": cleaned,
            "iam_policy": diagnosis.iam_policy,
        }
        print(json.dumps(values, indent=2), file=console.file)
        return
    # What matters most comes last: it is what a terminal still shows.
    if diagnosis.iam_policy:
        console.print("The least that the worker needs on S3, as an IAM policy:\n")
        _print_whole(json.dumps(diagnosis.iam_policy, indent=2), console)
        console.print()
    findings = [Finding(**(values | {"verdict": Verdict(values["verdict"])})) for values in cleaned]
    _print_findings(findings, console)
    for finding in findings:
        if finding.command:
            console.print(f"\nThe command ({finding.check}):\n", markup=False, highlight=False)
            _print_whole(finding.command, console)
    console.print()
    _print_whole(_summary(findings), console)


def _print_findings(findings: Iterable[Finding], console: Console) -> None:
    """A paragraph each: verdict, check and what was found, then what to do."""
    grid = Table.grid("verdict", "words", padding=(0, 2))
    grid.columns[1].overflow = "fold"
    for finding in findings:
        words = Text.assemble((finding.check, "bold"), ": ", finding.detail)
        grid.add_row(Text(str(finding.verdict), _STYLES[finding.verdict]), words)
        if finding.remedy:
            grid.add_row("", Text(f"→ {finding.remedy}"))
    console.print(grid)


def _print_whole(text: str, console: Console) -> None:
    """As it stands, so that it can be copied whole."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _summary(findings: Iterable[Finding]) -> str:
    named = {
        verdict: [finding.check for finding in findings if finding.verdict is verdict]
        for verdict in Verdict
    }
    counts = (
        f"{len(named[Verdict.OK])} ok, {len(named[Verdict.WARN])} to know, "
        f"{len(named[Verdict.FAIL])} failed"
    )
    if failed := named[Verdict.FAIL]:
        return f"{counts} ({', '.join(failed)}): mend what failed, then run the doctor again."
    return f"{counts}: a worker can be started."
