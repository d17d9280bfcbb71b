"""Runs mutants: each in a copy of the tree, by the unit tests that belong to its module."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import hashlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tools.mutants.mutation import Mutant

TEST_FOLDERS = (
    "tests/unit/cli",
    "tests/unit/consumer",
    "tests/unit/images",
    "tests/unit/jobs",
    "tests/unit/services",
    "tests/unit/training",
)
_SHORTEST_LIMIT = 30.0  # seconds; a busy machine starts Python slowly
_LIMIT_FACTOR = 6.0
_PASSED, _NO_TESTS = 0, 5


class Outcome(enum.StrEnum):
    """The result of a mutant."""

    KILLED = "killed"
    TIMED_OUT = "killed by the time limit"
    SURVIVED = "survived"
    UNTESTED = "survived: no unit test belongs to its module"

    @property
    def is_killed(self) -> bool:
        """Whether a test noticed the change."""
        return self in (Outcome.KILLED, Outcome.TIMED_OUT)


class Ended(Exception):
    """The command was stopped."""


class BaselineFails(Exception):
    """The unit tests fail without any change."""


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A module's unit tests, as they run without a change.

    Attributes:
        tests: Paths relative to the root; empty if no unit test belongs to the module.
        seconds: How long they take.
    """

    tests: tuple[str, ...]
    seconds: float = 0.0

    @property
    def limit(self) -> float:
        """Seconds after which a mutant that still runs counts as killed."""
        return max(_SHORTEST_LIMIT, _LIMIT_FACTOR * self.seconds)


def unit_tests_of(root: Path, module: str, extra: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The unit tests that belong to a module.

    Those that are named after it (`test_outbox.py`, `test_outbox_parcels.py` for `outbox.py`), that
    import it, and that `extra` names.
    """
    dotted = module.removesuffix(".py").replace("/", ".")
    stem = Path(module).stem
    found = {path for path in extra.get(module, ()) if (root / path).exists()}
    for folder in TEST_FOLDERS:
        for path in sorted((root / folder).rglob("test_*.py")):
            name = path.relative_to(root).as_posix()
            named = path.stem == f"test_{stem}" or path.stem.startswith(f"test_{stem}_")
            same_room = folder.endswith(module.split("/", maxsplit=1)[0])
            if (named and same_room) or dotted in _imported(path.read_text(encoding="utf-8")):
                found.add(name)
    return tuple(sorted(found))


def _imported(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


class Trees:
    """Copies of the tree, one per worker; the tree itself is never written to.

    Args:
        root: The tree.
        count: How many copies.
    """

    def __init__(self, root: Path, count: int) -> None:
        self._root = root
        self._count = count
        self._free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._running: set[int] = set()
        self._ended = threading.Event()

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """The copies exist while the block runs."""
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            for number in range(self._count):
                copy = Path(folder) / str(number)
                for path in tracked(self._root):
                    (copy / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(self._root / path, copy / path)
                self._free.put(copy)
            yield

    @contextlib.contextmanager
    def one(self) -> Iterator[Path]:
        """A copy for one use; it must be given back as it was."""
        copy = self._free.get()
        try:
            yield copy
        finally:
            self._free.put(copy)

    def end(self) -> None:
        """End every run of tests at once, with all that it started, and begin none any more."""
        self._ended.set()
        for group in tuple(self._running):
            _end_group(group)

    def run(self, tree: Path, tests: Sequence[str], limit: float) -> int | None:
        """Run unit tests in a copy until one fails.

        Returns:
            pytest's exit code, or None if they were ended by the time limit.

        Raises:
            Ended: The runs were ended, so there is no result.
        """
        options = ("-q", "-x", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist")
        command = (sys.executable, "-m", "pytest", *options, *tests)
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command,
            cwd=tree,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # processes that the tests start end with them
        ) as process:
            self._running.add(process.pid)
            code: int | None = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(0 if self._ended.is_set() else limit)
            finally:
                _end_group(process.pid)
                self._running.discard(process.pid)
        if self._ended.is_set():
            raise Ended
        return code


def _end_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def tracked(root: Path) -> list[str]:
    """The files of the tree that git tracks, or would track."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    return [path for path in listed.stdout.split("\0") if path and (root / path).is_file()]


def baseline(trees: Trees, tests: tuple[str, ...]) -> Baseline:
    """Run a module's tests without a change.

    Raises:
        BaselineFails: They fail, twice.
    """
    if not tests:
        return Baseline(())
    for _ in range(2):
        with trees.one() as tree:
            began = time.monotonic()
            code = trees.run(tree, tests, 600.0)
            seconds = time.monotonic() - began
        if code == _PASSED:
            return Baseline(tests, seconds)
        if code == _NO_TESTS:
            return Baseline(())
    raise BaselineFails(f"these tests fail without a change: {' '.join(tests)}")


def run_mutant(trees: Trees, mutant: Mutant, base: Baseline) -> Outcome:
    """The outcome of one mutant."""
    if not base.tests:
        return Outcome.UNTESTED
    with trees.one() as tree:
        path = tree / mutant.path
        source = path.read_text(encoding="utf-8")
        path.write_text(mutant.applied_to(source), encoding="utf-8")
        try:
            code = trees.run(tree, base.tests, base.limit)
        finally:
            path.write_text(source, encoding="utf-8")
    if code is None:
        return Outcome.TIMED_OUT
    return Outcome.SURVIVED if code == _PASSED else Outcome.KILLED


class Results:
    """Outcomes that are already known, kept in a file so that an interrupted run can be continued.

    An outcome holds for as long as neither the product's code nor the module's tests change.

    Args:
        path: The file.
        root: The tree.
    """

    def __init__(self, path: Path, root: Path) -> None:
        self._path = path
        self._root = root
        self._known: dict[str, str] = {}
        if path.exists():
            self._known = json.loads(path.read_text(encoding="utf-8"))
        product = (name for name in tracked(root) if name.endswith(".py"))
        self._product = _hash_of(root, [name for name in product if not name.startswith("tests/")])

    def key(self, mutant: Mutant, tests: Sequence[str]) -> str:
        """A key of everything that an outcome depends on."""
        helpers = {
            name
            for name in tracked(self._root)
            if name.startswith("tests/") and name.endswith(".py") and "/test_" not in name
        }
        own = _hash_of(self._root, sorted({*tests, *helpers}))
        values = (*dataclasses.astuple(mutant), self._product, own)
        return hashlib.sha256(repr(values).encode()).hexdigest()

    def get(self, key: str) -> Outcome | None:
        """A known outcome."""
        return Outcome(self._known[key]) if key in self._known else None

    def put(self, key: str, outcome: Outcome) -> None:
        """Keep an outcome."""
        self._known[key] = outcome.value
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(self._known, indent=1), encoding="utf-8")
        partial.replace(self._path)


def _hash_of(root: Path, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + b"\0" + (root / name).read_bytes())
    return digest.hexdigest()


def in_parallel(jobs: int) -> ThreadPoolExecutor:
    """A pool of threads, each of which waits for one run of tests."""
    return ThreadPoolExecutor(jobs, thread_name_prefix="mutants")
