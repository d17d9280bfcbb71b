"""Mutants change one place, run in a copy of the tree, and are killed by their module's tests."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.mutants.__main__ import EXTRA_TESTS, MODULES, main
from tools.mutants.mutation import Mutant, mutants_of
from tools.mutants.running import (
    Baseline,
    Outcome,
    Results,
    Trees,
    run_mutant,
    unit_tests_of,
)

ROOT = Path(__file__).parents[3]


def _made(source: str) -> dict[str, set[str]]:
    """The changed sources, by the kind of change."""
    made: dict[str, set[str]] = {}
    for mutant in mutants_of("m.py", source):
        made.setdefault(mutant.kind, set()).add(mutant.applied_to(source))
    return made


# ---- the changes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "kind", "changed"),
    [
        ("if a < b:\n    c = d", "comparison", "if a <= b:\n    c = d"),
        ("if a < b:\n    c = d", "negated", "if not (a < b):\n    c = d"),
        ("x = [y for y in z if y]", "negated", "x = [y for y in z if not (y)]"),
        ("x = a is None", "comparison", "x = a is not None"),
        ("x = a not in b", "comparison", "x = a in b"),
        ("x = (a) == (b)", "comparison", "x = (a) != (b)"),
        ("x = (a\n     and b)", "boolean", "x = (a\n     or b)"),
        ("x = not a", "negated", "x = (a)"),
        ("x = 'ä' + a - b", "arithmetic", "x = 'ä' + a + b"),
        ("x = a | {'b': c}", "operand removed", "x = a"),
        ("x = True", "constant", "x = False"),
        ("x = 0", "constant", "x = 1"),
        ("x = 60.0", "constant", "x = 600.0"),
        ("f(a)", "call removed", "pass"),
        ("x.y = a", "assignment removed", "pass"),
        ("x += a", "assignment removed", "pass"),
        ("del x[a]", "statement removed", "pass"),
        ("raise E", "raise removed", "pass"),
        ("def f():\n    return", "return removed", "def f():\n    pass"),
        ("def f():\n    return a", "result removed", "def f():\n    return None"),
        ("while a:\n    continue", "continue removed", "while a:\n    pass"),
        (
            "try:\n    a\nexcept E:\n    b = c",
            "error not handled",
            "try:\n    a\nexcept E:\n    raise\n    b = c",
        ),
    ],
)
def test_a_place_is_changed(source: str, kind: str, changed: str) -> None:
    assert changed in _made(source)[kind]


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring."""',
        "log.info('event', count=1)",
        "level = log.error if a else log.warning\nlevel('event')",
        "x: A | None",
        "def f(x: A | None) -> B | C: ...",
        "@dataclass(frozen=True)\nclass A: ...",
        "match x:\n    case _:\n        raise AssertionError(x)",
        "@abc.abstractmethod\ndef f():\n    g()",
        "x = Thread(daemon=True, name=f(1))",
    ],
)
def test_a_place_whose_change_no_test_could_notice_is_left_out(source: str) -> None:
    assert _made(source) == {}


@pytest.mark.parametrize("module", MODULES)
def test_each_mutant_of_the_core_is_valid_python_and_differs_from_it(module: str) -> None:
    source = (ROOT / module).read_text(encoding="utf-8")
    mutants = mutants_of(module, source)
    assert len(mutants) > 20
    unchanged = ast.dump(ast.parse(source))
    for mutant in mutants:
        assert ast.dump(ast.parse(mutant.applied_to(source))) != unchanged, mutant


def test_a_mutant_of_another_text_is_refused() -> None:
    with pytest.raises(ValueError, match="m.py:1 has changed"):
        Mutant("m.py", 1, 4, "constant", "0", "1").applied_to("x = 2")


# ---- the runs ------------------------------------------------------------------------------------

_MODULE = """\
def left(stock: int, taken: int) -> int:
    if taken > stock:
        raise ValueError(taken)
    return stock - taken


def never_tested(flag: bool) -> bool:
    return not flag
"""
_TESTS = """\
import pytest

from consumer.stock import left


def test_left():
    assert left(3, 3) == 0
    with pytest.raises(ValueError):
        left(3, 4)
"""


@pytest.fixture(name="tree")
def _tree(tmp_path: Path) -> Path:
    """A small project, and another module that no test imports."""
    files = {
        "pytest.ini": "[pytest]\npythonpath = .\n",
        "consumer/stock.py": _MODULE,
        "consumer/alone.py": "def f() -> bool:\n    return not f\n",
        "tests/unit/consumer/test_of_the_stock.py": _TESTS,
        ".gitignore": "build/\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    subprocess.run(("git", "init", "-q"), cwd=tmp_path, check=True)
    return tmp_path


def _contents(tree: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(tree)): path.read_bytes()
        for path in tree.rglob("*")
        if path.is_file() and not {".git", "build", "__pycache__"} & set(path.parts)
    }


