"""Headless Chromium for tests, through its DevTools protocol on a pair of pipes: nothing but the standard library.

LOWBIT_BROWSER=required makes a missing browser a failure instead of a skipped test.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120.0  # for whatever a slow and loaded machine may be at
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
# The protocol's pipes are file descriptors 3 and 4 of the browser.
LAUNCH = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 1000); os.dup2(w, 1001); os.dup2(1000, 3); \
os.dup2(1001, 4); os.closerange(5, 1002); os.execv(sys.argv[3], sys.argv[3:])"


def find() -> str:
    """The browser's path. Skips the test if there is none, or fails it where there must be one."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    message = f"no browser: none of {', '.join(NAMES)} is installed"
    if os.environ.get("LOWBIT_BROWSER") == "required":
        pytest.fail(message)
    pytest.skip(message)


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A running browser with a new profile in the folder `profile`; ended with the context."""
    executable = find()
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    argv = [
        sys.executable,
        "-c",
        LAUNCH,
        str(commands),
        str(answers),
        executable,
        *OPTIONS,
        f"--user-data-dir={profile}",
    ]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(argv, pass_fds=(commands, answers), **quiet)
    os.close(commands)
    os.close(answers)
    found = Browser(to_browser, from_browser)
    try:
        yield found
        with suppress(RuntimeError, OSError):  # it may be gone before it has answered
            found.call("Browser.close")
    finally:
        os.close(to_browser)
        os.close(from_browser)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Browser:
    """The protocol: calls with answers, and events that come between them."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from, self._rest, self._calls = to_browser, from_browser, b"", 0
        self.events: list[dict] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict:
        """The answer's result. Raises RuntimeError for one that says no."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._to, json.dumps(message).encode() + b"\0")
        answer = self._until(lambda found: found.get("id") == message["id"])
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait(self, method: str, session: str) -> None:
        """Until an event has come, perhaps before."""
        if not any((event["method"], event.get("sessionId")) == (method, session) for event in self.events):
            self._until(lambda found: (found.get("method"), found.get("sessionId")) == (method, session))

    def _until(self, wanted: Callable[[dict], bool]) -> dict:
        end = time.monotonic() + SECONDS
        while True:
            while b"\0" in self._rest:
                message, _, self._rest = self._rest.partition(b"\0")
                found = json.loads(message)
                if "method" in found:
                    self.events.append(found)
                if wanted(found):
                    return found
            if not select.select([self._from], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {SECONDS:.0f} s")
            if not (more := os.read(self._from, 1 << 20)):
                raise RuntimeError("the browser has ended")
            self._rest += more

    def open(
        self, file: Path, width: int, height: int = 900, dark: bool = False, scripts: bool = True, media: str = "screen"
    ) -> Page:
        """A new tab that has loaded a file. scripts: whether the page's own may run; `Page.evaluate` always does."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        for method, parameters in {
            "Page.enable": {},
            "Runtime.enable": {},
            "Log.enable": {},
            "Network.enable": {},
            "Emulation.setDeviceMetricsOverride": screen,
            "Emulation.setEmulatedMedia": {"media": media, "features": scheme},
            "Emulation.setScriptExecutionDisabled": {"value": not scripts},
        }.items():
            self.call(method, session, **parameters)
        self.events.clear()
        self.call("Page.navigate", session, url=file.resolve().as_uri())
        self.wait("Page.loadEventFired", session)
        return Page(self, session)


class Page:
    """A loaded page, and what happened while it was."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; the page's own policy does not bind it."""
        found = self._browser.call("Runtime.evaluate", self._session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, whole: bool = False) -> bytes:
        """PNG, of the first screen or of the whole page."""
        answer = self._browser.call(
            "Page.captureScreenshot", self._session, captureBeyondViewport=whole, **self._clip(whole)
        )
        return base64.b64decode(answer["data"])

    def _clip(self, whole: bool) -> dict:
        if not whole:
            return {}
        size = self._browser.call("Page.getLayoutMetrics", self._session)["cssContentSize"]
        return {"clip": size | {"scale": 1}}

    def pdf(self) -> bytes:
        """What would be printed."""
        return base64.b64decode(self._browser.call("Page.printToPDF", self._session)["data"])

    @property
    def requested(self) -> list[str]:
        """What was asked for, from anywhere: addresses, data URIs left out."""
        asked = [event["params"]["request"]["url"] for event in self._of("Network.requestWillBeSent")]
        return [address for address in asked if not address.startswith("data:")]

    @property
    def complaints(self) -> list[dict]:
        """Of the console and the log, and requests that failed."""
        return self._of(
            "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed"
        )

    def _of(self, *methods: str) -> list[dict]:
        events = self._browser.events
        return [event for event in events if event["method"] in methods and event.get("sessionId") == self._session]
