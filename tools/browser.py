"""Show a report in Debian's headless chromium, and take a picture of it. Needs no packages.

python tools/browser.py PAGE.html PICTURE.png [--width PIXELS] [--height PIXELS] [--dark] [--tab TAB]
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe"),
)
PATIENCE = 60.0  # seconds to wait for an answer of the browser


class Browser:
    """One page of one chromium. It is controlled with the DevTools protocol through a pair of pipes.

    messages  errors and warnings of the console, and exceptions that no code caught
    requests  addresses of all requests of the page since the last open()
    """

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._count, self._rest, self._loaded = 0, b"", False
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self._to = os.pipe()
        self._from, ours = os.pipe()
        program = shutil.which("chromium") or "chromium"
        pipes = f'exec "$0" "$@" 3<&{theirs} 4>&{ours}'  # the protocol uses the descriptors 3 and 4
        self._process = subprocess.Popen(
            ["bash", "-c", pipes, program, *FLAGS, f"--user-data-dir={self._profile.name}"],
            pass_fds=(theirs, ours),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(ours)
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Performance.enable", timeDomain="threadTicks")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        self.call("Browser.close")
        self._process.wait(10)
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def open(self, page: Path, fragment: str = "") -> float:
        """Open a file, wait until it is loaded, and return the seconds that this took."""
        self._go("about:blank")  # a change of the fragment alone would not load the page again
        self.messages, self.requests = [], []
        began = time.perf_counter()
        self._go(page.resolve().as_uri() + fragment)
        return time.perf_counter() - began

    def run(self, program: str) -> Any:
        """Return the value of a JavaScript expression. A promise is awaited. Raises RuntimeError for an exception."""
        found = self.call("Runtime.evaluate", expression=program, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def spent(self) -> float:
        """Return the processor seconds of the page's main thread. Other work of the machine does not count."""
        values = {value["name"]: value["value"] for value in self.call("Performance.getMetrics")["metrics"]}
        return values["TaskDuration"]

    def show(self, width: int, height: int, dark: bool = False, scale: float = 1.0) -> None:
        """Set the size of the window in pixels, and the colour scheme that the page may ask for."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def press(self, key: str) -> None:
        """Press a key, such as ArrowRight, on the element that has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def picture(self, file: Path) -> None:
        """Write a PNG file of the window."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result. Raises RuntimeError if the browser refuses it."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _go(self, address: str) -> None:
        self._loaded = False
        if fault := self.call("Page.navigate", url=address).get("errorText"):
            raise RuntimeError(f"{address}: {fault}")
        while not self._loaded:
            self._read()

    def _read(self) -> dict[str, Any]:
        """Return the next message of the browser, after noting what it reports."""
        parts = [self._rest]
        while b"\0" not in parts[-1]:
            if not select.select([self._from], [], [], PATIENCE)[0]:
                raise TimeoutError(f"chromium has not answered for {PATIENCE:.0f} s")
            parts.append(os.read(self._from, 1 << 20))
            if not parts[-1]:
                raise RuntimeError("chromium has ended")
        text, self._rest = b"".join(parts).split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, said: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.messages.append(str([value.get("value", value.get("description")) for value in said["args"]]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(said["exceptionDetails"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.messages.append(said["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1400)
    parser.add_argument("--height", type=int, default=1000)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--tab", default="", choices=("curves", "resources", "configuration", "samples"))
    asked = parser.parse_args()
    with Browser() as browser:
        browser.show(asked.width, asked.height, asked.dark)
        browser.open(asked.page, f"#{asked.tab}" if asked.tab else "")
        while not browser.run("document.body.dataset.ready"):
            time.sleep(0.1)
        time.sleep(1.0)  # a chart appears some frames after it is drawn
        browser.picture(asked.picture)


if __name__ == "__main__":
    main()
