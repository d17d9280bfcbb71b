"""A real browser, headless: how a page looks to it, and what it finds in it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

INSTALL = "apt-get install -y --no-install-recommends chromium"

# The page is shown in a frame, whose own policy forbids scripts; this one looks in from outside.
_LOOK = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" style="border:0;width:%(width)dpx;height:900px"></iframe><pre id="found"></pre>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const all = (selector) => [...page.querySelectorAll(selector)];
  document.getElementById("found").textContent = JSON.stringify({
    width: root.clientWidth,
    needed: Math.max(root.scrollWidth, page.body.scrollWidth),
    wide: all("body *").filter((each) => each.getBoundingClientRect().right > root.clientWidth + 1)
      .map((each) => each.tagName + "." + each.className),
    images: all("img").length,
    broken: all("img").filter((each) => !each.naturalWidth).map((each) => each.alt),
    unnamed: all("img").filter((each) => !each.alt).length,
    foreign: all("[src], [href]").map((each) => each.getAttribute("src") || "")
      .filter((address) => !address.startsWith("data:image/")),
    scripts: all("script, iframe, object, embed, link, form").length,
    handlers: all("*").filter((each) => each.getAttributeNames().some((n) => n.startsWith("on")))
      .length,
    headings: all("h1, h2, h3").map((each) => [each.tagName, each.textContent]),
    text: page.body.innerText,
  });
};
frame.srcdoc = %(page)s;
</script>"""


def look(page: Path, *, width: int) -> dict[str, Any]:
    """Render a page and report its contents.

    Args:
        page: An HTML file.
        width: Of the window, in pixels.
    """
    source = json.dumps(page.read_text(encoding="utf-8")).replace("<", "\\u003c")
    outer = page.parent / f".look-{width}.html"
    outer.write_text(_LOOK % {"width": width, "page": source}, encoding="utf-8")
    dom = chromium(outer, "--dump-dom", "--virtual-time-budget=10000", width=1400)
    outer.unlink()
    match = re.search(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
    assert match, dom[-2000:]
    text = match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    found: dict[str, Any] = json.loads(text)
    return found


def chromium(page: Path, *options: str, width: int, height: int = 1000) -> str:
    """Open a page; what the browser prints."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, f"there is no chromium: {INSTALL}"
    profile = page.parent / ".chromium"
    ran = subprocess.run(
        [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile}"),
            *(f"--window-size={width},{height}", *options, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )
    shutil.rmtree(profile, ignore_errors=True)
    return ran.stdout
