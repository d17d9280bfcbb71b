"""The doctor's command: settings in; a report for a person, JSON or the S3 policy out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import config
from cli.doctor.examination import Diagnosis, examine
from cli.doctor.findings import Finding, Verdict, fail
from cli.doctor.storage_rights import least_policy
from utils import logger
from utils.errors import ConfigurationError
from utils.wording import counted

HEALTHY, ILL, SETTINGS_WRONG = 0, 1, 2
_SET_THEM = "set them in the environment, in .env or in a file named by --config"
_STYLES = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def run(
    *,
    as_json: bool,
    show_all: bool = False,
    config_file: Path | None = None,
    console: Console | None = None,
) -> int:
    """Examine everything and report on standard output.

    Args:
        as_json: For scripts; everything is in it.
        show_all: Print what is well in full, too, with the advice about it.
        config_file: More settings.
        console: Where to print; standard output by default.

    Returns:
        0: a worker can be started; 1: something failed; 2: the settings are wrong.
    """
    console = console or Console(emoji=False)
    try:
        settings: config.Settings = config.load(file=config_file)
    except ConfigurationError as error:
        diagnosis = Diagnosis((fail("settings", str(error), _SET_THEM),))
        _report(diagnosis, (), as_json, show_all, console)
        return SETTINGS_WRONG
    logger.configure(level="ERROR", log_format="text", secrets=settings.secrets())
    waiting = Console(stderr=True)
    with waiting.status("Testing everything. A service that does not answer takes two minutes."):
        diagnosis = examine(settings, unknown=config.unknown_names(config_file))
    _report(diagnosis, settings.secrets(), as_json, show_all, console)
    return HEALTHY if diagnosis.healthy else ILL


def print_policy(*, config_file: Path | None = None, console: Console | None = None) -> int:
    """Print the least that S3 must allow the worker, as an IAM policy, and nothing else.

    Args:
        config_file: More settings.
        console: Where to print; standard output by default.

    Returns:
        0; 2 if the settings are wrong.
    """
    try:
        settings: config.Settings = config.load(file=config_file)
    except ConfigurationError as error:
        Console(stderr=True).print(Text(str(error), "red"), soft_wrap=True)
        return SETTINGS_WRONG
    _print_whole(json.dumps(least_policy(settings), indent=2), console or Console(emoji=False))
    return HEALTHY


def _report(
    diagnosis: Diagnosis, secrets: Iterable[str], as_json: bool, show_all: bool, console: Console
) -> None:
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
    findings = [Finding(**(values | {"verdict": Verdict(values["verdict"])})) for values in cleaned]
    # A terminal still shows what comes last.
    order = list(Verdict)
    findings.sort(key=lambda finding: order.index(finding.verdict))
    _print_findings(findings, show_all, console)
    for finding in findings:
        if finding.command and (show_all or finding.verdict is not Verdict.OK):
            console.print(f"\nThe command ({finding.check}):\n", markup=False, highlight=False)
            _print_whole(finding.command, console)
    console.print()
    for line in _summary(findings, show_all):
        console.print(Text(line))


def _print_findings(findings: Iterable[Finding], show_all: bool, console: Console) -> None:
    """One line for each finding that is well; a paragraph with what to do for all others."""
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
    """As it stands, so that it can be copied whole."""
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
