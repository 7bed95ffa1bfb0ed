"""A headless Chromium that a test drives: it opens a page with the network off, clicks, types, evaluates.

Chromium's own protocol over a pair of pipes, so that no driver has to be installed.
"""

import fcntl
import json
import os
import shutil
import subprocess
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
KEYS = {"Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def _high_pipe() -> tuple[int, int]:
    """Clear of the numbers 3 and 4, which the browser needs."""
    low = os.pipe()
    high = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, 10) for one in low]
    for one in low:
        os.close(one)
    return high[0], high[1]


class Browser:
    """complaints: what was said on the console, errors of scripts, and addresses that were asked for."""

    def __init__(self, profile: Path, width: int = 1500, height: int = 900) -> None:
        assert CHROMIUM is not None
        to_browser, self._writes = _high_pipe()
        self._reads, from_browser = _high_pipe()
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-quic", "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars",
            f"--window-size={width},{height}", f"--user-data-dir={profile}", "--remote-debugging-pipe",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, "about:blank"],
            preexec_fn=lambda: (os.dup2(to_browser, 3), os.dup2(from_browser, 4)),  # where Chromium reads and writes
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._count, self._rest, self._session = 0, b"", None
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._writes)
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._reads)

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": given}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._count:
                assert "error" not in said, said
                return dict(said["result"])

    def open(self, page: Path, hash: str = "") -> None:
        """The page, once its scripts have run."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.resolve().as_uri() + (f"#{hash}" if hash else ""))
        end = time.monotonic() + 30
        while self.value("document.readyState") != "complete" or self.value("location.protocol") != "file:":
            assert time.monotonic() < end, "the page does not load"
            time.sleep(0.02)

    def value(self, script: str) -> Any:
        """What an expression of the page's JavaScript is, as JSON."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def click(self, selector: str, shift: bool = False) -> None:
        """In the middle of the first such element, with the mouse."""
        at = self.move(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, modifiers=8 * shift, **at)

    def move(self, selector: str) -> dict[str, float]:
        """The mouse to the middle of the first such element. -> where that is"""
        where = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{where}.scrollIntoView({{block: 'nearest', inline: 'nearest'}})")
        x, y = self.value(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({where}.getBoundingClientRect())")
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return {"x": x, "y": y}

    def key(self, name: str) -> None:
        given: dict[str, Any] = {"key": name, "windowsVirtualKeyCode": KEYS.get(name, ord(name[0].upper()))}
        if len(name) == 1:
            given["text"] = name
        self.call("Input.dispatchKeyEvent", type="keyDown", **given)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def screenshot(self, file: Path, dark: bool = False, scale: float = 1) -> None:
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        size = self.value("[innerWidth, innerHeight]")
        clip = {"x": 0, "y": 0, "width": size[0], "height": size[1], "scale": scale}
        file.write_bytes(b64decode(self.call("Page.captureScreenshot", format="png", clip=clip)["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._reads, 1 << 20)
            assert part, "the browser is gone"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        said = dict(json.loads(message))
        match said.get("method"):
            case "Runtime.consoleAPICalled":
                self.complaints.append(str([one.get("value") for one in said["params"]["args"]]))
            case "Runtime.exceptionThrown":
                self.complaints.append(str(said["params"]["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(said["params"]["entry"]["text"])
            case "Network.requestWillBeSent":
                address = said["params"]["request"]["url"]
                if not address.startswith(("file:", "data:", "about:", "blob:")):
                    self.complaints.append(f"asked for {address}")
        return said
