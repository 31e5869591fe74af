"""Open pages in a real browser, whichever is installed, and say what happened.

Chromium is driven through its debugging pipe, Qt WebEngine by a program of its own, so that neither
needs a package of Python beside it. Invariant: what a page asked for, said and showed was observed
by the browser, not read from the page's text.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUMS = (
    "chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
    "chromium-headless-shell", "chrome-headless-shell",
)  # fmt: skip
# Without a GPU, and without the sandbox that containers do not have: the pages are our own.
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
SECONDS = 60.0
HEIGHT = 900
# A child gets descriptors under the numbers they have here; 3 and 4 may be those of the other.
LAUNCH = """import fcntl, os, sys
taken = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, descriptor in zip((3, 4), taken): os.dup2(descriptor, number)
os.execv(sys.argv[3], [*sys.argv[3:], "--remote-debugging-pipe"])
"""
# Evaluated beside the page, in a world of its own: what the page's policy forbids does not bind it.
MEASURE = """(() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.width, r.height]; };
  const all = (q, f) => Array.from(document.querySelectorAll(q), f);
  return JSON.stringify({
    text: document.body.innerText,
    plots: all('figure svg', box),
    bars: all('figure svg g[id^=axes] path[style*="fill: #2a6f97"]', box),
    titles: all('figure svg text', e => [e.textContent, ...box(e)]),
    scripts: document.scripts.length,
    handlers: all('*', e => e.getAttributeNames().filter(n => n.startsWith('on'))).flat(),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    closed: all('details:not([open]) > pre', e => e.textContent),
  });
})()"""


@dataclass(frozen=True)
class Look:
    """A page to open: with or without scripts, in a window so many pixels wide."""

    page: Path
    scripts: bool = True
    width: int = 1100


@dataclass
class Seen:
    """What a page did.

    Attributes:
        requests: addresses it asked for, its own first.
        said: messages of the console and dialogs.
        measured: as MEASURE gives it.
    """

    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)


def find_chromium() -> str | None:
    return next((found for name in CHROMIUMS if (found := shutil.which(name))), None)


def has_qt() -> bool:
    try:
        return importlib.util.find_spec("PySide6.QtWebEngineCore") is not None
    except ModuleNotFoundError:
        return False


def look_with_chromium(looks: Sequence[Look]) -> list[Seen]:
    binary = find_chromium()
    assert binary is not None
    # Its helpers may write to the profile a moment longer than it lives.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        pipe = _Pipe([binary, "--headless", *FLAGS, f"--user-data-dir={profile}"])
        try:
            return [_look(pipe, look) for look in looks]
        finally:
            pipe.close()


def look_with_qt(looks: Sequence[Look]) -> list[Seen]:
    jobs = [[str(look.page), look.scripts, look.width] for look in looks]
    environment = os.environ | {
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_CHROMIUM_FLAGS": " ".join(FLAGS),
        "QTWEBENGINE_DISABLE_SANDBOX": "1",
    }
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("qt_browser.py"))],
        input=json.dumps({"jobs": jobs, "measure": MEASURE, "height": HEIGHT}),
        capture_output=True,
        text=True,
        env=environment,
        timeout=SECONDS,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [Seen(**found) for found in json.loads(ended.stdout)]


class _Pipe:
    """Chromium's debugging protocol: JSON messages ended by a zero byte, on descriptors 3 and 4."""

    def __init__(self, command: Sequence[str]) -> None:
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self._in, False)
        self._until = time.monotonic() + SECONDS
        self._number = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            got = self.receive()
            if got.get("id") == self._number:
                assert "error" not in got, got
                return dict(got["result"])
            self.events.append(got)

    def close(self) -> None:
        # It ends with its pipe, and takes its helpers along.
        os.close(self._out)
        os.close(self._in)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def receive(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self._rest:
            assert time.monotonic() < self._until, "the browser does not answer"
            assert self._process.poll() is None, "the browser ended"
            try:
                self._rest += os.read(self._in, 2**20)
            except BlockingIOError:
                time.sleep(0.005)
        first, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(first))


def _look(pipe: _Pipe, look: Look) -> Seen:
    target = pipe.send("Target.createTarget", url="about:blank")["targetId"]
    session = pipe.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Network", "Log", "Runtime"):
        pipe.send(f"{domain}.enable", session)
    size = {"width": look.width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    pipe.send("Emulation.setDeviceMetricsOverride", session, **size)
    pipe.send("Emulation.setScriptExecutionDisabled", session, value=not look.scripts)
    pipe.events.clear()
    pipe.send("Page.navigate", session, url=look.page.as_uri())
    _until_loaded(pipe, session)
    found = pipe.send("Runtime.evaluate", session, expression=MEASURE)
    seen = Seen(measured=json.loads(found["result"]["value"]))
    for event in pipe.events:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            seen.requests.append(params["request"]["url"])
        elif method == "Page.javascriptDialogOpening":
            seen.said.append(f"dialog {params['message']}")
        elif method == "Log.entryAdded":
            seen.said.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            seen.said.append(str(params["args"][0].get("value")))
        elif method == "Runtime.exceptionThrown":
            seen.said.append(params["exceptionDetails"]["text"])
    pipe.send("Target.closeTarget", targetId=target)
    return seen


def _until_loaded(pipe: _Pipe, session: str) -> None:
    """A dialog stops a page until it is answered."""
    answered = 0
    while not any(event.get("method") == "Page.loadEventFired" for event in pipe.events):
        opened = sum(e.get("method") == "Page.javascriptDialogOpening" for e in pipe.events)
        if opened > answered:
            answered += 1
            pipe.send("Page.handleJavaScriptDialog", session, accept=True)
        else:
            pipe.events.append(pipe.receive())
