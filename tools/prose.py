"""Checks the English of comments, docstrings, error texts, help texts, Markdown and names.

    python -m tools.prose                 # exit code 1 if a room has more findings than its limit
    python -m tools.prose cli tests/unit/cli   # list every finding below these paths
    python -m tools.prose --measure       # findings per 1,000 words, by room
    python -m tools.prose --tighten       # lower the limits in pyproject.toml to the present counts

A room is a top-level folder; files of the top level belong to the room `root`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import json
import re
import subprocess
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ROOT / "pyproject.toml"
# Third-party data, and files that quote the words of this list.
LEFT_OUT = (
    "requirements",
    "tests/corpus/",
    "tests/contract/",
    "tools/prose.py",
    "tests/unit/tools/test_prose.py",
)
COMMENTED = {".sh", ".yaml", ".yml", ".toml", ".conf", ".ini", ".example", ""}

PICTURE = "picture"
# Names with this word that are part of the wire, of a file's format or of a log event.
FIXED_NAMES = frozenset(
    {"pictures", "pictures_asked", "pictures_held_out", "pictures_left_out", "pictures_used"}
    | {"validation_pictures", "picture_left_out", "pictures_fetched"}
)

# Findings that are printed for a room above its limit.
SHOWN = 20
RELATIVE = "sentence opens with a free relative"
REMEDIES: Mapping[str, tuple[str, str]] = {
    RELATIVE: (
        "",
        "name the thing first (`files that …`, `the backend …`), or write `if` for `where`",
    ),
    "tell": (r"tell|tells|told|telling", "write `report`, `send` or `show`"),
    "say": (r"say|says|said|saying", "write `state`, `report`, `name` or `print`"),
    "lie": (r"lie|lies|lay|lain|lying", "write `is` or `is stored`"),
    "mend": (r"mend|mends|mended|mending", "write `repair` or `recover`"),
    "anew": (r"anew", "write `again` or `new`"),
    "beside": (r"beside", "write `next to`, `besides` or `in addition to`"),
    "nobody": (
        r"(?:no|some|any|every)body|whoever",
        "name the person or the program: the operator, the backend, a user",
    ),
    "whatever": (r"whatever", "write `any … that` or name the thing"),
    "alone": (r"(?<!stand-)alone", "write `only`"),
    "of its own": (
        r"of (?:its|their|one's|his|our) own|of ours",
        "write `its own …` or `a separate …`",
    ),
    "to be had": (r"(?:is|are|be|was) to be had|(?:not )?to be had", "write `available`"),
    PICTURE: (r"pictures?", "write `image`"),
}
_WORDS = re.compile(
    "|".join(
        rf"(?P<w{n}>\b(?:{words})\b)" for n, (words, _) in enumerate(REMEDIES.values()) if words
    ),
    re.I,
)
_OPENERS = "What|Whatever|Whoever|Who|Where|Wherever"
_OPENS = re.compile(rf"(?:\A\W*(?i:{_OPENERS})|(?<=[.!?:;])[\s*_]+(?:{_OPENERS}))\b(?![^.!?]*\?)")
# Code, addresses, and the phrase `to leave … alone`.
_SKIPPED = re.compile(
    r"``.+?``|`[^`]*`|https?://\S+|\{[^{}]*\}|\]\([^)]*\)|\b[Ll]ea?[vf]\w* (?:\w+ ){0,3}alone",
    re.S,
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One place to rewrite."""

    path: str
    line: int
    word: str
    text: str

    @property
    def room(self) -> str:
        """The room that the file belongs to."""
        return room_of(self.path)

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.word}: {REMEDIES[self.word][1]}: {self.text}"


def room_of(path: str) -> str:
    """The room of a file, given by its path below the root."""
    return path.partition("/")[0] if "/" in path else "root"


