"""A headless Chromium that tests look through: the DevTools protocol over two pipes, by the standard library alone."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60  # for any one answer
FLAGS = """--headless=new --no-sandbox --remote-debugging-pipe --disable-gpu --disable-dev-shm-usage --no-first-run
    --disable-background-networking --disable-component-update --disable-sync --disable-extensions --mute-audio
    --no-default-browser-check --force-color-profile=srgb --hide-scrollbars --disable-features=Translate"""


def path() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a given size in CSS pixels. Whatever the page logs as an error, or asks the network for, is kept."""

    def __init__(self, folder: Path, width: int = 1400, height: int = 860) -> None:
        (there, self.out), (self.into, back) = os.pipe(), os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (there, back)]  # clear of 3 and 4, where it looks
        actions = [(os.POSIX_SPAWN_DUP2, ends[0], 3), (os.POSIX_SPAWN_DUP2, ends[1], 4)]
        self.log, flags = folder / "browser.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions += [(os.POSIX_SPAWN_OPEN, number, str(self.log), flags, 0o600) for number in (1, 2)]
        command = [path(), *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "about:blank"]
        environment = os.environ | {"HOME": str(folder)}
        self.process = os.posix_spawn(command[0], command, environment, file_actions=actions, setsid=True)
        for end in (there, back, *ends):
            os.close(end)
        self.numbers, self.rest, self.session = itertools.count(1), b"", None
        self.errors: list[str] = []
        self.asked: list[str] = []  # addresses
        (target,) = [t for t in self("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self.session = self("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __call__(self, method: str, **parameters: Any) -> dict:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.out, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _next(self, deadline: float, method: str) -> dict:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.into], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the browser does not answer to {method}")
            part = os.read(self.into, 1 << 20)
            if not part:
                raise EOFError(f"the browser has ended: {self.log.read_text(errors='replace')[-500:]}")
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: str | None, known: dict) -> None:
        if event == "Runtime.exceptionThrown":
            details = known["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded" and known["entry"]["level"] == "error":
            self.errors.append(known["entry"]["text"])
        elif event == "Network.requestWillBeSent":
            self.asked.append(known["request"]["url"])

    def open(self, file: Path) -> None:
        self("Page.navigate", url=file.absolute().as_uri())
        self.wait("document.readyState === 'complete' && document.body.dataset.drawn !== undefined")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']['exception'].get('description')}")
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.run(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition} does not come true")
            time.sleep(0.02)

    def press(self, *keys: str) -> None:
        for key in keys:
            text = {"text": key} if len(key) == 1 else {}
            self("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def move(self, selector: str, click: bool = False) -> None:
        """The mouse to the middle of the first element that fits; a click there."""
        where = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        x, y = self.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({where})")
        for kind in ("mouseMoved", *(("mousePressed", "mouseReleased") if click else ())):
            button = {} if kind == "mouseMoved" else {"button": "left", "clickCount": 1}
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)

    def screenshot(self, file: Path) -> Path:
        file.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))
        return file

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        for end in (self.out, self.into):
            os.close(end)
