"""A headless Chromium, driven over its DevTools protocol through a pair of pipes."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """One tab. ``problems`` are what its console and the page itself complained of."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._write, self._read = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb", 0)
        self._ids = itertools.count(1)
        self._session: str | None = None
        self._left = b""
        self._loaded = False
        self.problems: list[Any] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call the browser and wait for its answer."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._write.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of some size, and wait for it."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self.send("Page.navigate", url=file.resolve().as_uri())
        while not self._loaded:
            self._note(self._next())

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key such as ``Tab`` or ``f``."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40}
        code = codes[key] if key in codes else ord(key.upper())
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for kind, typed in (("keyDown", text), ("keyUp", "")):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=typed)

    def screenshot(self, whole: bool = False) -> bytes:
        """The window, or the whole page, as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            data = self._read.read(1 << 16)
            assert data, "the browser has ended"
            self._left += data
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        self._loaded |= method == "Page.loadEventFired"
        complains = method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        url = parameters.get("request", {}).get("url", "") if method == "Network.requestWillBeSent" else ""
        if complains or url.startswith("http"):
            self.problems.append(parameters)


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A browser with one page, as long as the block lasts."""
    assert CHROMIUM
    (child_in, to_browser), (from_browser, child_out) = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
        ]

        def connect() -> None:
            """Chromium reads from descriptor 3 and writes to 4."""
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 5) for end in (child_in, child_out)]
            for descriptor, end in enumerate(ends, 3):
                os.dup2(end, descriptor)
                os.close(end)

        process = subprocess.Popen([CHROMIUM, *options], preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(child_in)
        os.close(child_out)
        try:
            yield Page(to_browser, from_browser)
        finally:
            process.kill()
            process.wait()
