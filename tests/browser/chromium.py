"""Drives a headless Chromium over its DevTools pipe: JSON messages that end with NUL."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INSTALL = "apt-get install -y --no-install-recommends chromium"
SECONDS = 30.0


class Browser:
    """A browser with one tab.

    Attributes:
        requests: Addresses that the tab has asked for.
        problems: Errors of scripts, and of the policy of the page.
    """

    def __init__(self, write_to: int, read_from: int) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._write_to, self._read_from = write_to, read_from
        self._number = 0
        self._read = b""
        self._answers: dict[int, dict[str, Any]] = {}
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command, and its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write_to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while self._number not in self._answers:
            self._take(deadline)
        answer = self._answers.pop(self._number)
        assert "error" not in answer, (method, answer)
        return dict(answer["result"])

    def _take(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        assert left > 0, "the browser does not answer"
        if select.select([self._read_from], [], [], left)[0]:
            content = os.read(self._read_from, 1 << 20)
            assert content, "the browser has ended"
            self._read += content
        while b"\0" in self._read:
            line, _, self._read = self._read.partition(b"\0")
            self._heard(json.loads(line))

    def _heard(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            return
        values = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(values["request"]["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(json.dumps(values)[:1000])
            case "Log.entryAdded" if values["entry"]["source"] == "security":
                self.problems.append(values["entry"]["text"])

    def run(self, script: str) -> Any:
        """The value of an expression in the page, which may be a promise."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, (script, answer)
        return answer["result"].get("value")

    def open(self, address: str, *, width: int = 1280) -> None:
        """Open a page and wait until it is read."""
        self.resize(width)
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def resize(self, width: int, *, scheme: str = "light") -> None:
        """Set the width of the window in pixels, and the colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def until(self, condition: str, seconds: float = SECONDS) -> float:
        """Wait until an expression holds. Returns the seconds that it took."""
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            with contextlib.suppress(AssertionError):  # the page is being replaced
                if self.run(f"Boolean({condition})"):
                    return time.monotonic() - began
            time.sleep(0.02)
        raise AssertionError(
            f"{condition} did not hold in time: {self.run('document.body.innerText')}"
        )

    def choose_files(self, selector: str, files: list[Path]) -> None:
        """Choose files in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def names(self) -> list[tuple[str, str]]:
        """Role and name of every control, as a screen reader has them."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node.get("ignored") and "role" in node
        ]

    def screenshot(self, path: Path) -> None:
        """Keep what the tab shows."""
        content = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(content))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser for the time of the block, with a profile in a folder."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, f"there is no chromium: {INSTALL}"
    to_browser, to_us = os.pipe(), os.pipe()

    # The pipe's ends must be 3 and 4 in the browser.
    shell = f'exec "$@" 3<&{to_browser[0]} 4>&{to_us[1]}'
    with subprocess.Popen(
        [
            *("bash", "-c", shell, "bash"),
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--hide-scrollbars", "--remote-debugging-pipe"),
            f"--user-data-dir={folder / 'profile'}",
        ],
        pass_fds=(to_browser[0], to_us[1]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(to_browser[0])
        os.close(to_us[1])
        try:
            yield Browser(to_browser[1], to_us[0])
        finally:
            process.terminate()
            os.close(to_browser[1])
            os.close(to_us[0])
