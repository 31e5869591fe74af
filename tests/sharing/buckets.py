"""An S3 service on this machine (moto) that counts, fails and kills when told to."""

from __future__ import annotations

import os
import signal
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

BUCKET = "bucket"


class BucketServer:
    """A running service with one empty bucket.

    Attributes:
        environment: what a client needs.
        requests: by method.
        busy: so many uploads are answered with 503 first.
        victim: (process, requests): who is killed (-9) at its so-manieth request.
        before: by path, done once before what is put there is.
        sent, received: bytes of bodies.
    """

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
        }
        self.requests: Counter[str] = Counter()
        self.busy = 0
        self.victim: tuple[int, int] | None = None
        self.before: dict[str, Callable[[], None]] = {}
        self.sent = self.received = 0
        self.lock = threading.Lock()

    def client(self, folder: str) -> Any:
        """An obstore client of a folder."""
        from obstore.store import S3Store

        return S3Store(
            BUCKET,
            prefix=folder,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id="key",
            secret_access_key="secret",
            client_options={"allow_http": True},
        )

    def objects(self, folder: str) -> dict[str, bytes]:
        """Everything in a folder."""
        client = self.client(folder)
        names = [one["path"] for page in client.list() for one in page]
        return {name: bytes(client.get(name).bytes()) for name in names}

    def wrapped(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """A WSGI app that is watched."""

        def watched(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            with self.lock:
                method = environ["REQUEST_METHOD"]
                self.requests[method] += 1
                self.received += int(environ.get("CONTENT_LENGTH") or 0)
                if self.victim and self.requests.total() >= self.victim[1]:
                    os.kill(self.victim[0], signal.SIGKILL)
                    self.victim = None
                busy = method == "PUT" and self.busy > 0
                self.busy -= busy
            before = self.before.pop(environ["PATH_INFO"], None) if method == "PUT" else None
            if before is not None:
                before()
            if busy:
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("503 Slow Down", [("Content-Length", "0")])
                return [b""]
            body = b"".join(app(environ, start_response))
            with self.lock:
                self.sent += len(body)
            return [body]

        return watched


@contextmanager
def bucket_server() -> Iterator[BucketServer]:
    """A running service."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *_: Any) -> None:
            pass

    app = DomainDispatcherApplication(create_backend_app)
    holder: list[BucketServer] = []
    server = make_server(
        "127.0.0.1",
        0,
        lambda *arguments: holder[0].wrapped(app)(*arguments),
        threaded=True,
        request_handler=Quiet,
    )
    running = BucketServer(server.server_port)
    holder.append(running)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        make = urllib.request.Request(f"{running.endpoint}/{BUCKET}", method="PUT")
        urllib.request.urlopen(make).read()
        running.requests.clear()
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
