"""The doctor's report on a terminal of 80 columns."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cli.doctor import command
from cli.doctor.findings import fail, ok, warn

LONG = "a sentence that is much longer than a line of a terminal that has eighty columns, " * 3


@pytest.fixture(name="environment", autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("nowhere"))
    monkeypatch.setenv("AWS_STORAGE_BUCKET_NAME", "media")
    monkeypatch.setenv("BACKEND_API_URL", "https://backend.example")
    monkeypatch.setenv("INTERNAL_API_TOKEN", "t" * 32)


def _report(monkeypatch: pytest.MonkeyPatch, show_all: bool = False) -> list[str]:
    findings = [
        fail("disk", LONG, "make room", command="rm -r /everything --that=is --very=long " * 3),
        ok("bucket", LONG, "some advice", command="an-optional-command"),
        warn("clock", "31 s ahead", "set it"),
        ok("RAM", "8 GiB"),
    ]
    monkeypatch.setattr(command, "examine", lambda *_, **__: findings)
    written = io.StringIO()
    console = Console(file=written, width=80)
    code = command.run(as_json=False, show_all=show_all, console=console)
    assert code == command.ILL
    return written.getvalue().splitlines()


def test_a_successful_check_takes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _report(monkeypatch)
    first = [line for line in lines if line.startswith("ok")]
    assert len(first) == 2 and first[0].startswith("ok    bucket: ") and first[0].endswith("…")
    assert lines[:2] == first and all(len(line) <= 80 for line in first)
    text = " ".join(lines)
    assert "some advice" not in text and "an-optional-command" not in text


def test_failures_come_last_in_full_with_their_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _report(monkeypatch)
    verdicts = [
        line.split()[0] for line in lines if line.split()[:1] in (["ok"], ["warn"], ["fail"])
    ]
    assert verdicts == ["ok", "ok", "warn", "fail"]
    assert " ".join(" ".join(lines).split()).count(LONG.strip()) == 1
    assert "→ make room" in " ".join(lines)
    command_line = next(line for line in lines if line.startswith("rm -r"))
    assert command_line.count("--that") == 3  # in one piece, to be copied


def test_the_option_all_shows_successful_checks_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(" ".join(_report(monkeypatch, show_all=True)).split())
    assert text.count(LONG.strip()) == 2
    assert "→ some advice" in text and "an-optional-command" in text


def test_the_report_does_not_contain_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(_report(monkeypatch))
    assert "2012-10-17" not in text and "--policy" in text


def test_the_policy_is_printed_without_anything_else() -> None:
    written = io.StringIO()
    assert command.print_policy(console=Console(file=written, width=80)) == command.HEALTHY
    assert written.getvalue().startswith("{\n")


def test_the_last_line_counts_and_names_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    last = _report(monkeypatch)[-1]
    assert last == "2 ok, 1 warning, 1 failed (disk): fix what failed, then run the doctor again."
