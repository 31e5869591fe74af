"""A file server on this machine that counts the bytes it sends, and may kill who asks for them."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.store.serving import FileServer, _Handler, running


class CountingServer(FileServer):
    """As `FileServer`.

    Attributes:
        sent: bytes, headers included.
        victim: (process, bytes): who is killed (-9) once so many are sent.
        fail_gets: by path, status that its content is answered with, though its size is told.
        before: by path, done once before its content is sent.
        bodies: by path, sent in place of its content, whatever its size was said to be.
        moved: by path, where a request for it is sent on to.
        ranges_asked: by path, the Range header of every request for its content.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.RequestHandlerClass = _CountingHandler
        self.sent = 0
        self.victim: tuple[int, int] | None = None
        self.fail_gets: dict[str, int] = {}
        self.before: dict[str, Callable[[], None]] = {}
        self.bodies: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.ranges_asked: defaultdict[str, list[str]] = defaultdict(list)

    def count(self, n_bytes: int) -> None:
        with self.lock:
            self.sent += n_bytes
            if self.victim and self.sent >= self.victim[1]:
                os.kill(self.victim[0], signal.SIGKILL)
                self.victim = None

    def handle_error(self, *_: Any) -> None:
        """Who was killed hangs up."""


class _CountingHandler(_Handler):
    server: CountingServer

    def do_HEAD(self) -> None:
        if not self._sent_on():
            super().do_HEAD()

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        if self._sent_on():
            return
        with self.server.lock:
            self.server.ranges_asked[path].append(self.headers.get("Range", ""))
            before = self.server.before.pop(path, None)
        if before is not None:
            before()
        if path in self.server.fail_gets:
            self._send(self.server.fail_gets[path], path, True, False)
        elif path in self.server.bodies:
            body = self.server.bodies[path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:
            super().do_GET()

    def _sent_on(self) -> bool:
        target = self.server.moved.get(self.path.lstrip("/"))
        if target is not None:
            self.send_response(302)
            self.send_header("Location", target)
            self.send_header("Content-Length", "0")
            self.end_headers()
        return target is not None

    def setup(self) -> None:
        super().setup()
        write = self.wfile.write

        def counted_write(data: Any) -> int:
            self.server.count(len(data))
            return write(data)

        self.wfile.write = counted_write  # type: ignore[method-assign]


def counted(root: Path) -> AbstractContextManager[CountingServer]:
    """A running server of a folder."""
    return running(CountingServer(root))
