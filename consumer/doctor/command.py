"""The doctor's command: settings in, a table or JSON out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import config
from consumer.doctor.examination import Diagnosis, examine
from consumer.doctor.findings import Finding, fail
from utils import logger
from utils.errors import ConfigurationError

HEALTHY, ILL, SETTINGS_WRONG = 0, 1, 2
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run(*, as_json: bool, console: Console | None = None) -> int:
    """Examine everything and report on standard output.

    Args:
        as_json: For scripts.
        console: Where to; standard output by default.

    Returns:
        0: a worker can be started; 1: something failed; 2: the settings are wrong.
    """
    console = console or Console(emoji=False)
    try:
        settings: config.Settings = config.load()
    except ConfigurationError as error:
        problem = fail("settings", str(error), "see .env.example")
        _report(Diagnosis((problem,)), (), as_json, console)
        return SETTINGS_WRONG
    logger.configure(level="ERROR", log_format="text", secrets=settings.secrets())
    diagnosis = examine(settings)
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
    findings = [Finding(**values) for values in cleaned]
    _print_table(findings, console)
    commands = [finding for finding in findings if finding.command]
    for finding in commands:
        console.print(f"\n{finding.check}, the command:", markup=False, highlight=False)
        console.print(f"  {finding.command}", markup=False, highlight=False, soft_wrap=True)
    if diagnosis.iam_policy:
        console.print("\nThe least that the worker needs on S3, as an IAM policy:")
        policy = json.dumps(diagnosis.iam_policy, indent=2)
        console.print(policy, markup=False, highlight=False, soft_wrap=True)
    counts = {word: sum(finding.verdict == word for finding in findings) for word in _STYLES}
    console.print(
        f"\n{counts['ok']} ok, {counts['warn']} to know, {counts['fail']} failed: "
        + ("a worker can be started." if diagnosis.healthy else "mend what failed first."),
        highlight=False,
    )


def _print_table(findings: Iterable[Finding], console: Console) -> None:
    table = Table("check", "result", "what was found", "what to do", show_lines=True)
    for finding in findings:
        style = _STYLES[finding.verdict]
        words = (Text(finding.check), Text(str(finding.verdict), style))
        table.add_row(*words, Text(finding.detail), Text(finding.remedy))
    console.print(table)