def test_changes_that_tests_notice_are_killed_and_the_tree_stays_as_it_was(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(tree)
    arguments = ["--sample", "0", "--jobs", "2"]
    assert main(arguments, root=tree, modules=["consumer/stock.py"], extra={}) == 1
    said = capsys.readouterr().out
    assert "killed: consumer/stock.py:3: raise removed: raise ValueError(taken) -> pass" in said
    survived = said.partition("\nSurvived:")[2]
    assert "consumer/stock.py:8: negated: not flag -> (flag)" in survived
    assert "stock.py:3: raise removed" not in survived
    assert _contents(tree) == before

    # A second run knows the outcomes, until the code or its tests change.
    assert main(arguments, root=tree, modules=["consumer/stock.py"], extra={}) == 1
    again = capsys.readouterr().out
    assert "are known from an earlier run" in again and "[" not in again
    assert again.partition("\nSurvived:")[2] == survived


def test_a_mutant_whose_tests_never_end_is_killed_with_their_child_processes(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.mutants.running._SHORTEST_LIMIT", 2.0)
    name = "consumer/loop.py"
    (tree / name).write_text("def end():\n    x = 3\n    while x:\n        x -= 1\n", "utf-8")
    test = "tests/unit/consumer/test_loop.py"
    (tree / test).write_text(
        "from consumer.loop import end\n\ndef test_it():\n    end()\n", "utf-8"
    )
    (endless,) = (
        mutant
        for mutant in mutants_of(name, (tree / name).read_text(encoding="utf-8"))
        if mutant.kind == "assignment removed"
    )
    trees = Trees(tree, 1)
    with trees.made():
        assert run_mutant(trees, endless, Baseline((test,))) is Outcome.TIMED_OUT
        with trees.one() as copy:
            assert _contents(copy) == _contents(tree)


def test_a_stop_ends_the_tests_and_removes_the_copies_of_the_tree(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copies = tmp_path_factory.mktemp("copies")
    (tree / "tests/unit/consumer/test_of_the_stock.py").write_text(
        f"{_TESTS}\n\ndef test_forever():\n"
        f"    open({str(copies / 'pid')!r}, 'w').write(str(__import__('os').getpid()))\n"
        "    __import__('time').sleep(60)\n",
        encoding="utf-8",
    )
    code = (
        "import signal, sys; from pathlib import Path; from tools.mutants.__main__ import main\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"root = Path({str(tree)!r})\n"
        "main(['--jobs', '1'], root=root, modules=['consumer/stock.py'], extra={})"
    )
    environment = os.environ | {"TMPDIR": str(copies)}
    with subprocess.Popen((sys.executable, "-c", code), cwd=ROOT, env=environment) as process:
        for _ in range(600):
            if (copies / "pid").exists() and (pid := (copies / "pid").read_text("utf-8")):
                break
            time.sleep(0.05)
        process.terminate()
        assert process.wait(20) == 143
    assert not Path(f"/proc/{pid}").exists()
    assert not list(copies.glob("mutants-*"))


def test_a_module_without_a_unit_test_has_only_survivors(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([], root=tree, modules=["consumer/alone.py"], extra={}) == 1
    assert "no unit test" in capsys.readouterr().out


def test_tests_that_fail_without_a_change_give_no_result_about_mutants(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tree / "tests/unit/consumer/test_of_the_stock.py"
    test.write_text(f"{_TESTS}\n\ndef test_it():\n    assert not left(3, 1)\n", encoding="utf-8")
    assert main(["--sample", "1"], root=tree, modules=["consumer/stock.py"], extra={}) == 2
    assert "fail without a change" in capsys.readouterr().err


def test_an_outcome_is_kept_only_for_the_same_code_and_tests(tree: Path, tmp_path: Path) -> None:
    mutant, *_ = mutants_of("consumer/stock.py", _MODULE)
    tests = ["tests/unit/consumer/test_of_the_stock.py"]
    kept = tmp_path / "build" / "kept.json"
    results = Results(kept, tree)
    key = results.key(mutant, tests)
    results.put(key, Outcome.KILLED)
    assert Results(kept, tree).get(key) is Outcome.KILLED
    (tree / tests[0]).write_text(_TESTS + "\n", encoding="utf-8")
    assert Results(kept, tree).key(mutant, tests) != key


def test_the_same_seed_takes_the_same_sample(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = []
    for seed in ("1", "1", "2"):
        arguments = ["--list", "--sample", "4", "--seed", seed]
        assert main(arguments, root=tree, modules=["consumer/stock.py"], extra={}) == 0
        listed.append(capsys.readouterr().out)
    assert listed[0] == listed[1] != listed[2]
    assert len(listed[0].splitlines()) == 4


# ---- which tests belong to a module --------------------------------------------------------------


def test_tests_belong_to_a_module_by_their_name_by_an_import_or_by_the_list(tree: Path) -> None:
    for name, text in {
        "tests/unit/consumer/test_stock_is_counted.py": "",
        "tests/unit/consumer/test_stocks.py": "",
        "tests/unit/services/test_by_import.py": "from consumer import stock",
        "tests/unit/services/test_stock.py": "",
        "tests/unit/services/test_listed.py": "",
    }.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(text, encoding="utf-8")
    extra = {"consumer/stock.py": ["tests/unit/services/test_listed.py", "tests/none.py"]}
    assert [Path(path).name for path in unit_tests_of(tree, "consumer/stock.py", extra)] == [
        "test_of_the_stock.py",
        "test_stock_is_counted.py",
        "test_by_import.py",
        "test_listed.py",
    ]


def test_the_modules_of_the_list_exist() -> None:
    assert all((ROOT / module).is_file() for module in (*MODULES, *EXTRA_TESTS))
