"""`scripts/chaos --mutants`: a short run for each mutant, which must fail for the right reason.

Each plan is first run without its mutant and must pass, or a finding would prove nothing. Results
as they should be are kept in a file, so that a run that was cut off, or missed one, goes on where
it stopped; a change of the product or of the suite makes them void.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from rich.console import Console

from tests.chaos import mutants
from tests.chaos.mutants import Mutant, SymbolGone

ROOT = Path(__file__).resolve().parents[2]
LONGEST_SECONDS = 180.0
_GRACE_SECONDS = 40.0
_TRIES = 2
"""Of a run that says nothing, because its broker did not start, say."""
_AT_ONCE = 2
"""Runs at a time: each of them mostly waits."""
_SOURCES = (
    *("main.py", "config.py", "api", "cli", "consumer", "conversations", "images", "jobs", "local"),
    *("reports", "sandbox"),
    *("services", "training", "utils", "tests/chaos"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """How one run ended.

    Attributes:
        passed: No invariant was broken.
        findings: The findings, as sentences.
        problem: The reason why the run gives no result; empty if it gives one.
    """

    passed: bool
    findings: list[str]
    seconds: float
    problem: str = ""


class Results:
    """The results so far, by plan and mutant, in a file; any thread may ask and add.

    Args:
        path: The file.
        version: Of the code; results of another are void.

    Attributes:
        turns: A lock for each name: a plan that several mutants share runs once.
    """

    def __init__(self, path: Path, version: str) -> None:
        self._path, self._version = path, version
        self._known: dict[str, Result] = {}
        self._lock = threading.Lock()
        self.turns: dict[str, threading.Lock] = collections.defaultdict(threading.Lock)
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["version"] == version:
                self._known = {name: Result(**one) for name, one in kept["results"].items()}

    def get(self, name: str) -> Result | None:
        """The result of this name."""
        return self._known.get(name)

    def put(self, name: str, result: Result) -> None:
        """Keep it."""
        with self._lock:
            self._known[name] = result
            kept = {
                "version": self._version,
                "results": {name: dataclasses.asdict(one) for name, one in self._known.items()},
            }
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(kept, indent=1), encoding="utf-8")


def run(folder: Path, chosen: Iterable[str] = ()) -> int:
    """Run the mutants; 0 if each of them was found.

    Args:
        folder: For logs and results.
        chosen: Names of mutants; none for all.
    """
    console = Console()
    wanted = [mutants.BY_NAME[name] for name in chosen] or list(mutants.MUTANTS)
    results = Results(folder / "mutants.json", _version())
    missed = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        judging = {pool.submit(_judge, mutant, results, folder): mutant for mutant in wanted}
        for judged in as_completed(judging):
            mutant, (verdict, is_found) = judging[judged], judged.result()
            console.print(
                f"{mutant.name:28} {verdict}",
                style="green" if is_found else "red",
                markup=False,
                soft_wrap=True,
            )
            if not is_found:
                missed.append(mutant.name)
    console.print(f"{len(wanted) - len(missed)} of {len(wanted)} mutants found; logs: {folder}")
    return 1 if missed else 0


def _judge(mutant: Mutant, results: Results, folder: Path) -> tuple[str, bool]:
    """The report about a mutant, and whether it was found."""
    try:
        for symbol, _ in mutant.changes:
            mutants.find(symbol)
    except SymbolGone as error:
        return f"not tried: {error}", False
    plan = " ".join(mutant.control)
    with results.turns[plan]:
        control = results.get(plan) or _run(mutant.control, folder / f"{mutant.name}-control")
        if control.problem or not control.passed:
            why = control.problem or control.findings[0]
            return f"not tried: its plan fails without it ({why})", False
        results.put(plan, control)
    mutated = (*mutant.plan, "--mutant", mutant.name)
    result = results.get(mutant.name) or _run(mutated, folder / mutant.name)
    seconds = f"{result.seconds:.0f} s"
    for finding in result.findings:
        if re.search(mutant.finding, finding):
            results.put(mutant.name, result)
            return f"found in {seconds}: {finding[:150]}", True
    if result.findings:
        return f"MISSED in {seconds}; other findings: {result.findings[0][:150]}", False
    return f"MISSED in {seconds}: {result.problem or mutant.promise}", False


def _run(plan: tuple[str, ...], folder: Path) -> Result:
    """Run a plan, and repeat it once if it gives no result."""
    for _ in range(_TRIES):
        result = _try(plan, folder)
        if not result.problem:
            break
    return result


def _try(plan: tuple[str, ...], folder: Path) -> Result:
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.chaos", *plan, "--folder", str(folder)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, said = process.communicate(timeout=LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it ends its workers and servers
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=_GRACE_SECONDS)
            process.kill()
            return Result(False, [], LONGEST_SECONDS, f"it took over {LONGEST_SECONDS:.0f} s")
    seconds = time.monotonic() - began
    broken = folder / "broken.txt"
    if not broken.exists():
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        return Result(False, [], seconds, f"the run itself failed: {last}")
    findings = broken.read_text(encoding="utf-8").splitlines()
    return Result(process.returncode == 0, findings, seconds)


def _version() -> str:
    digest = hashlib.sha256()
    for source in _SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(ROOT)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
