"""A file server on this machine that does what it is told, wrong things included."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kdcache.store import Store


class FileServer(ThreadingHTTPServer):
    """Serves a folder over HTTP.

    Attributes:
        root: the folder.
        ranges: answer requests for parts with parts, else with the whole file.
        status: by path, answered instead of a file.
        cut: answers of these paths end halfway, so many times.
        busy: so many requests of a path are answered with 503 first.
        latency: seconds before every answer.
        requests: (method, path) and how often it came.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.ranges = True
        self.status: dict[str, int] = {}
        self.cut: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()
        self.latency = 0.0
        self.requests: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()
        self.now = self.at_once = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self, path: str = "") -> int:
        """GET requests of paths that hold `path`."""
        return sum(n for (method, p), n in self.requests.items() if method == "GET" and path in p)


Server = TypeVar("Server", bound=ThreadingHTTPServer)


def served(root: Path) -> AbstractContextManager[FileServer]:
    """A running server of a folder."""
    return running(FileServer(root))


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """A server that answers until the block ends."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def all_fields(store: Store) -> list[str]:
    groups = ["structures", *(f"teachers/{name}" for name in store.teachers)]
    return [f"{group}/{name}" for group in groups for name in store.fields(group)]


def assert_same(store: Store, other: Store) -> None:
    assert all_fields(store) == all_fields(other)
    for name in all_fields(store):
        np.testing.assert_array_equal(store.read(name), other.read(name), strict=True)


def copies(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("??/*") if path.is_file())


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FileServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        server, path = self.server, self.path.lstrip("/")
        with server.lock:
            server.requests[self.command, path] += 1
            server.now += 1
            server.at_once = max(server.at_once, server.now)
            busy = with_body and server.busy[path] > 0
            server.busy[path] -= busy
            cut = with_body and server.cut[path] > 0
            server.cut[path] -= cut
        time.sleep(server.latency)
        try:
            self._send(503 if busy else server.status.get(path, 0), path, with_body, cut)
        finally:
            with server.lock:
                server.now -= 1

    def _send(self, status: int, path: str, with_body: bool, cut: bool) -> None:
        file = self.server.root / path
        if not status and not file.is_file():
            status = 404
        if status:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        start, end, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            status = 206
            if not asked[1]:
                start = max(0, size - int(asked[2]))
            else:
                start = int(asked[1])
                end = min(size, int(asked[2]) + 1) if asked[2] else size
        with open(file, "rb") as content:
            content.seek(start)
            body = content.read(end - start)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut
