"""Hooks of mkdocs: top-level pages join the site; links to source files become plain text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
TOP_LEVEL = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add README, CHANGELOG and CONTRIBUTING, which are not below docs/."""
    for name, page in TOP_LEVEL.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, there in TOP_LEVEL.items():
            text = text.replace(f"]({other})", f"]({there})")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to files outside the site by their text.

    Args:
        markdown: Text of a page.
    """
    outside = r"(?<!!)\[([^\]]+)\]\((?:\.\./|deploy/|\.env|LICENSE)[^)]*\)"
    return re.sub(outside, r"\1", markdown)
