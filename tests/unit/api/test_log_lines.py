"""Every warning and error that the API logs has a row in docs/api.md."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[3]


def logged() -> set[str]:
    """The names of all events that are logged as warnings or errors."""
    found = set()
    for path in (ROOT / "api").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(
                        value=ast.Name(id="log"), attr="warning" | "error" | "exception"
                    ),
                    args=[ast.Constant(value=name), *_],
                ):
                    found.add(str(name))
    return found


def test_every_log_line_of_the_api_has_a_remedy() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    names = logged()
    assert len(names) > 8
    assert not {name for name in names if f"`{name}`" not in page}
