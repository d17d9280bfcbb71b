"""Finds the places of a module where one small change makes a mutant.

Changes are made in the text and not in the syntax tree, so that a mutant differs from the source in
only one place. Places where a change has no effect that a test could see are left out: log lines,
annotations, decorators, docstrings, names of threads, and branches that state their own
impossibility (`raise AssertionError`).
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator

_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.Pow: "*",
}
_WITHOUT_EFFECT = frozenset({"name", "daemon", "exc_info", "encoding", "target"})
"""Keyword arguments that tests cannot be expected to notice, or whose loss breaks every test."""

_LOGS = frozenset({"log", "logger", "logging", "level"})
"""Names whose calls write log lines; `level` is the method chosen for one."""


@dataclasses.dataclass(frozen=True, order=True, slots=True)
class Mutant:
    """One change of one module.

    Attributes:
        path: The module, relative to the root.
        line: Line of the change, counted from 1.
        column: Column in characters, counted from 0.
        kind: The sort of change.
        old: The text before.
        new: The text after.
    """

    path: str
    line: int
    column: int
    kind: str
    old: str
    new: str

    def applied_to(self, source: str) -> str:
        """The module's text with this change.

        Raises:
            ValueError: The text is not the one that the mutant was made from.
        """
        lines = source.splitlines(keepends=True)
        start = sum(map(len, lines[: self.line - 1])) + self.column
        if not source.startswith(self.old, start):
            raise ValueError(f"{self.path}:{self.line} has changed")
        return source[:start] + self.new + source[start + len(self.old) :]


def mutants_of(path: str, source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of their places."""
    return sorted(set(_Finder(path, source).mutants()))


class _Finder:
    """Walks through a module's syntax."""

    def __init__(self, path: str, source: str) -> None:
        self._path = path
        self._lines = source.splitlines(keepends=True)
        self._tree = ast.parse(source, filename=path)

    def mutants(self) -> Iterator[Mutant]:
        """All of them; a place may come twice."""
        yield from self._walk(self._tree)

    def _walk(self, node: ast.AST) -> Iterator[Mutant]:
        if _is_left_out(node):
            return
        yield from self._changes(node)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._walk(child)

    def _changes(self, node: ast.AST) -> Iterator[Mutant]:
        for test in _conditions_of(node):
            yield self._replaced(test, "negated", f"not ({self._text(test)})")
        match node:
            case ast.stmt():
                yield from self._changed_statement(node)
            case ast.expr():
                yield from self._changed_expression(node)
            case ast.ExceptHandler(body=[first, *_]) if not isinstance(first, ast.Raise):
                yield self._inserted(first, "error not handled", "raise")

    def _changed_expression(self, node: ast.expr) -> Iterator[Mutant]:
        match node:
            case ast.Compare():
                operands = [node.left, *node.comparators]
                for before, op, after in zip(operands, node.ops, node.comparators):
                    yield self._between(before, after, "comparison", _COMPARISONS[type(op)])
            case ast.BoolOp():
                other = "or" if isinstance(node.op, ast.And) else "and"
                for before, after in zip(node.values, node.values[1:]):
                    yield self._between(before, after, "boolean", other)
            case ast.BinOp(op=ast.BitOr()) if not _is_type(node):
                yield self._replaced(node, "operand removed", self._text(node.left))
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                other = _ARITHMETIC[type(node.op)]
                yield self._between(node.left, node.right, "arithmetic", other)
            case ast.UnaryOp(op=ast.Not()):
                yield self._replaced(node, "negated", f"({self._text(node.operand)})")
            case ast.Constant(value=bool() | int() | float() as value):
                yield self._replaced(node, "constant", _other_number(value))

    def _changed_statement(self, node: ast.stmt) -> Iterator[Mutant]:
        match node:
            case ast.Expr(value=ast.Call() | ast.Await() | ast.Yield() | ast.YieldFrom()):
                yield self._replaced(node, "call removed", "pass")
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]) | ast.AugAssign():
                yield self._replaced(node, "assignment removed", "pass")
            case ast.Delete():
                yield self._replaced(node, "statement removed", "pass")
            case ast.Raise():
                yield self._replaced(node, "raise removed", "pass")
            case ast.Continue():
                yield self._replaced(node, "continue removed", "pass")
            case ast.Break():
                yield self._replaced(node, "break removed", "pass")
            case ast.Return(value=None):
                yield self._replaced(node, "return removed", "pass")
            case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
                yield self._replaced(node, "result removed", "return None")

    def _replaced(self, node: ast.expr | ast.stmt, kind: str, new: str) -> Mutant:
        column = self._column(node.lineno, node.col_offset)
        return Mutant(self._path, node.lineno, column, kind, self._text(node), new)

    def _between(self, before: ast.expr, after: ast.expr, kind: str, new: str) -> Mutant:
        """A mutant with another operator between two operands."""
        assert before.end_lineno is not None and before.end_col_offset is not None
        line = before.end_lineno
        column = self._column(line, before.end_col_offset)
        end = self._column(after.lineno, after.col_offset)
        old = self._cut(line, column, after.lineno, end)
        # Parentheses and line breaks between the operands stay where they are.
        core = old.strip(" \t\r\n()\\")
        at = old.index(core)
        return Mutant(self._path, line, column, kind, old, old[:at] + new + old[at + len(core) :])

    def _inserted(self, node: ast.stmt, kind: str, new: str) -> Mutant:
        column = self._column(node.lineno, node.col_offset)
        text = self._text(node)
        return Mutant(self._path, node.lineno, column, kind, text, f"{new}\n{' ' * column}{text}")

    def _text(self, node: ast.expr | ast.stmt) -> str:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self._column(node.lineno, node.col_offset)
        return self._cut(
            node.lineno, start, node.end_lineno, self._column(node.end_lineno, node.end_col_offset)
        )

    def _cut(self, line: int, column: int, end_line: int, end_column: int) -> str:
        if line == end_line:
            return self._lines[line - 1][column:end_column]
        between = self._lines[line : end_line - 1]
        return "".join(
            [self._lines[line - 1][column:], *between, self._lines[end_line - 1][:end_column]]
        )

    def _column(self, line: int, offset: int) -> int:
        """The place in characters of one that `ast` counts in bytes."""
        return len(self._lines[line - 1].encode()[:offset].decode())