def check(path: str, line: int, text: str) -> Iterator[Finding]:
    """The findings in one text.

    Args:
        path: File that the text is from, below the root.
        line: Line of the file that the text begins in.
        text: A whole docstring, comment, string, paragraph or table cell.
    """
    plain = _SKIPPED.sub(lambda skipped: re.sub(r"\S", "x", skipped[0]), text)
    found = [(match.start(), RELATIVE) for match in _OPENS.finditer(plain)]
    names = list(REMEDIES)
    found += [
        (match.start(), names[int(match.lastgroup[1:])])
        for match in _WORDS.finditer(plain)
        if match.lastgroup
    ]
    for start, word in sorted(found):
        first = start + len(plain[start:]) - len(plain[start:].lstrip())
        excerpt = " ".join(text[max(0, first - 25) : first + 50].split())
        yield Finding(path, line + text.count("\n", 0, first), word, excerpt)


def texts(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Every text in a file that a person reads, with its first line."""
    match Path(path).suffix:
        case ".py":
            yield from _comments(source)
            yield from _strings(source, only_docstrings=path.startswith("tests/"))
            yield from _names(source, strings=not path.startswith("tests/"))
        case ".md":
            yield from _markdown(source)
        case suffix if suffix in COMMENTED:
            yield from _lines(source, r"^\s*#+(?!!) ?(.*)|\s#\s(.*)|(?:summary|description): (.*)")


def _comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments of Python; lines that follow each other are one text."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if block and (token.start[0] != last + 1 or token.line.strip() != token.string):
            yield first, "\n".join(block)
            block = []
        if re.match(r"# ?(pylint|type|noqa|hadolint|mypy|ruff)\b", token.string):
            continue
        if not block:
            first = token.start[0]
        block.append(token.string.lstrip("# "))
        last = token.start[0]
    if block:
        yield first, "\n".join(block)


def _strings(source: str, *, only_docstrings: bool) -> Iterator[tuple[int, str]]:
    """Docstrings, names of tests and, in the product, every string of three words or more."""
    tree = ast.parse(source)
    docstrings = {
        id(body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (body := node.body)
        and isinstance(body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if name.startswith("test_"):
                    yield node.lineno, name.removeprefix("test_").replace("_", " ")
            case ast.Constant(value=str() as text):
                words = len(re.findall(r"[A-Za-z]{2,}", text))
                if id(node) in docstrings or (not only_docstrings and words > 2 and " " in text):
                    yield node.lineno, text


def _names(source: str, *, strings: bool) -> Iterator[tuple[int, str]]:
    """Names in code that contain `picture`, as words; with `strings` also names in strings."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if name.startswith("test_"):
                    continue  # read as a sentence
            case ast.ClassDef(name=name) | ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                pass
            case ast.Constant(value=str() as name) if strings and name.isidentifier():
                pass
            case _:
                continue
        if PICTURE in name.lower() and name not in FIXED_NAMES:
            yield node.lineno, re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", name)


def _markdown(source: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, list items, headings and table cells, without blocks of code."""
    without = re.sub(
        r"^( *)```.*?^ *```",
        lambda skipped: "\n" * skipped[0].count("\n"),
        source,
        flags=re.M | re.S,
    )
    paragraph: list[str] = []
    first = 1
    for number, line in enumerate([*without.splitlines(), ""], 1):
        starts = re.match(r"\s*(#+|[-*]|\d+\.|>|\|)\s", line)
        if paragraph and (starts or not line.strip()):
            yield first, "\n".join(paragraph)
            paragraph = []
        if line.startswith("|"):
            yield from ((number, cell.strip()) for cell in line.strip("|").split("|"))
        elif line.strip():
            first = first if paragraph else number
            paragraph.append(re.sub(r"^\s*(#+|[-*]|\d+\.|>)\s+", "", line))


def _lines(source: str, pattern: str) -> Iterator[tuple[int, str]]:
    """Comments of other languages; lines that follow each other are one text."""
    block: list[str] = []
    first = 0
    for number, line in enumerate([*source.splitlines(), ""], 1):
        match = re.search(pattern, line)
        text = next((group for group in match.groups() if group is not None), "") if match else ""
        if block and not text:
            yield first, "\n".join(block)
            block = []
        if text:
            first = first if block else number
            block.append(text)
    if block:
        yield first, "\n".join(block)


def files() -> Iterator[tuple[str, str]]:
    """Path and content of each file of the repository that is checked."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for path in sorted(listed):
        file = ROOT / path
        known = file.suffix in {".py", ".md"} | COMMENTED
        if known and file.is_file() and not path.startswith(LEFT_OUT):
            yield path, file.read_text(encoding="utf-8")


def read() -> tuple[list[Finding], Counter[str]]:
    """All findings, and the number of words that were read in each room."""
    findings: list[Finding] = []
    words: Counter[str] = Counter()
    for path, source in files():
        for line, text in texts(path, source):
            words[room_of(path)] += len(re.findall(r"[A-Za-z]{2,}", text))
            findings += check(path, line, text)
    return findings, words


def limits() -> dict[str, int]:
    """Findings that each room may have; a room that is not named may have none."""
    table: dict[str, int] = tomllib.loads(SETTINGS.read_text("utf-8"))["tool"]["prose"]["limits"]
    return table


def measure(findings: list[Finding], words: Counter[str]) -> str:
    """A table of the findings per 1,000 words, by room."""
    lines = [f"{'room':12} {'words':>8} {'free relatives':>14} {'findings':>8} {'per 1,000':>9}"]
    for room in [*sorted(words), "all"]:
        mine = [each for each in findings if room in (each.room, "all")]
        read_ = words[room] if room != "all" else words.total()
        opened = sum(each.word == RELATIVE for each in mine)
        rate, all_ = 1000 * opened / (read_ or 1), 1000 * len(mine) / (read_ or 1)
        lines.append(f"{room:12} {read_:8} {rate:14.2f} {len(mine):8} {all_:9.2f}")
    return "\n".join(lines)


def tighten(counts: Mapping[str, int]) -> None:
    """Write limits no higher than the counts; rooms without a finding lose their line."""
    text = SETTINGS.read_text(encoding="utf-8")
    allowed = {room: min(limit, counts.get(room, 0)) for room, limit in limits().items()}
    rows = "".join(
        f"{json.dumps(room)} = {limit}\n" for room, limit in sorted(allowed.items()) if limit
    )
    head, _, rest = text.partition("[tool.prose.limits]\n")
    after = rest[rest.find("\n[") :] if "\n[" in rest else ""
    SETTINGS.write_text(f"{head}[tool.prose.limits]\n{rows}{after}", encoding="utf-8")


def main() -> int:
    """Check, list, measure or tighten."""
    parser = argparse.ArgumentParser(description="Check the English of the repository.")
    parser.add_argument("paths", nargs="*", help="list every finding below these paths")
    parser.add_argument("--measure", action="store_true", help="print findings per 1,000 words")
    parser.add_argument("--tighten", action="store_true", help="lower the limits to the counts")
    options = parser.parse_args()
    findings, words = read()
    counts = Counter(each.room for each in findings)
    if options.measure:
        print(measure(findings, words))
        return 0
    if options.tighten:
        tighten(counts)
        return 0
    if options.paths:
        listed = [each for each in findings if each.path.startswith(tuple(options.paths))]
        print(*listed, f"{len(listed)} findings", sep="\n")
        return 1 if listed else 0
    allowed = limits()
    over = [room for room in counts if counts[room] > allowed.get(room, 0)]
    for room in over:
        print(*[each for each in findings if each.room == room][:SHOWN], sep="\n")
        print(
            f"{room}: {counts[room]} findings, {allowed.get(room, 0)} allowed. "
            f"`python -m tools.prose {room}` lists all of them."
        )
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
