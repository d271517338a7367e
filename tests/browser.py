"""Headless Chromium, spoken to over a pipe in its DevTools protocol: one process for the pages of many tests.

A test waits for what it looks at, however busy the machine is, and runs its scripts beside a page's own, which its
policy does not concern.
"""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

LIMIT = 900  # seconds that anything may take
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--mute-audio"),
)


def find_chromium() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, ("/usr/bin/chromium", "chromium", "google-chrome"))), None)


class Browser:
    """A browser with a profile of its own, and more of Chromium's flags."""

    def __init__(self, profile: Path, *flags: str) -> None:
        (read_here, said), (heard, write_here) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (heard, said)]  # it reads from 3 and writes to 4
        command = [find_chromium() or "chromium", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", *command, *QUIET, *flags, "about:blank"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for one in (said, heard, *theirs):
            os.close(one)
        self.reader, self.writer, self.asked, self.rest = read_here, write_here, 0, b""

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol; what happens meanwhile is not listened to."""
        self.asked += 1
        message = {"id": self.asked, "method": method, "params": parameters}
        sent = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while sent:
            sent = sent[os.write(self.writer, sent) :]
        until = time.monotonic() + LIMIT
        while True:
            line, end, after = self.rest.partition(b"\0")
            if not end:
                ready, _, _ = select.select([self.reader], [], [], max(0, until - time.monotonic()))
                assert ready, f"Chromium does not answer to {method}"
                came = os.read(self.reader, 1 << 20)
                assert came, "Chromium has ended"
                self.rest += came
                continue
            self.rest = after
            answer = json.loads(line)
            if answer.get("id") == self.asked:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    @contextmanager
    def page(
        self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, before: str = ""
    ) -> Iterator[Page]:
        """A file as it is shown once it is loaded; `before` is a script that is run before any of its own."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", session, **size)
        self.ask("Emulation.setFocusEmulationEnabled", session, enabled=True)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", session, features=[theme])
        if before:
            self.ask("Page.enable", session)
            self.ask("Page.addScriptToEvaluateOnNewDocument", session, source=before)
        self.ask("Page.navigate", session, url=Path(path).absolute().as_uri())
        page = Page(self, session)
        page.wait_for("location.protocol === 'file:' && document.readyState === 'complete'")
        yield page
        self.ask("Target.closeTarget", targetId=target)

    def close(self) -> None:
        """End it."""
        os.close(self.writer)
        os.close(self.reader)
        self.process.terminate()
        self.process.wait(LIMIT)


class Page:
    """A page that is shown."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def run(self, script: str) -> Any:
        """The value of an expression, or what its promise holds."""
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.browser.ask("Runtime.evaluate", self.session, **asked)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Return once an expression is true."""
        until = time.monotonic() + LIMIT
        while not self.run(condition):
            assert time.monotonic() < until, f"never: {condition}"
            time.sleep(0.02)

    def html(self) -> str:
        """The document as it is now."""
        return str(self.run("document.documentElement.outerHTML"))

    def picture(self) -> Image.Image:
        """What is seen of it."""
        data = self.browser.ask("Page.captureScreenshot", self.session)["data"]
        return Image.open(io.BytesIO(base64.b64decode(data)))
