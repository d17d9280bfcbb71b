"""The documentation builds as a site, without network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tools.site_pages import on_page_markdown

ROOT = Path(__file__).parents[3]


def test_the_site_builds_and_loads_nothing_from_another_host(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.glob("*.html"))
    assert {"index.html", "operations.html", "decisions.html"} <= {page.name for page in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"https?://", text), page
        assert "training server" in text.lower()


def test_a_link_out_of_the_site_becomes_text_and_others_stay() -> None:
    page = "[a](../Dockerfile), [b](deploy/x.yaml), [c](protocol.md#queue), ![d](d.png)"
    assert on_page_markdown(page) == "a, b, [c](protocol.md#queue), ![d](d.png)"