def _conditions_of(node: ast.AST) -> list[ast.expr]:
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            # The negation of a negation is made where the inner one is.
            return [] if isinstance(test, (ast.Constant, ast.UnaryOp)) else [test]
        case ast.comprehension(ifs=tests):
            return tests
        case ast.match_case(guard=ast.expr() as guard):
            return [guard]
    return []


def _is_left_out(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Constant()) | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            left_out = True  # a docstring; what only a type checker reads
        case ast.Expr(value=ast.Call(func=func)) if _root(func) in _LOGS:
            left_out = True
        case ast.Assign(targets=[ast.Name(id="level")]):
            left_out = True  # the method that writes a log line
        case ast.Raise(exc=ast.Call(func=ast.Name(id="AssertionError"))):
            left_out = True
        case ast.keyword(arg=str() as name):
            left_out = name in _WITHOUT_EFFECT
        case ast.FunctionDef(decorator_list=decorators, name=name):
            abstract = any("abstract" in ast.unparse(one) for one in decorators)
            left_out = abstract or name == "__repr__"
        case ast.ClassDef(bases=bases):
            left_out = any(ast.unparse(base) == "Protocol" for base in bases)
        case _:
            left_out = False
    return left_out


def _root(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else ""


def _other_number(value: float) -> str:
    if isinstance(value, bool):
        return str(not value)
    # A second more of a minute is no mistake that a test must notice.
    return repr(value * 10 if abs(value) >= 10 else value + 1)


def _is_type(node: ast.expr) -> bool:
    """Whether an expression is a type or a union of types: only the type checker reads it."""
    match node:
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _is_type(left) and _is_type(right)
        case ast.Subscript(value=value):
            return _is_type(value)
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name[0].isupper() or name in ("str", "int", "float", "bool", "bytes", "dict")
        case ast.Constant(value=value):
            return value is None
    return False
